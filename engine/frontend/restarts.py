"""How often a core may die, and how soon the next one starts: a rule, without processes."""

from __future__ import annotations

from collections import deque

from cierzo.engine.errors import CoreFailed
from cierzo.engine.frontend.config import FrontendConfig

HOUR_S = 3600.0
FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0


class Restarts:
    """Deaths of cores. One that committed a step before it died got somewhere: only the hour's limit counts it."""

    def __init__(self, config: FrontendConfig) -> None:
        self._config = config
        self._fruitless: deque[float] = deque()  # times of deaths without a step, those in the window
        self._all: deque[float] = deque()  # times of deaths, those of the last hour
        self._in_a_row = 0
        self._last_was_fruitless = False

    def record(self, now: float, committed: bool) -> None:
        """A core has died; `committed`: it had ended a step since its Ready."""
        self._all.append(now)
        self._last_was_fruitless = not committed
        if committed:
            self._in_a_row = 0
        else:
            self._fruitless.append(now)
            self._in_a_row += 1
        for deaths, window_s in ((self._fruitless, self._config.core_restart_window_s), (self._all, HOUR_S)):
            while deaths and deaths[0] < now - window_s:
                deaths.popleft()

    def not_started(self) -> None:
        """A core could not even be started: the next try waits longer, and nothing is counted."""
        self._in_a_row = max(self._in_a_row, 1) + 1

    def forgive(self) -> None:
        """The last death was foreseen, as when a request that kills is sought: only the hour's limit counts it."""
        if self._last_was_fruitless:
            self._last_was_fruitless = False
            self._fruitless.pop()
            self._in_a_row -= 1

    @property
    def delay_s(self) -> float:
        """Seconds until the next start: none after a first death, then twice as many each time."""
        if self._in_a_row <= 1:
            return 0.0
        return min(FIRST_DELAY_S * 2.0 ** min(self._in_a_row - 2, 10), LONGEST_DELAY_S)

    def refusal(self, last: str) -> CoreFailed | None:
        """Why there will be no other core, if so; `last`: what the last one died of."""
        config = self._config
        if len(self._fruitless) > config.max_core_restarts:
            within = f"without ending a step within {config.core_restart_window_s:g} s"
            return _too_often("max_core_restarts", config.max_core_restarts, within, last)
        if len(self._all) > config.max_core_restarts_per_hour:
            return _too_often(
                "max_core_restarts_per_hour", config.max_core_restarts_per_hour, "within an hour", last
            )
        return None


def _too_often(field: str, limit: int, within: str, last: str) -> CoreFailed:
    return CoreFailed(
        f"the core process died more than {limit} times {within} ({field}); last: {last}", field=field, limit=limit
    )
