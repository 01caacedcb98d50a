"""Books of what sequences cost, and the sums over all of them."""

from __future__ import annotations

import msgspec

from cierzo.scheduler.request import TICKS_PER_S, Request


class SchedulerStats(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Gauges (`running`, `waiting`: sequences; `waiting_tokens`: known to them and not computed) and counters since
    the start. computed_tokens to kv_block_s: sums of what each `Finish` says, once all have ended."""

    running: int
    waiting: int
    waiting_tokens: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    finished: int
    computed_tokens: int
    recomputed_tokens: int
    sequence_steps: int
    kv_block_s: float


class Accounts:
    """Books of what sequences cost. A step's rows count when its result is taken in, for the sequences that still
    run as they did when it was planned; blocks count from the reading of the clock at which they were given."""

    def __init__(self) -> None:
        self.computed_tokens = self.recomputed_tokens = self.sequence_steps = 0
        self.prompt_tokens = self.cached_tokens = self.output_tokens = self.preemptions = 0
        self._kv_ticks = 0

    @property
    def kv_block_s(self) -> float:
        """Blocks times seconds, up to each sequence's last change of blocks."""
        return self._kv_ticks / TICKS_PER_S

    def stats(
        self, *, running: int, waiting: int, waiting_tokens: int, steps: int, finished: int
    ) -> SchedulerStats:
        """The counters, with gauges and counters that are the scheduler's."""
        return SchedulerStats(
            running=running,
            waiting=waiting,
            waiting_tokens=waiting_tokens,
            steps=steps,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            preemptions=self.preemptions,
            finished=finished,
            computed_tokens=self.computed_tokens,
            recomputed_tokens=self.recomputed_tokens,
            sequence_steps=self.sequence_steps,
            kv_block_s=self.kv_block_s,
        )

    def begin(self, request: Request, now: float) -> None:
        """Note an admission: what the sequence found computed, and since when it holds blocks."""
        spent = request.spent
        spent.num_found = request.num_computed
        spent.held_since_ticks = int(now * TICKS_PER_S)

    def hold(self, request: Request, num_blocks: int, now: float) -> None:
        """Count the blocks that a sequence has held until now; to be called when their number changes."""
        ticks = int(now * TICKS_PER_S)
        spent = request.spent
        held = num_blocks * (ticks - spent.held_since_ticks)
        spent.held_since_ticks = ticks
        spent.kv_ticks += held
        self._kv_ticks += held

    def leave(self, request: Request, now: float) -> None:
        """Note that a sequence gives its blocks back: what it has computed since its admission, and which part of
        that for the second time."""
        self.hold(request, len(request.blocks.block_ids), now)
        spent = request.spent
        found, computed = spent.num_found, request.num_computed
        again = max(0, min(computed, spent.most_computed) - found)
        spent.computed_tokens += computed - found
        spent.recomputed_tokens += again
        spent.most_computed = max(spent.most_computed, computed)
        self.recomputed_tokens += again
