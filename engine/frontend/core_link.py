"""The front end's side of the core process: starts it, speaks with it, starts it again when it dies or hangs.

The link listens on a private Unix socket and hands its path to the new process. Then: our EngineConfig, its Ready
(or CoreError), and from there commands one way, steps the other. When the socket ends, the process is taken for
dead, whatever the reason. From Ready on its signs of life are watched (engine/signs.py, watch.py): a core that
hangs is killed, and that ends its socket too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import msgspec

from cierzo.engine.errors import BY_CODE, CierzoError, CoreFailed
from cierzo.engine.frontend.child import (
    MAX_CHILD_FRAME_BYTES,
    Child,
    Spawn,
    kill,
    private_socket,
    spawn_module,
    wait_for_news,
)
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.flights import Flights
from cierzo.engine.frontend.frames import FrameSplitter, pack
from cierzo.engine.frontend.pixel_queue import PixelQueue
from cierzo.engine.frontend.restarts import Restarts
from cierzo.engine.frontend.watch import LOOK_S, Verdict, Watch, process_state
from cierzo.engine.messages import CoreCommand, CoreError, CoreEvent, Ready, Shutdown, StepOutput, Vocabulary
from cierzo.engine.signs import SignsPage

log = logging.getLogger(__name__)

EXIT_TIMEOUT_S = 0.5  # of a core whose socket has ended
COMMANDS_PER_WRITE = 16  # a core that waits has the first of many while the others are still being read
STOP_TIMEOUT_S = 1.5  # a core in a longer step than this is killed: it has nothing to save
_decode = msgspec.msgpack.Decoder(CoreEvent).decode
spawn_worker = partial(spawn_module, "cierzo.engine.worker")


class CoreEvents(Protocol):
    """Who is told: the front end's `CoreSide`."""

    def ready(self) -> int:
        """Learn that a core takes commands; how many open requests go on in it."""
        ...

    def step(self, step: StepOutput) -> None:
        """Take what the core made in a step."""
        ...

    def stalled(self, is_stalled: bool) -> None:
        """Learn that the core shows no sign of life, or does again."""
        ...

    def lost(self, committed: bool) -> None:
        """Learn that the core has died, and that another one is being started. `committed`: it had ended a step."""
        ...

    def failed(self, error: CierzoError) -> None:
        """Learn that the core has died too often: there will be no other."""
        ...


class _Pipe(asyncio.Protocol):
    """The socket to one core process."""

    def __init__(self, hello: bytes | bytearray, on_step: Callable[[StepOutput], None]) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Ready] = loop.create_future()
        self.lost: asyncio.Future[None] = loop.create_future()
        self.last_error: CierzoError | None = None
        self.committed = False  # a step has ended
        self.transport: asyncio.Transport | None = None
        self._hello = hello
        self._on_step = on_step
        self._splitter = FrameSplitter(MAX_CHILD_FRAME_BYTES)
        self._unsent: list[CoreCommand] = []
        self._pixels = PixelQueue()
        self._is_full = False  # the socket takes nothing for now: pixels wait, and nothing else

    def send(self, command: CoreCommand) -> None:
        """Write a command, together with others of this turn of the loop: a write takes as long as all else that a
        request needs here."""
        if self.lost.done():
            return
        if self._pixels.takes(command):
            asyncio.get_running_loop().call_soon(self._write_pixels)
            return
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(command)
        if len(self._unsent) >= COMMANDS_PER_WRITE:
            self._flush()

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if unsent and self.transport is not None and not self.lost.done():
            self.transport.write(pack(unsent))

    def _write_pixels(self) -> None:
        """Write what of the pixels, and the requests behind them, the socket takes and a turn of the loop may
        have."""
        if self.transport is None or self.lost.done() or self._is_full:
            return
        for command in self._pixels.turn():
            self.transport.write(pack([command]))
            if self._is_full:
                return
        if not self._pixels.is_empty:
            asyncio.get_running_loop().call_soon(self._write_pixels)

    def pause_writing(self) -> None:
        """The socket is full."""
        self._is_full = True

    def resume_writing(self) -> None:
        """The socket takes more."""
        self._is_full = False
        self._write_pixels()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self.transport is not None:  # the path is private, so this is a bug; the first one stays
            cast(asyncio.Transport, transport).abort()
            return
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._hello)

    def data_received(self, data: bytes) -> None:
        for body in self._splitter.feed(data):
            event = _decode(body)
            if isinstance(event, StepOutput):
                self.committed = self.committed or _shows_a_step(event)
                self._on_step(event)
            elif isinstance(event, CoreError):
                self.last_error = BY_CODE.get(event.code, CoreFailed)(event.message)
            elif not self.ready.done():
                self.ready.set_result(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pixels = PixelQueue()  # nobody takes them any more
        if not self.lost.done():
            self.lost.set_result(None)


class CoreLink:
    """Keeps one core process running. `start` it, `send` to it, `close` it."""

    def __init__(
        self,
        config: FrontendConfig,
        engine_config: msgspec.Struct,
        spawn: Spawn = spawn_worker,
        clock: Callable[[], float] = time.monotonic,
        flights: Flights | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """flights: where the records of cores that died are kept. vocabulary: sent to each core behind its
        settings: what it makes of it takes half a second, which is to be over before it takes requests."""
        self._config = config
        self._hello = pack([engine_config, *([] if vocabulary is None else [vocabulary])])
        self._spawn = spawn
        self._clock = clock
        self._flights = flights
        self._restarts = Restarts(config)
        self._signs: SignsPage | None = None
        self._events: CoreEvents | None = None
        self._pipe: _Pipe | None = None
        self._process: Child | None = None
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self, events: CoreEvents) -> str:
        """Start the process and wait until it is ready; its start-up text. `events` hears of all that follows.

        Raises the core's own error (CheckpointError, ...) or CoreFailed: a first start is not tried again.
        """
        self._events = events
        ready = await self._launch()
        events.ready()
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise())
        return ready.startup

    def send(self, command: CoreCommand) -> None:
        """Write a command. To a core that has just died it is lost; `lost` and `ready` then follow."""
        if self._pipe is not None:
            self._pipe.send(command)

    def forgive(self) -> None:
        """The last death was part of a search for the request that kills: it does not count in the window."""
        self._restarts.forgive()

    async def close(self) -> None:
        """End the process: politely, then after a while not."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self.send(Shutdown())
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        await self._reap()

    async def _launch(self) -> Ready:
        """Start a core process and wait for its Ready."""
        assert self._events is not None
        pipe = self._pipe = _Pipe(self._hello, self._events.step)
        try:
            async with private_socket("core", pipe) as path:
                self._signs = SignsPage.create(os.path.dirname(path))
                self._process = await self._spawn(path)
                return await self._first_words(pipe, self._process)
        except BaseException:
            await self._reap()
            raise

    async def _first_words(self, pipe: _Pipe, process: Child) -> Ready:
        limit = self._config.core_start_timeout_s
        has_ended = await wait_for_news(process, {pipe.ready, pipe.lost}, limit)
        if pipe.ready.done():
            return pipe.ready.result()
        if not pipe.lost.done() and not has_ended:
            raise CoreFailed(
                f"the core process was not ready within {limit} s", field="core_start_timeout_s", limit=limit
            )
        if pipe.transport is not None:
            await pipe.lost  # its last words may still be on the way
        ending = _ending(await self._status())
        raise pipe.last_error or CoreFailed(f"the core process {ending}, before it was ready")

    async def _supervise(self) -> None:
        """Start the core again whenever it dies, within the limits."""
        assert self._events is not None
        while True:
            assert self._pipe is not None
            assert self._process is not None
            pipe, pid = self._pipe, self._process.pid
            reason = await self._watch_until_lost(pipe, self._process)
            self._restarts.record(self._clock(), pipe.committed)
            self._events.lost(pipe.committed)
            lost_s = self._clock()
            status = await self._status()
            error: CierzoError = pipe.last_error or CoreFailed(f"the core process {_ending(status)}")
            await self._reap()
            if self._flights is not None:
                await self._flights.keep(pid, reason, error.message)
            while True:
                refusal = self._restarts.refusal(error.message)
                if refusal is not None:
                    log.error("%s", refusal.message)
                    self._events.failed(refusal)
                    return
                delay_s = self._restarts.delay_s
                soon = f"in {delay_s:g} s" if delay_s else "at once"
                log.error("the core is gone: %s; starting it again %s", error.message, soon)
                await asyncio.sleep(delay_s)
                try:
                    await self._launch()
                    break
                except OSError as lack:  # no descriptors, a full disk, no more processes: no core has died
                    error = CoreFailed(f"it cannot start: {lack}")
                    self._restarts.not_started()
                except CierzoError as again:
                    error = again
                    self._restarts.record(self._clock(), committed=False)
            count = self._events.ready()
            what = "request goes" if count == 1 else "requests go"
            log.warning("a new core is ready after %.1f s; %d %s on", self._clock() - lost_s, count, what)

    async def _watch_until_lost(self, pipe: _Pipe, process: Child) -> str:
        """Look at the core's signs of life until its socket ends, and kill it if it hangs: "died" or "hung"."""
        assert self._events is not None
        assert self._signs is not None
        watch, stalled = Watch(self._config, lambda: process_state(process.pid)), False
        while True:
            # unlike `await`, the cancellation of `wait` leaves the future alone
            await asyncio.wait({pipe.lost}, timeout=LOOK_S)
            if pipe.lost.done():
                return "died"
            verdict = watch.look(self._signs.read(), self._clock())
            if (verdict is not Verdict.LIVES) != stalled:
                stalled = not stalled
                log.warning("the core %s", f"is stalled: {watch.reason}" if stalled else "goes on")
                self._events.stalled(stalled)
            if verdict is Verdict.HUNG:
                pipe.last_error = CoreFailed(f"the core process hung: {watch.reason}")
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await asyncio.wait({pipe.lost}, timeout=STOP_TIMEOUT_S)
                return "hung"

    async def _status(self) -> int | None:
        """The exit status of a core whose socket has ended; None if it runs on without."""
        assert self._process is not None
        with contextlib.suppress(TimeoutError):
            # `wait_for` would swallow a cancellation in the very turn in which the process' end is seen
            async with asyncio.timeout(EXIT_TIMEOUT_S):
                return await self._process.wait()
        return None

    async def _reap(self) -> None:
        """No process, no socket and no page is left behind."""
        process, self._process = self._process, None
        if process is not None:
            await kill(process)
        if self._pipe is not None and self._pipe.transport is not None:
            self._pipe.transport.abort()
        if self._signs is not None:
            self._signs.close()
            self._signs = None


def _ending(status: int | None) -> str:
    """How a process ended, by its exit status."""
    if status is None:
        return "closed its socket"
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    why = " (the kernel's out-of-memory killer, if nobody else: see dmesg)" if name == "SIGKILL" else ""
    return f"was killed by {name}{why}"


def _shows_a_step(output: StepOutput) -> bool:
    """Whether a core that says this has ended a step: a token came of one, or a second one has begun."""
    begun = output.stats is not None and output.stats.steps > 1
    return begun or any(delta.token_ids for delta in output.deltas)
