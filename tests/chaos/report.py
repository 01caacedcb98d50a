"""Figures with their limits, and a verdict."""

from __future__ import annotations

from collections.abc import Sequence


class Report:
    """Prints as it goes; `verdict` is False once a figure was out of its limit."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_good = True

    def say(self, text: str) -> None:
        """Tell a figure without a limit."""
        if text:
            print(f"  {text}", flush=True)

    def need(self, what: str, value: object, expected: object) -> None:
        """Demand equality."""
        self._judge(value == expected, f"{what}: {value}, must be {expected}")

    def at_most(self, what: str, value: float, limit: float, unit: str = "") -> None:
        """Demand a figure up to `limit`."""
        self._judge(value <= limit, f"{what}: {value:,.3g} {unit} (limit {limit:,.3g})")

    def at_least(self, what: str, value: float, limit: float, unit: str = "") -> None:
        """Demand a figure from `limit` up."""
        self._judge(value >= limit, f"{what}: {value:,.4g} {unit} (at least {limit:,.4g})")

    def verdict(self) -> bool:
        """Print it."""
        print(f"{'PASS' if self._is_good else 'FAIL'}  {self._name}", flush=True)
        return self._is_good

    def _judge(self, is_good: bool, text: str) -> None:
        self._is_good &= is_good
        self.say(text if is_good else f"{text}  FAIL")


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]
