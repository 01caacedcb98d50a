"""Loads in virtual time: the real load client and the real scheduler, on a card that is simulated.

The clock of the asyncio loop jumps to the next timer instead of waiting for it. Steps in which the same sequences
decode one token more are taken together, by `JumpingScheduler`; whatever else happens (an arrival, a prompt, an
admission, an end, a preemption) is for the engine's own scheduler, a step at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import numpy as np

from cierzo.bench.latency import LoadResult
from cierzo.bench.load import LoadSettings, run_load
from cierzo.bench.plan.batching import Row, expand
from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.step_model import FloatArray, StepTotals
from cierzo.engine.cost.work import Distinct
from cierzo.engine.errors import BY_CODE, CoreFailed
from cierzo.engine.messages import Delta, Submit, TokenDelta
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.simulated import SimulatedRunner
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.scheduler import Scheduler

MOST_STEPS = 4096  # taken together, at most


class VirtualClock:
    """A clock whose time passes only when somebody waits for it."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        """Virtual seconds."""
        return self.now_s

    def wait_until(self, then_s: float) -> None:
        """Jump to `then_s`, unless it has passed."""
        self.now_s = max(self.now_s, then_s)


class JumpingScheduler(Scheduler):
    """The engine's scheduler, which can also take many decode steps at once.

    `advance` leaves the running requests (tokens, counts, blocks), their tenants (counter, blocks), the deltas, the
    accounts and the counters of steps and output tokens as `schedule` and `commit` would, step by step; it touches
    nothing else of the scheduler's state.
    """

    def steady(self) -> Row:
        """The coming steps that are sure to be alike: in each every running sequence decodes a token, and nothing
        else happens unless somebody adds or aborts. Must not be asked while a step is in flight."""
        running = self._running.values()
        waiting = self._tenants.num_waiting and not self._blocked
        others = len(self._gate) or waiting or self._deadlines.first() is not None
        if others or not running or any(len(one.tokens) - one.num_planned != 1 for one in running):
            return Row(0, 0, 0, repeat=0)
        before_an_end = min(one.stop.limit_tokens - len(one.tokens) for one in running) - 1
        with_room = self._cache.num_free // len(running) * self._cache.block_tokens
        steps = max(0, min(before_an_end, with_room))
        return Row(len(running), sum(len(one.tokens) for one in running), len(running), steps)

    def advance(self, begins_s: Sequence[float], token_ids: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Take the first of the steps that `steady` told, one for each time of `begins_s` at which it begins;
        return (slot, new blocks) where a sequence gained any. token_ids: by slot, the token that each step gives,
        which ends nothing."""
        num_steps, accounts = len(begins_s), self._accounts
        grown, too_many = [], f"{num_steps} steps are more than steady() allows"
        for request in self._running.values():
            new, blocks = [token_ids[request.slot]] * num_steps, request.blocks
            request.tokens += new
            assert len(request.tokens) < request.stop.limit_tokens, too_many
            first = request.num_computed
            request.num_computed = request.num_planned = computed = first + num_steps
            if computed > blocks.capacity_tokens:
                for full in range(blocks.capacity_tokens, computed, self._cache.block_tokens):
                    accounts.hold(request, full // self._cache.block_tokens, begins_s[full - first])
                block_ids = self._cache.allocate(blocks, computed)
                assert block_ids is not None, too_many
                request.tenant.hold(block_ids)
                grown.append((request.slot, block_ids))
            if computed >= blocks.next_index_tokens:
                self._cache.index(blocks, computed)
            request.tenant.counter += num_steps * request.tenant.token_charge
            self._deltas.append(TokenDelta(*request.key, new, None, None))
        self._num_steps += num_steps
        self._accounts.output_tokens += num_steps * len(self._running)
        accounts.computed_tokens += num_steps * len(self._running)
        accounts.sequence_steps += num_steps * len(self._running)
        return grown


class VirtualCore(EngineCore):
    """The engine core on a simulated device, in virtual time."""

    _scheduler: JumpingScheduler

    def __init__(self, config: EngineConfig, clock: VirtualClock, distinct: Distinct | None = None) -> None:
        """distinct: experts that so many tokens reach; by default as if chosen at random."""
        self.virtual_clock = clock
        self.simulated = SimulatedRunner(config, clock, distinct)
        super().__init__(config, self.simulated, clock)

    def _make_scheduler(self) -> JumpingScheduler:
        return JumpingScheduler(self._config.scheduler, self._cache, self.virtual_clock, self._times.cost)

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
        found = simulated.model.time(*expand([row]))
        simulated.totals.add(found)
        seconds = np.atleast_1d(found.total_s)
        ends_s = self.virtual_clock() + np.cumsum(seconds)
        for slot, block_ids in self._scheduler.advance([*(ends_s - seconds)], simulated.token_ids):
            self._builder.extend_table(slot, block_ids)
        self.virtual_clock.wait_until(float(ends_s[-1]))
        return self.take_deltas()


class _JumpingSelector(selectors.SelectSelector):
    """A selector of the virtual loop: where the loop would wait, its clock jumps."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Advance the clock by `timeout`; no event ever comes from outside."""
        if timeout is None:
            raise RuntimeError("every task of the virtual loop waits for another: this would never end")
        self._clock.now_s += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop whose clock jumps to the next timer instead of waiting."""

    def __init__(self, clock: VirtualClock) -> None:
        self._virtual_clock = clock
        super().__init__(_JumpingSelector(clock))
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Virtual seconds."""
        return self._virtual_clock.now_s


class SimulatedServer:
    """A simulated engine, and the one connection to it: a `LoadClient`."""

    def __init__(
        self, config: EngineConfig, distinct: Distinct | None = None, *, step_at_a_time: bool = False
    ) -> None:
        """distinct: experts that so many tokens reach. step_at_a_time: take no steps together."""
        self.clock = VirtualClock()
        self.core = VirtualCore(config, self.clock, distinct)
        self.vocab_size = config.model.vocab_size
        self.device = config.device
        self._most_steps = 1 if step_at_a_time else MOST_STEPS
        self._streams: dict[int, asyncio.Queue[TokenDelta]] = {}
        self._arrivals: list[Submit] = []
        self._arrived = asyncio.Event()
        self._sent = 0
        self.ends: list[StepTotals] = []  # the totals when each request ended, in order

    @property
    def totals(self) -> StepTotals:
        """Sums over the engine's steps so far."""
        return self.core.simulated.totals

    async def run(self) -> None:
        """Take requests and steps, until cancelled. A request that comes within a step waits for the step's end, as
        it does in the core."""
        while True:
            for submit in self._arrivals:
                self.core.submit(submit)
            self._arrivals.clear()
            self._arrived.clear()
            if not self.core.has_work():
                await self._arrived.wait()
                continue
            for delta in await self._step():
                ended = delta.finish is not None
                stream = self._streams.pop(delta.request_id) if ended else self._streams[delta.request_id]
                stream.put_nowait(delta)
                if ended:
                    self.ends.append(msgspec.structs.replace(self.totals))

    async def generate(self, **request: Any) -> AsyncIterator[Delta]:
        """Stream one answer; raises what the server would answer instead."""
        self._sent += 1
        stream = self._streams[self._sent] = asyncio.Queue()
        sampling = {name: value for name, value in request.items() if name in SamplingParams.__struct_fields__}
        submit = Submit(
            request_id=self._sent, prompt_token_ids=request["token_ids"], sampling=SamplingParams(**sampling)
        )
        self._arrivals.append(submit)
        self._arrived.set()
        while True:
            delta = await stream.get()
            if delta.token_ids:
                yield Delta(stream=0, sample=delta.sample, token_ids=delta.token_ids)
            if delta.finish is not None:
                if delta.finish.reason not in ("stop", "length"):
                    code, _, words = delta.finish.message.partition(": ")  # as the core refuses a request
                    raise BY_CODE.get(code, CoreFailed)(words or delta.finish.message or delta.finish.reason)
                return

    async def model_info(self) -> SimulatedServer:
        """The server itself, which has what is asked for."""
        return self

    async def close(self) -> None:
        """Do nothing: there is nothing to let go of."""

    async def _step(self) -> list[TokenDelta]:
        """Take one step, or all coming ones that are alike and have begun when a request comes. The core lets their
        time pass at once; the clock is set back, and the loop waits, so that the other tasks see time pass too."""
        begin_s, ends_s = self.clock.now_s, np.cumsum(self.core.steady_s(self._most_steps))
        if len(ends_s) < 2:
            deltas = self.core.step_plain()
            end_s, self.clock.now_s = self.clock.now_s, begin_s
            await asyncio.sleep(end_s - begin_s)
            return deltas
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(float(ends_s[-1])):
                await self._arrived.wait()
        begun = min(int(np.searchsorted(ends_s, self.clock.now_s - begin_s, side="right")) + 1, len(ends_s))
        await asyncio.sleep(begin_s + float(ends_s[begun - 1]) - self.clock.now_s)
        self.clock.now_s = begin_s
        return self.core.advance(begun)


def run_simulated_load(server: SimulatedServer, settings: LoadSettings) -> LoadResult:
    """Run one load in virtual time. Raises ConfigError for settings that contradict each other."""

    async def connect(_: str) -> SimulatedServer:
        return server

    async def load() -> LoadResult:
        engine = asyncio.create_task(server.run())
        try:
            return await run_load(settings, connect, server.clock)
        finally:
            engine.cancel()

    with asyncio.Runner(loop_factory=lambda: VirtualLoop(server.clock)) as runner:
        return runner.run(load())
