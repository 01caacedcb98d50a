"""When a core counts as stalled, and when as hung: a rule over its signs of life (engine/signs.py), and no more."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path

from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.signs import Signs

LOOK_S = 0.2
LONGEST_GAP_S = 4 * LOOK_S  # between two looks; what is over this, the front end itself did not run
PATIENCE = 10  # a step may take so many times what was predicted
STOPPED_SHARE = 0.5  # of core_hang_s: whoever stopped a process may let it go on


class Verdict(Enum):
    """State of a core, judged by its signs."""

    LIVES = "lives"
    STALLED = "stalled"
    HUNG = "hung"


class Watch:
    """A watch over one core from its Ready on. `look` at its signs about every LOOK_S.

    Time counts only while somebody looks: if the whole machine, or the front end with the core, was frozen for a
    minute, that is not held against the core. `reason` says why it is stalled or hung.
    """

    def __init__(self, config: FrontendConfig, state_of: Callable[[], str]) -> None:
        """state_of: the letter that /proc gives for the process ("T" stopped, "t" traced), while it stalls."""
        self._stall_s = config.core_stall_s
        self._hang_s = config.core_hang_s
        self._state_of = state_of
        self._looked_at: float | None = None
        self._signs: Signs | None = None
        self._quiet_s = 0.0  # without any sign
        self._turn_s = 0.0  # of the turn under way
        self.reason = ""

    def look(self, signs: Signs, now: float) -> Verdict:
        """Judge what the core says at a time of the clock."""
        gap_s = 0.0 if self._looked_at is None else min(now - self._looked_at, LONGEST_GAP_S)
        last, self._signs, self._looked_at = self._signs, signs, now
        if last is None or not signs.beats:  # a core that gives no signs is not judged by them
            return Verdict.LIVES
        same_turn = (signs.turns, signs.begun_s) == (last.turns, last.begun_s)
        self._quiet_s = self._quiet_s + gap_s if same_turn and signs.beats == last.beats else 0.0
        self._turn_s = self._turn_s + gap_s if same_turn and signs.begun_s else 0.0
        return self._judge(signs)

    def _judge(self, signs: Signs) -> Verdict:
        patience_s = PATIENCE * signs.predicted_s
        limit_s = max(self._hang_s, patience_s)
        late = signs.predicted_s > 0 and self._turn_s > max(self._stall_s, patience_s)
        if self._quiet_s < self._stall_s and not late and self._turn_s <= limit_s:
            self.reason = ""
            return Verdict.LIVES
        state, quiet = self._state_of(), f"{self._quiet_s:.1f} s"
        if state == "t":  # somebody debugs it
            self.reason = "it is being traced"
            return Verdict.STALLED
        if state == "T":
            self.reason = f"it was stopped by a signal {quiet} ago"
            return Verdict.HUNG if self._quiet_s >= STOPPED_SHARE * self._hang_s else Verdict.STALLED
        if self._quiet_s >= self._stall_s:
            self.reason = f"it has shown no sign of life for {quiet}"
            return Verdict.HUNG if self._quiet_s >= self._hang_s else Verdict.STALLED
        thought = f", thought to take {signs.predicted_s:.3g} s," if signs.predicted_s else ""
        self.reason = f"its turn {signs.turns + 1}{thought} has run for {self._turn_s:.1f} s"
        return Verdict.HUNG if self._turn_s > limit_s else Verdict.STALLED


def process_state(pid: int) -> str:
    """The letter of a process's state in /proc/PID/stat, "" where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split(maxsplit=1)[0]
