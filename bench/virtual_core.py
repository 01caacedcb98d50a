"""The engine core in virtual time: steps that are sure to be alike are taken together.

A step at a time, an hour of load takes minutes, nearly all of them for steps in which the same sequences decode
one token more. `JumpingScheduler` takes a stretch of such steps at once. Whatever else happens (an arrival, a
prompt, an admission, an end, a preemption) is for the engine's own scheduler, a step at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cierzo.bench.plan.course import Row, expand
from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.step_model import FloatArray
from cierzo.engine.cost.work import Distinct
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.simulated import SimulatedRunner
from cierzo.scheduler.plan import TokenDelta
from cierzo.scheduler.scheduler import Scheduler


class VirtualClock:
    """A clock whose time passes only when somebody waits for it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """Seconds since the clock was made."""
        return self.now_s

    def wait_until(self, then_s: float) -> None:
        """Jump to `then_s`, unless it has passed."""
        self.now_s = max(self.now_s, then_s)


class JumpingScheduler(Scheduler):
    """The engine's scheduler, which can also take many decode steps at once.

    `advance` leaves the running requests (tokens, counts, blocks), the deltas and the counters of steps and output
    tokens as `schedule` and `commit` would, step by step; it touches nothing else of the scheduler's state. Tests
    hold loads with and without it against each other, and `check` holds after it.
    """

    def steady(self) -> Row:
        """The coming steps that are sure to be alike: in each every running sequence decodes a token, and nothing
        else happens unless somebody adds or aborts. Must not be asked while a step is in flight."""
        running = self._running.values()
        others = len(self._gate) or (self._waiting and not self._blocked) or self._deadlines.first() is not None
        if others or not running or any(len(one.tokens) - one.num_planned != 1 for one in running):
            return Row(0, 0, 0, repeat=0)
        before_an_end = min(one.stop.limit_tokens - len(one.tokens) for one in running) - 1
        with_room = self._cache.num_free // len(running) * self._cache.block_tokens
        steps = max(0, min(before_an_end, with_room))
        return Row(len(running), sum(len(one.tokens) for one in running), len(running), steps)

    def advance(self, num_steps: int, token_ids: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Take the first `num_steps` of the steps that `steady` told; return (slot, new blocks) where a sequence
        gained any. token_ids: by slot, the token that each step gives, which ends nothing."""
        grown, too_many = [], f"{num_steps} steps are more than steady() allows"
        for request in self._running.values():
            new, blocks = [token_ids[request.slot]] * num_steps, request.blocks
            request.tokens += new
            assert len(request.tokens) < request.stop.limit_tokens, too_many
            request.num_computed = request.num_planned = computed = request.num_computed + num_steps
            if computed > blocks.capacity_tokens:
                block_ids = self._cache.allocate(blocks, computed)
                assert block_ids is not None, too_many
                grown.append((request.slot, block_ids))
            if computed >= blocks.next_index_tokens:
                self._cache.index(blocks, computed)
            self._deltas.append(TokenDelta(*request.key, new, None, None))
        self._num_steps += num_steps
        self._output_tokens += num_steps * len(self._running)
        return grown


class VirtualCore(EngineCore):
    """The engine core on a simulated device, in virtual time."""

    _scheduler: JumpingScheduler

    def __init__(self, config: EngineConfig, clock: VirtualClock, distinct: Distinct | None = None) -> None:
        """distinct: experts that so many tokens reach; by default as if chosen at random."""
        self.virtual_clock = clock
        self.simulated = SimulatedRunner(config, clock, distinct)
        super().__init__(config, self.simulated, clock)

    def _forget(self) -> None:
        super()._forget()
        self._scheduler = JumpingScheduler(self._config.scheduler, self._cache, self.virtual_clock)

    def steady_s(self, at_most: int) -> FloatArray:
        """Seconds of each coming step that is sure to be alike, up to `at_most` of them. Fewer than two: the next
        step is for `step_plain`."""
        row = self._scheduler.steady()
        row.repeat = min(row.repeat, at_most)
        return np.atleast_1d(self.simulated.model.time(*expand([row])).total_s)

    def advance(self, steps: int) -> list[TokenDelta]:
        """Take the first `steps` of those that `steady_s` told, and let their time pass."""
        row, simulated = self._scheduler.steady(), self.simulated
        row.repeat = steps
        seconds = simulated.model.add(simulated.totals, *expand([row]))
        for slot, block_ids in self._scheduler.advance(steps, simulated.token_ids):
            self._builder.extend_table(slot, block_ids)
        self.virtual_clock.wait_until(self.virtual_clock() + float(seconds.sum()))
        return self.take_deltas()
