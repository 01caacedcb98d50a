"""The link to a simulated core process: the real `EngineCore`, whose steps take virtual time, and its deaths.

Commands and steps are encoded and decoded on the way, so that neither side sees the other's lists change.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import msgspec

from cierzo.engine.config import EngineConfig
from cierzo.engine.errors import CoreFailed
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.pixel_queue import PixelQueue
from cierzo.engine.messages import Abort, CoreCommand, Pixels, StepOutput, Submit, TokenDelta, Vocabulary
from cierzo.engine.worker import grammars
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import FakeRunner

POISON = 1  # a core dies of a prompt that begins with it
COMMANDS_PER_TURN = 256
SOCKET_S = 0.0002
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(CoreCommand).decode
_decode_step = msgspec.msgpack.Decoder(StepOutput).decode


@contextmanager
def patience() -> Iterator[None]:
    """Have no core give up a mask, or a token that takes long, by a clock that is not the world's."""
    names = ("MASK_WAIT_S", "FOLLOWING_S", "FOLLOWED_WITHIN_S")
    before = {name: getattr(grammars, name) for name in names}
    vars(grammars).update(dict.fromkeys(names, 60.0))
    try:
        yield
    finally:
        vars(grammars).update(before)


def new_core(config: EngineConfig, clock: Callable[[], float], vocabulary: Vocabulary | None = None) -> EngineCore:
    """A core whose tokens depend on every token that it reads. vocabulary: what its grammars are about."""
    runner = FakeRunner(
        vocab_size=config.model.vocab_size,
        num_blocks=config.cache.num_blocks,
        block_tokens=config.cache.block_tokens,
        max_running=config.scheduler.max_running,
        reads="context",
        image_stages=config.scheduler.image_stages,
    )
    core = EngineCore(config, runner, clock)
    if vocabulary is not None:
        core.vocabulary(vocabulary)
    return core


def await_grammars(core: EngineCore) -> None:
    """Wait until threads have made what was asked for: how long that takes is not the world's."""
    makers, held = core._makers, {request.key for request in core._scheduler.requests() if request.is_held}
    while not held <= {key for making in [*makers._made] for key in making.keys}:
        time.sleep(0.0001)


class Line:
    """One direction of a socket: what is sent is done in order, also what arrives at the same moment, for which a
    loop's timers keep none."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: deque[Callable[[], None]] = deque()
        self._last_s = 0.0

    def put(self, at_s: float, arrive: Callable[[], None]) -> None:
        """Have `arrive` called at a time, or when all that was sent before has arrived, if that is later."""
        self._last_s = max(self._last_s, at_s)
        self._due.append(arrive)
        self._loop.call_at(self._last_s, lambda: self._due.popleft()())


class Life:
    """One core process."""

    def __init__(self, config: EngineConfig, clock: Callable[[], float], vocabulary: Vocabulary | None) -> None:
        self.core = new_core(config, clock, vocabulary)
        self.inbox: deque[CoreCommand] = deque()
        self.news = asyncio.Event()
        self.is_alive = True
        self.committed = False
        self.stalled_until_s = 0.0
        self.commands, self.steps = Line(), Line()
        self.pixels = PixelQueue()


class SimulatedLink:
    """Stands for `CoreLink`. `die`, `stall` and `fail` are what a seed does to it."""

    def __init__(
        self,
        rng: random.Random,
        config: EngineConfig,
        limits: FrontendConfig,
        clock: Callable[[], float],
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._rng = rng
        self._config = config
        self._limits = limits
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._events: Any = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.step_s = rng.choice((0.001, 0.004, 0.02))
        self.life: Life | None = None
        self.deaths: list[float] = []
        self.stalls: list[tuple[float, float]] = []  # from, to
        self.has_failed = False
        self.most_commands = 0
        # Of a prompt: runs that a core was sent, and how often it was told to forget one, as for a pause.
        self.submissions: Counter[tuple[int, ...]] = Counter()
        self.withdrawals: Counter[tuple[int, ...]] = Counter()
        self._prompts: dict[int, tuple[int, ...]] = {}  # by the core's ids, of runs from the first sample on
        self._runs: dict[int, tuple[int, ...]] = {}  # the same of all runs
        self.computed: Counter[tuple[int, ...]] = Counter()  # tokens by prompt, as cores told of runs that ended

    def start(self, events: Any) -> None:
        """The first core is up."""
        self._events = events
        self._begin()

    def send(self, command: CoreCommand) -> None:
        """Queue a command; of a request with images the pixels first, as `CoreLink` does."""
        if self.life is not None and self.life.pixels.takes(command):
            self._loop.call_soon(self._send_pixels, self.life)
        else:
            self._send(command)

    def _send_pixels(self, life: Life) -> None:
        for command in life.pixels.turn():
            if life is self.life:
                self._send(command)
        if not life.pixels.is_empty:
            self._loop.call_soon(self._send_pixels, life)

    def _send(self, command: CoreCommand) -> None:
        life, arrived = self.life, _decode(_encode(command))
        if isinstance(arrived, Submit):
            prompt = self._runs[arrived.request_id] = tuple(arrived.prompt_token_ids)
            if arrived.first_sample == 0:
                self._prompts[arrived.request_id] = prompt
                self.submissions[prompt] += 1
        elif isinstance(arrived, Abort) and arrived.request_id in self._prompts:
            self.withdrawals[self._prompts[arrived.request_id]] += 1
        if life is not None and life.is_alive:
            life.commands.put(self._clock() + SOCKET_S, partial(self._arrive, life, arrived))

    @property
    def has_repeated(self) -> bool:
        """Tell whether a core was given a request anew, of which an earlier run may have computed some."""
        return len(set(self._runs.values())) < len(self._runs)

    def die(self) -> None:
        """The process is killed: steps that are in its socket still come, then the end."""
        life = self.life
        if life is None or not life.is_alive or self.has_failed:
            return
        life.is_alive = False
        life.news.set()
        life.steps.put(self._clock(), partial(self._lost, life))

    def stall(self, seconds: float) -> None:
        """The process stops for a while; past the limit it is killed."""
        life = self.life
        if life is None or not life.is_alive or self.has_failed or life.stalled_until_s > self._clock():
            return
        now = self._clock()
        seconds = min(seconds, self._limits.core_hang_s)
        self.stalls.append((now, now + seconds))
        life.stalled_until_s = now + seconds
        if seconds > self._limits.core_stall_s:
            self._loop.call_at(now + self._limits.core_stall_s, self._tell_stalled, life, True)
        ends = self.die if seconds >= self._limits.core_hang_s else lambda: self._tell_stalled(life, False)
        self._loop.call_at(life.stalled_until_s, ends)

    def forgive(self) -> None:
        """Nothing: only `fail` ends all."""

    def fail(self) -> None:
        """It has died too often."""
        if not self.has_failed:
            self.has_failed = True
            if self.life is not None:
                self.life.is_alive = False
                self.life.news.set()
            self._events.failed(CoreFailed("the core process died too often"))

    async def close(self) -> None:
        """End it."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- inside ----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        life = self.life = Life(self._config, self._clock, self._vocabulary)
        self._events.ready()
        task = self._loop.create_task(self._run(life))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._loop.call_exception_handler({"message": "the core", "exception": task.exception()})

    def _arrive(self, life: Life, command: CoreCommand) -> None:
        life.inbox.append(command)
        life.news.set()

    def _tell_stalled(self, life: Life, is_stalled: bool) -> None:
        if life.is_alive and life is self.life:
            self._events.stalled(is_stalled)

    def _lost(self, life: Life) -> None:
        if self.has_failed:
            return
        self.deaths.append(self._clock())
        self._events.lost(life.committed)
        self._loop.call_later(0.01 + self._rng.random() ** 3 * 2.0, self._again)

    def _again(self) -> None:
        if not self.has_failed:
            self._begin()

    async def _run(self, life: Life) -> None:
        core = life.core
        while life.is_alive:
            if not life.inbox and not core.has_work():
                life.news.clear()
                await life.news.wait()
                continue
            if (left_s := life.stalled_until_s - self._clock()) > 0:
                await asyncio.sleep(left_s)
                continue
            if self._take(life):
                self.die()
                return
            await_grammars(core)
            deltas = core.step_plain() if core.has_work() else core.take_deltas()
            core.check()
            await asyncio.sleep(self.step_s * self._rng.random())
            if life.is_alive and life.stalled_until_s <= self._clock():
                self._publish(life, deltas)
            elif life.is_alive:
                await asyncio.sleep(life.stalled_until_s - self._clock())
                if life.is_alive:
                    self._publish(life, deltas)

    def _take(self, life: Life) -> bool:
        """Take commands of a turn; whether the core dies of one."""
        taken = 0
        while life.inbox and taken < COMMANDS_PER_TURN:
            command = life.inbox.popleft()
            taken += 1
            if isinstance(command, Submit):
                if command.prompt_token_ids[0] == POISON:
                    return True
                life.core.submit(command)
            elif isinstance(command, Pixels):
                life.core.pixels(command)
            elif isinstance(command, Abort):
                life.core.abort(command)
        self.most_commands = max(self.most_commands, taken)
        return False

    def _publish(self, life: Life, deltas: list[TokenDelta]) -> None:
        body = _encode(StepOutput(deltas=deltas, stats=life.core.stats()))
        life.committed = True
        life.steps.put(self._clock() + SOCKET_S, partial(self._deliver, body))

    def _deliver(self, body: bytes) -> None:
        if not self.has_failed:
            step = _decode_step(body)
            for delta in step.deltas:
                if delta.finish is not None:
                    self.computed[self._runs[delta.request_id]] += delta.finish.computed_tokens
            self._events.step(step)
