"""Prompts before a newcomer, and when it is done, by the scheduler's rule (scheduler/policy.py: chunk_tokens).

A step goes to prompts in the order in which they came. One that is longer than a chunk leaves half of what is left
of the step to those behind it; so short ones get their token beside it. Pure functions of seconds of work.
"""

from __future__ import annotations

MOST_SHARING = 6  # long prompts that a step is divided among before nothing is left for others
BISECTIONS = 30


class PromptLine:
    """Work that comes before a newcomer: of each long prompt, in order, and of all short ones, behind them."""

    __slots__ = ("_long_s", "_short_s")

    def __init__(self, long_s: list[float], short_s: float) -> None:
        """Take both in seconds that they need with nothing else to compute."""
        self._long_s = [one for one in long_s if one > 0]
        self._short_s = short_s

    def queue_s(self, own_s: float) -> float:
        """Seconds that a newcomer with so much work of its own takes longer than that."""
        num_first = max(0, len(self._long_s) - MOST_SHARING)  # these leave nothing
        passed_s = sum(self._long_s[:num_first])
        long_s, left_s = self._long_s[num_first:], self._short_s + own_s
        while long_s:
            shares = [0.5 ** (place + 1) for place in range(len(long_s))]
            rest = shares[-1]
            until_s = min(work / share for work, share in zip(long_s, shares, strict=True))
            if left_s <= until_s * rest:
                return passed_s + left_s / rest - own_s
            passed_s += until_s
            left_s -= until_s * rest
            long_s = _less(long_s, shares, until_s)
        return passed_s + left_s - own_s

    def after(self, seconds: float) -> PromptLine:
        """The line as it is some time later, if nobody else comes."""
        long_s, short_s, left_s = self._long_s, self._short_s, seconds
        while left_s > 0 and long_s:
            shares = [0.5 ** min(place + 1, len(long_s) - (short_s <= 0)) for place in range(len(long_s))]
            rest = 1 - sum(shares)
            until_s = min(left_s, *(work / share for work, share in zip(long_s, shares, strict=True)))
            if rest > 0 and short_s > 0:
                until_s = min(until_s, short_s / rest)
                short_s -= until_s * rest
                short_s = 0.0 if short_s < 1e-12 else short_s
            long_s = _less(long_s, shares, until_s)
            left_s -= until_s
        return PromptLine(long_s, max(0.0, short_s - left_s) if not long_s else short_s)

    def time_until(self, own_s: float, most_s: float) -> float:
        """Seconds after which a newcomer would have to wait no longer than `most_s`."""
        early_s, late_s = 0.0, sum(self._long_s) + self._short_s
        for _ in range(BISECTIONS):
            middle_s = (early_s + late_s) / 2
            if self.after(middle_s).queue_s(own_s) > most_s:
                early_s = middle_s
            else:
                late_s = middle_s
        return late_s


def _less(work_s: list[float], shares: list[float], seconds: float) -> list[float]:
    """Subtract what each was served, without those that are done."""
    left = [work - share * seconds for work, share in zip(work_s, shares, strict=True)]
    return [one for one in left if one > 1e-12]
