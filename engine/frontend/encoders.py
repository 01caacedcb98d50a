"""The front end's side of the encoder processes: starts them, gives them jobs, and replaces those that die or hang.

A long prompt keeps its process for seconds. So tenants take turns, the shortest job of each goes first, and one
process takes short jobs only; a job gains on shorter ones as it waits, so that none waits for ever. Grammars have a
process of their own, which is killed when one of them takes it too long, and no prompt waits for it. It is started
with the first of them, or by `warm`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import msgspec

from cierzo.engine.errors import CierzoError, InvalidRequest
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
from cierzo.engine.frontend.encoding import COMPILE, Answer, Arriving, Compiled, Encoded, Job, Loaded, Setup
from cierzo.engine.frontend.failures import error_of
from cierzo.engine.frontend.frames import LENGTH_BYTES, Buffer, FrameSplitter, pack
from cierzo.engine.frontend.job_queue import JobQueue
from cierzo.engine.frontend.limits import ByteBudget
from cierzo.engine.frontend.tenants import DEFAULT
from cierzo.engine.frontend.watch import process_state
from cierzo.engine.messages import Detokenized, Failure, Tokenized, Worded

log = logging.getLogger(__name__)

SHORT_BYTES = 256 * 1024  # what the process for short jobs takes
IMAGE_BYTES = 512 * 1024  # an image takes as long as so much text, and the process for short jobs takes none
# Stands in a message that holds its images, and in some text.
_HOLDS_IMAGES = re.compile(rb"[\xa6\x06]images|(?i:data:image/)")
AGEING_BYTES_PER_S = 1024 * 1024.0  # a job that waits a second is as good as one so much shorter
LONGEST_JOB_S = 300.0  # past any deadline that a client may set: a template can run in circles
GRACE_S = 2.0  # for a job past its deadline: about what a new process costs
START_TIMEOUT_S = 60.0
RESTART_WAIT_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)  # before a start, by the number of those in a row that failed
MAX_TRIES = 2  # of a job whose process dies
# A job may take so long, and so many times what it would at the usual rate, before its process is looked at.
PATIENCE_S, SLOWEST = 2.0, 10.0
LOOK_AGAIN_S = 0.2
EXIT_S = 0.5  # until the status of a process is known whose socket has ended
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL)
CRASHED = "the grammar is refused: its compiler crashed at it"
FIRST_BYTES_PER_S = 1e6  # until a rate is measured
Outcome = Encoded | Worded | Compiled
_decode = msgspec.msgpack.Decoder(Answer).decode
spawn_encoder = partial(spawn_module, "cierzo.engine.frontend.encoder_process")


class TooSlow(InvalidRequest):
    """A grammar was not compiled in its time, this time."""


class Late(Exception):
    """The deadline of a request passed before it was encoded."""


class Encoder(Protocol):
    """The part of `Encoders` that the front end uses."""

    budget: ByteBudget

    def submit(
        self,
        job: Job,
        body: Buffer,
        attached: Sequence[Buffer],
        deadline_at_s: float,
        tenant: str = DEFAULT,
        images: Sequence[Sequence[Buffer]] = (),
    ) -> asyncio.Future[Encoded]:
        """Have a request encoded; the future's `submit` has its prompt packed. Cancel it to drop the job.

        Raises Overloaded. The future gives a CierzoError, or Late.
        """
        ...

    def word(self, job: Job, body: Buffer, deadline_at_s: float, tenant: str = DEFAULT) -> asyncio.Future[Worded]:
        """Have a message about words answered; the rest is as in `submit`."""
        ...

    def compile(self, grammar: bytes, deadline_at_s: float, tenant: str = DEFAULT) -> asyncio.Future[Compiled]:
        """Have a grammar compiled; the future gives the InvalidRequest that refuses it, without a field. The rest
        is as in `submit`."""
        ...


class EncoderDied(Exception):
    """The process ended."""


class EncoderHangs(Exception):
    """The process does nothing. `is_stopped`: by a signal, for which no job is to blame."""

    def __init__(self, is_stopped: bool) -> None:
        super().__init__()
        self.is_stopped = is_stopped


@dataclass(slots=True, eq=False)
class _Ticket:
    """A job on its way. `rank`: the lowest of a tenant's goes first. `frames`: the pieces of each; empty once it is
    over. `length_bytes`: of a text that takes as long; `kept_bytes`: what is charged for it."""

    frames: list[list[Buffer]]
    length_bytes: int
    kept_bytes: int
    rank: float
    deadline_at_s: float
    answer: asyncio.Future[Any]
    tenant: str
    compiles: bool = False
    timer: asyncio.TimerHandle | None = None
    tries: int = 0


class _Pipe(asyncio.Protocol):
    """The socket to one process."""

    def __init__(self, setup: bytes | bytearray, on_lost: Callable[[], None]) -> None:
        self.loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_lost = False
        self.transport: asyncio.Transport | None = None
        self._setup = setup
        self._on_lost = on_lost
        self._splitter = FrameSplitter(MAX_CHILD_FRAME_BYTES)
        self._answer: asyncio.Future[Outcome] | None = None
        self._arriving: Arriving | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._setup)

    def data_received(self, data: bytes) -> None:
        for body in self._splitter.feed(data):
            if self._arriving is not None:
                if (whole := self._arriving.take(body)) is not None:
                    self._arriving = None
                    self._say(whole)
                continue
            match _decode(body):
                case Encoded() as encoded:
                    self._arriving = Arriving(encoded)
                case Tokenized() | Detokenized() | Compiled() as answer:
                    self._say(answer)
                case Failure() as refused if self.loaded.done():
                    self._say(error_of(refused))
                case Failure() as refused:
                    self.loaded.set_exception(error_of(refused))
                case Loaded() if not self.loaded.done():
                    self.loaded.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        if not self.loaded.done():
            self.loaded.set_exception(EncoderDied())
            self.loaded.exception()  # when the server ends while it starts, nobody else asks for it
        self._say(EncoderDied())
        self._on_lost()

    async def ask(self, frames: list[list[Buffer]]) -> Outcome:
        """Have a job done. Raises the request's CierzoError, or EncoderDied."""
        if self.is_lost or self.transport is None:
            raise EncoderDied
        self._answer = asyncio.get_running_loop().create_future()
        for pieces in frames:
            self.transport.write(sum(map(len, pieces)).to_bytes(LENGTH_BYTES, "big"))
            for piece in pieces:
                self.transport.write(piece)
        return await self._answer

    def _say(self, answer: Outcome | Exception) -> None:
        future, self._answer = self._answer, None
        if future is not None:
            _set(future, answer)


@dataclass(slots=True, eq=False)
class _Seat:
    """A place for one process at a time. `takes_long`: whether it takes jobs of any length; `compiles`: these are
    grammars."""

    takes_long: bool
    compiles: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)
    process: Child | None = None
    pipe: _Pipe | None = None


class Encoders:
    """A pool of `config.encoders` processes, one more for short jobs, and one for grammars. `start`, `submit`,
    `close`."""

    def __init__(
        self,
        config: FrontendConfig,
        setup: Setup,
        spawn: Spawn = spawn_encoder,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget = ByteBudget(config)
        self._config = config
        self._setups = {
            compiles: pack([msgspec.structs.replace(setup, compiles=compiles)]) for compiles in (False, True)
        }
        self._spawn = spawn
        self._clock = clock
        self._seats = [_Seat(takes_long=True) for _ in range(config.encoders)] + [_Seat(takes_long=False)]
        self._compiling = _Seat(takes_long=True, compiles=True)
        self._waiting, self._grammars = JobQueue[_Ticket](), JobQueue[_Ticket]()
        self._bytes_per_s = FIRST_BYTES_PER_S
        self._keepers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start the processes; jobs may come at once, and wait for them."""
        loop = asyncio.get_running_loop()
        self._keepers = [loop.create_task(self._keep(seat)) for seat in self._seats]

    def warm(self) -> None:
        """Start the process for grammars, unless it is there: the first one would wait for it."""
        if self._compiling not in self._seats:
            self._seats.append(self._compiling)
            self._keepers.append(asyncio.get_running_loop().create_task(self._keep(self._compiling)))

    async def close(self) -> None:
        """End the processes; jobs that are left are cancelled."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for seat in self._seats:
            await _end(seat)  # of which the keeper may have been in the middle
        for ticket in [*self._waiting, *self._grammars]:
            ticket.answer.cancel()
            self._over(ticket)

    def submit(
        self,
        job: Job,
        body: Buffer,
        attached: Sequence[Buffer],
        deadline_at_s: float,
        tenant: str = DEFAULT,
        images: Sequence[Sequence[Buffer]] = (),
    ) -> asyncio.Future[Encoded]:
        """Queue a job. Raises Overloaded."""
        now, loop = self._clock(), asyncio.get_running_loop()
        num_bytes = len(body) + sum(len(piece) for pieces in (attached, *images) for piece in pieces)
        self.budget.take(num_bytes, tenant)
        compiles = job.method == COMPILE
        # How long a grammar takes, its length does not tell; of an image, even a short file.
        # A message that is longer is no short job anyway, and to search it would hold the loop.
        num_images = len(images) or (num_bytes <= SHORT_BYTES and _HOLDS_IMAGES.search(body) is not None)
        length = 1 if compiles else num_bytes + IMAGE_BYTES * num_images
        ticket = _Ticket(
            [
                [msgspec.msgpack.encode(job)],
                [body],
                *([[*attached]] if job.has_attached else []),
                *map(list, images),
            ],
            length,
            num_bytes,
            length + AGEING_BYTES_PER_S * now,
            deadline_at_s,
            loop.create_future(),
            tenant,
            compiles,
        )
        ticket.timer = loop.call_later(max(0.0, deadline_at_s - now), self._late, ticket)
        ticket.answer.add_done_callback(lambda _: self._forget(ticket))
        self._wait(ticket)
        return ticket.answer

    def word(self, job: Job, body: Buffer, deadline_at_s: float, tenant: str = DEFAULT) -> asyncio.Future[Worded]:
        """Queue a job that is about words. Raises Overloaded."""
        return cast("asyncio.Future[Worded]", self.submit(job, body, [], deadline_at_s, tenant))

    def compile(self, grammar: bytes, deadline_at_s: float, tenant: str = DEFAULT) -> asyncio.Future[Compiled]:
        """Queue a grammar. Raises Overloaded."""
        self.warm()
        job = Job(stream=0, features=[], has_attached=False, method=COMPILE)
        return cast("asyncio.Future[Compiled]", self.submit(job, grammar, [], deadline_at_s, tenant))

    # --- jobs ------------------------------------------------------------------------------------------

    def _queue(self, job: _Ticket | _Seat) -> JobQueue[_Ticket]:
        """The jobs of this kind that wait."""
        return self._grammars if job.compiles else self._waiting

    def _wait(self, ticket: _Ticket) -> None:
        self._queue(ticket).add(ticket)
        for seat in self._seats:
            seat.news.set()

    def _forget(self, ticket: _Ticket) -> None:
        """Nobody waits for the answer any more, or it is there."""
        if ticket in self._queue(ticket):
            self._over(ticket)

    def _over(self, ticket: _Ticket) -> None:
        """A job is no longer here, whatever the way: its bytes go. May be called twice."""
        self._queue(ticket).discard(ticket)
        if ticket.timer is not None:
            ticket.timer.cancel()
            ticket.timer = None
            self.budget.give(ticket.kept_bytes, ticket.tenant)
        ticket.frames.clear()

    def _late(self, ticket: _Ticket) -> None:
        """The deadline of a job has passed. If a process works at it, its seat's own timer ends that."""
        if not ticket.answer.done():
            ticket.answer.set_exception(Late())

    def _next(self, seat: _Seat) -> _Ticket | None:
        """Take the job that is due next from the queue."""
        return self._queue(seat).take(math.inf if seat.takes_long else SHORT_BYTES)

    # --- processes -------------------------------------------------------------------------------------

    async def _keep(self, seat: _Seat) -> None:
        """Keep a process in this seat."""
        failures = 0
        while True:
            await asyncio.sleep(RESTART_WAIT_S[min(failures, len(RESTART_WAIT_S) - 1)])
            try:
                pipe = await self._launch(seat)
                failures = 0
                await self._serve(seat, pipe)
            except (EncoderDied, TimeoutError, OSError, CierzoError) as error:
                failures += 1
                log.error("an encoder process could not be started: %r", error)
            finally:
                await _end(seat)

    async def _launch(self, seat: _Seat) -> _Pipe:
        """Start a process, and wait until it takes jobs."""
        pipe = seat.pipe = _Pipe(self._setups[seat.compiles], seat.news.set)
        async with private_socket("encoder", pipe) as path:
            await wait_for_news(await self._fill(seat, path), {pipe.loaded}, START_TIMEOUT_S)
        if not pipe.loaded.done():
            raise EncoderDied
        pipe.loaded.result()
        return pipe

    async def _fill(self, seat: _Seat, path: str) -> Child:
        """Start the process; when the pool closes meanwhile, it is known all the same, and ends."""
        starting = asyncio.ensure_future(self._spawn(path))
        try:
            await asyncio.shield(starting)
        finally:
            seat.process = await starting
        return seat.process

    async def _serve(self, seat: _Seat, pipe: _Pipe) -> None:
        """Give a process its jobs, until it dies or has to be killed."""
        while not pipe.is_lost:
            ticket = self._next(seat)
            if ticket is None:
                seat.news.clear()
                await seat.news.wait()
            elif ticket.answer.done():
                self._over(ticket)
            elif not await self._work(seat, pipe, ticket):
                return

    async def _work(self, seat: _Seat, pipe: _Pipe, ticket: _Ticket) -> bool:
        """Have one job done; False if the process is of no use any more."""
        answer, is_over = ticket.answer, True
        longest_s = self._config.max_grammar_s if ticket.compiles else LONGEST_JOB_S
        limit_s = min(max(ticket.deadline_at_s - self._clock(), GRACE_S), longest_s)
        try:
            async with asyncio.timeout(limit_s):
                encoded = await self._ask(seat, pipe, ticket)
        except CierzoError as error:
            _set(answer, error)
        except TimeoutError:
            log.error("an encoder process is replaced: its job was not done within %.3g s", limit_s)
            _set(answer, _not_done(ticket, limit_s) if limit_s == longest_s else Late())
            return False
        except (EncoderDied, EncoderHangs) as error:
            is_stopped = isinstance(error, EncoderHangs) and error.is_stopped
            ticket.tries += not is_stopped
            if ticket.compiles and await _has_crashed(seat):
                _set(answer, InvalidRequest(CRASHED, limit="less nested", value="crashed"))
            what = "was stopped" if is_stopped else "hung" if isinstance(error, EncoderHangs) else "died"
            log.error("an encoder process %s at a job of %d bytes", what, ticket.kept_bytes)
            if ticket.tries < MAX_TRIES and not answer.done():
                is_over = False
                self._wait(ticket)
            else:
                job = "compiled the grammar" if ticket.compiles else "encoded the prompt"
                _set(answer, CierzoError(f"internal error: the process that {job} {what}"))
            return False
        else:
            _set(answer, encoded)
        finally:
            if is_over:
                self._over(ticket)
                answer.cancel()  # the pool closes, if there is no answer yet
        return True

    async def _ask(self, seat: _Seat, pipe: _Pipe, ticket: _Ticket) -> Outcome:
        """Have a process do a job. One that takes long, and was twice found doing nothing, hangs: EncoderHangs."""
        assert seat.process is not None
        asking, since_s, idle = asyncio.ensure_future(pipe.ask(ticket.frames)), self._clock(), 0
        length = ticket.kept_bytes if ticket.compiles else ticket.length_bytes
        wait_s = PATIENCE_S + SLOWEST * length / self._bytes_per_s
        try:
            while not (await asyncio.wait({asking}, timeout=wait_s))[0]:
                wait_s, state = LOOK_AGAIN_S, process_state(seat.process.pid)
                idle = 0 if state == "R" else idle + 1
                if idle == 2:
                    raise EncoderHangs(is_stopped=state in ("T", "t"))
            encoded = asking.result()
            rate = length / max(self._clock() - since_s, 1e-6)
            if not ticket.compiles:
                self._bytes_per_s += 0.1 * (rate - self._bytes_per_s)
            return encoded
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)


def _not_done(ticket: _Ticket, limit_s: float) -> CierzoError:
    """The error for a job that took too long."""
    if not ticket.compiles:
        return CierzoError(f"internal error: the prompt was not encoded within {limit_s:g} s")
    what = f"the grammar was not compiled within {limit_s:g} s (max_grammar_s)"
    return TooSlow(what, limit=f"{limit_s:g} s", value="longer")


def _set(answer: asyncio.Future[Outcome], outcome: Outcome | Exception) -> None:
    if answer.done():
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


async def _has_crashed(seat: _Seat) -> bool:
    """Whether a process has ended by a fault of its own: a compiler that called itself too often, say."""
    assert seat.process is not None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(EXIT_S):
            return -(await seat.process.wait()) in CRASHES
    return False


async def _end(seat: _Seat) -> None:
    """No process and no socket is left behind."""
    pipe, seat.pipe = seat.pipe, None
    if pipe is not None:
        if pipe.transport is not None:
            pipe.transport.abort()
        if pipe.loaded.done() and not pipe.loaded.cancelled():
            pipe.loaded.exception()  # it was seen, or is of no interest any more
    if seat.process is not None:
        await kill(seat.process)
        seat.process = None
