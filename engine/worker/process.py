"""The core process: a plain loop around `EngineCore`, between the front end's commands and its own steps."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from cierzo.engine.config import EngineConfig
from cierzo.engine.errors import CierzoError, CoreFailed
from cierzo.engine.log_lines import plain_lines
from cierzo.engine.messages import (
    Abort,
    CoreError,
    CoreStats,
    Pixels,
    Ready,
    Shutdown,
    StepOutput,
    Submit,
    TokenDelta,
    Vocabulary,
)
from cierzo.engine.server_process import prepare_memory
from cierzo.engine.signs import SignsPage
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.pipe import CorePipe, PipeClosed
from cierzo.engine.worker.recorder import Readings, Recorder
from cierzo.scheduler.plan import StepPlan

log = logging.getLogger(__name__)

STATS_INTERVAL_S = 0.1
DELTAS_PER_FRAME = 8192
MAX_COMMANDS = 256  # of a turn: the rest waits for the next one
LAST_WORDS_S = 5.0
HANGUP_POLL_MS = 200


class CoreLoop:
    """Drain commands, step, publish; until the front end goes away or says Shutdown.

    While the front end does not read, deltas gather here and the steps go on. What gathers is bounded by what runs:
    every delta belongs to a request that the front end itself has sent and counts.
    """

    def __init__(
        self,
        core: EngineCore,
        pipe: CorePipe,
        clock: Callable[[], float] = time.monotonic,
        *,
        signs: SignsPage | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """signs: where the loop shows that it lives; recorder: what keeps its commands and steps."""
        self._core = core
        self._pipe = pipe
        self._signs = signs or SignsPage.unread()
        self._recorder = recorder
        core.observe = self._begin_step
        self._clock = clock
        self._unsent: list[TokenDelta] = []
        self._next_stats_s = clock()
        self._stats_are_old = True

    def run(self) -> None:
        """Turn after turn, until Shutdown or the end of the socket."""
        with contextlib.suppress(PipeClosed):
            while self.turn():
                pass

    def turn(self) -> bool:
        """Take one turn; False after Shutdown. Raises PipeClosed. Waits only while there is nothing to compute."""
        core, pipe = self._core, self._pipe
        if not core.has_work():
            self._wait()
        self._signs.begin()
        for command in pipe.receive(MAX_COMMANDS):
            if self._recorder is not None:
                self._recorder.command(command)
            match command:
                case Vocabulary():
                    core.vocabulary(command)
                case Submit():
                    core.submit(command)
                case Abort():
                    core.abort(command)
                case Pixels():
                    core.pixels(command)
                case Shutdown():
                    return False
            self._stats_are_old = True
        if core.has_work():
            deltas = core.step()
            self._stats_are_old = True
        else:
            deltas = core.take_deltas()  # of aborts
        if self._recorder is not None:
            self._recorder.results(deltas)
        self._unsent += deltas
        self._publish()
        self._signs.end()
        return True

    def _begin_step(self, plan: StepPlan) -> None:
        """A step is planned, and about to be launched."""
        self._signs.predict(self._core.predicted_s)
        if self._recorder is not None:
            self._recorder.step(plan)

    def _wait(self) -> None:
        """Wait until a command comes, or the socket takes more of what is kept. Checks an idle core."""
        if self._pipe.backlog_bytes:
            self._pipe.wait(None)
        elif (soon_s := self._next_stats_s - self._clock()) > 0:
            self._pipe.wait(soon_s)
        elif not self._stats_are_old:
            self._core.check()
            self._pipe.wait(None)

    def _publish(self) -> None:
        """Send one frame with all there is; none while an earlier one is still on its way out."""
        pipe = self._pipe
        pipe.flush()
        while not pipe.backlog_bytes:
            stats = self._stats()
            if not self._unsent and stats is None:
                return
            pipe.send(StepOutput(deltas=self._unsent[:DELTAS_PER_FRAME], stats=stats))
            self._unsent = self._unsent[DELTAS_PER_FRAME:]

    def _stats(self) -> CoreStats | None:
        """Figures for the next frame, if they have changed and are due; when the work ends they are due at once, so
        that whoever has the last answer reads gauges that know it."""
        now = self._clock()
        if not self._stats_are_old or (now < self._next_stats_s and self._core.has_work()):
            return None
        self._next_stats_s = now + STATS_INTERVAL_S
        self._stats_are_old = False
        return self._core.stats()


def run(socket_path: str) -> int:
    """Connect, read the configuration, load, say Ready, loop. The exit status: 1 if the core could not go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the front end, which then ends this process
    signs, recorder = SignsPage.beside(socket_path), None  # the folder goes as soon as we are connected
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(socket_path)
    pipe = CorePipe(connection)
    try:
        config = _read_config(pipe)
        plain_lines(config.frontend.log_format)
        readings = Readings() if config.flight_folder else None
        with _ends_with_front_end(connection):
            core = EngineCore(config, clock=readings or time.monotonic)
        if readings is not None:
            recorder = Recorder(config, core, readings)
        prepare_memory()
        signs.start_beating()
        pipe.send(Ready(startup=core.describe_runner()))
        CoreLoop(core, pipe, signs=signs, recorder=recorder).run()
        _close(recorder)
    except PipeClosed:
        _close(recorder)
        return 0
    except Exception as error:
        told = _reason(error)
        if recorder is not None:
            recorder.failed(told.message)
        _last_words(pipe, told)
        return 1
    finally:
        pipe.close()
    return 0


def _close(recorder: Recorder | None) -> None:
    if recorder is not None:
        recorder.close()


def _reason(error: Exception) -> CoreError:
    """Say what the core died of; with a trace in the log, unless the error is of a known kind."""
    if isinstance(error, CierzoError):
        return CoreError(code=error.code, message=error.message)
    if isinstance(error, MemoryError):
        return CoreError(code=CoreFailed.code, message=f"out of memory: {error}")
    log.exception("the core cannot go on")
    return CoreError(code=CoreFailed.code, message=f"{type(error).__name__}: {error}")


def _read_config(pipe: CorePipe) -> EngineConfig:
    """The first frame; whatever follows it stays in the pipe."""
    while (body := pipe.receive_frame()) is None:
        pipe.wait(None)
    return msgspec.msgpack.decode(body, type=EngineConfig)


@contextmanager
def _ends_with_front_end(connection: socket.socket) -> Iterator[None]:
    """End the process, by a thread that watches, if the front end goes while a checkpoint loads."""
    poll, loaded = select.poll(), threading.Event()
    poll.register(connection, getattr(select, "POLLRDHUP", select.POLLHUP))

    def watch() -> None:
        while not loaded.is_set():
            if poll.poll(HANGUP_POLL_MS) and not loaded.is_set():
                os._exit(1)

    threading.Thread(target=watch, name="front-end-watch", daemon=True).start()
    try:
        yield
    finally:
        loaded.set()


def _last_words(pipe: CorePipe, error: CoreError) -> None:
    """Tell the front end why, if it listens; what was kept goes first."""
    with contextlib.suppress(PipeClosed):
        _drain(pipe)
        if not pipe.backlog_bytes:
            pipe.send(error)
            _drain(pipe)


def _drain(pipe: CorePipe) -> None:
    """Send until what was kept has gone out, or nothing has moved for a while."""
    backlog_bytes = -1
    while pipe.backlog_bytes not in (0, backlog_bytes):
        backlog_bytes = pipe.backlog_bytes
        pipe.wait_writable(LAST_WORDS_S)
        pipe.flush()
