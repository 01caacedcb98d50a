"""Loads in virtual time: the real load client and the real scheduler, on a card that is simulated.

`VirtualLoop` is an asyncio loop whose clock jumps to the next timer instead of waiting for it. `SimulatedServer` is
the engine core as a task of that loop, and its `connect` opens what `bench.load` takes for a connection.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import msgspec
import numpy as np

from cierzo.bench.latency import LoadResult
from cierzo.bench.load import LoadClient, LoadSettings, run_load
from cierzo.bench.virtual_core import VirtualClock, VirtualCore
from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.step_model import StepTotals
from cierzo.engine.cost.work import Distinct
from cierzo.engine.errors import BY_CODE, CierzoError, CoreFailed
from cierzo.engine.messages import Delta, Submit, TokenDelta
from cierzo.scheduler.params import SamplingParams

MOST_STEPS = 4096  # taken together, at most
T = TypeVar("T")


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
        super().__init__(_JumpingSelector(clock))
        self._virtual = clock
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Virtual seconds by now."""
        return self._virtual.now_s


def run_virtual(task: Coroutine[Any, Any, T], clock: VirtualClock) -> T:
    """Run `task` to its end in virtual time, and return its result."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(clock)) as runner:
        return runner.run(task)


class SimulatedServer:
    """A simulated engine, and the connections to it."""

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

    async def connect(self, _: str = "") -> LoadClient:
        """Open a connection."""
        return SimulatedClient(self)

    async def run(self) -> None:
        """Take requests and steps, until cancelled. A request that comes within a step waits for the step's end, as
        it does in the core."""
        while True:
            self._take()
            if not self.core.has_work():
                await self._arrived.wait()
                self._arrived.clear()
                continue
            seconds = self.core.steady_s(self._most_steps)
            deltas = await self._one_step() if len(seconds) < 2 else await self._steps(np.cumsum(seconds))
            for delta in deltas:
                ended = delta.finish is not None
                stream = self._streams.pop(delta.request_id) if ended else self._streams[delta.request_id]
                stream.put_nowait(delta)
                if ended:
                    self.ends.append(msgspec.structs.replace(self.totals))

    def send(self, prompt_token_ids: list[int], sampling: SamplingParams) -> asyncio.Queue[TokenDelta]:
        """Send a request; its output will appear in the queue that is returned."""
        self._sent += 1
        stream = self._streams[self._sent] = asyncio.Queue()
        self._arrivals.append(Submit(request_id=self._sent, prompt_token_ids=prompt_token_ids, sampling=sampling))
        self._arrived.set()
        return stream

    def _take(self) -> None:
        for submit in self._arrivals:
            self.core.submit(submit)
        self._arrivals.clear()
        self._arrived.clear()

    async def _one_step(self) -> list[TokenDelta]:
        """Take one step. The core has let its time pass at once; the clock is set back, and the loop waits for the
        step's end, so that the other tasks see time pass too."""
        begin_s = self.clock.now_s
        deltas = self.core.step_plain()
        end_s, self.clock.now_s = self.clock.now_s, begin_s
        await asyncio.sleep(end_s - begin_s)
        return deltas

    async def _steps(self, ends_s: np.ndarray[Any, Any]) -> list[TokenDelta]:
        """Take the coming steps together, or those of them that have begun when a request comes."""
        begin_s = self.clock.now_s
        try:
            async with asyncio.timeout(float(ends_s[-1])):
                await self._arrived.wait()
            begun = int(np.searchsorted(ends_s, self.clock.now_s - begin_s, side="right")) + 1
        except TimeoutError:
            begun = len(ends_s)
        begun = min(begun, len(ends_s))
        await asyncio.sleep(begin_s + float(ends_s[begun - 1]) - self.clock.now_s)
        now_s, self.clock.now_s = self.clock.now_s, begin_s
        deltas = self.core.advance(begun)
        self.clock.now_s = now_s
        return deltas


class SimulatedClient:
    """A connection to a `SimulatedServer`: a `LoadClient`."""

    def __init__(self, server: SimulatedServer) -> None:
        self._server = server

    async def generate(self, **request: Any) -> AsyncIterator[Delta]:
        """Stream one answer; raises what the server would answer instead."""
        sampling = {name: value for name, value in request.items() if name in SamplingParams.__struct_fields__}
        stream = self._server.send(request["token_ids"], SamplingParams(**sampling))
        while True:
            delta = await stream.get()
            if delta.token_ids:
                yield Delta(stream=0, sample=delta.sample, token_ids=delta.token_ids)
            if delta.finish is not None:
                if delta.finish.reason not in ("stop", "length"):
                    raise _error(delta.finish.message or delta.finish.reason)
                return

    async def model_info(self) -> Any:
        """The server itself, which has what is asked for."""
        return self._server

    async def close(self) -> None:
        """Do nothing: there is nothing to let go of."""


def run_simulated_load(server: SimulatedServer, settings: LoadSettings) -> LoadResult:
    """Run one load in virtual time. Raises ConfigError for settings that contradict each other."""

    async def load() -> LoadResult:
        engine = asyncio.create_task(server.run())
        try:
            return await run_load(settings, server.connect, server.clock)
        finally:
            engine.cancel()

    return run_virtual(load(), server.clock)


def _error(message: str) -> CierzoError:
    """The error that the front end would send for a failed request; the words before the first colon may be its
    code."""
    code, _, rest = message.partition(": ")
    kind = BY_CODE.get(code, CoreFailed)
    return kind(rest or message)
