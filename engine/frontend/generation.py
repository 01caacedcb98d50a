"""A client's generation: what has come of it and was not taken yet, and the iterator that a caller holds."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections import deque
from collections.abc import Callable
from typing import Protocol, Self

from cierzo.engine.errors import CierzoError, ConnectionLost, InvalidRequest, NotFound, ProtocolError
from cierzo.engine.frontend.answer import Answer, Answers
from cierzo.engine.frontend.bounds import timeout
from cierzo.engine.frontend.retries import is_refusal
from cierzo.engine.messages import ACCEPTANCE, Accepted, Delta, Final, Generate, Resume


class Link(Protocol):
    """The connection that a generation runs on."""

    loop: asyncio.AbstractEventLoop
    features: frozenset[str]

    def cancel(self, inbox: Inbox) -> None:
        """Ask the server to end it."""

    def consumed(self, inbox: Inbox, cost: int) -> None:
        """Deltas that cost so much have left the inbox for good."""

    def settle(self, inbox: Inbox) -> None:
        """Account for the consumed deltas of which the connection was not told yet."""


class Owner(Protocol):
    """The owner of a client's connections, who may have a generation go on on another one."""

    def recovers(self, inbox: Inbox, error: CierzoError) -> bool:
        """Whether the generation goes on in spite of this error."""

    def withdrawn(self, inbox: Inbox) -> None:
        """Nobody wants it any more: it may be on no connection."""


class Inbox:
    """Messages that have come for one generation and were not taken yet, over all connections that it had.

    stream: its id on the present connection, which has sent deltas that cost `held` and are not consumed, and those
    that cost `unsettled`, which are, but the connection was not told yet; it is when they are `settles_at`. costs:
    of each of `deltas`.
    request: what asked for it; None once the server has accepted it, for a prompt may be long, unless it is to be
    kept (`keeps`) to go on at another server, as are the `tokens` that came of its only sample.
    has_run: a server has accepted it, or something came of it; is_running: the present one has. uncertain: a
    connection that it was sent on was lost, and none has accepted it since.
    until_s: its deadline by the loop's clock. tries: refusals, `tried` at which endpoints. timer: what happens
    when it has waited for long enough for a connection, or for another attempt. interruption: of the server before.
    received: tokens of each sample that were taken, last: the last delta of each that was; empty where the
    generation ends with its connection.
    prompt_received: entries of the prompt's log-probabilities that were taken.
    reopened: the present connection is not the one that it began on.
    """

    __slots__ = (
        *("accepted", "accepting", "began_s", "cancelled", "costs", "deltas", "dropped", "error", "final"),
        *("has_own_key", "has_run", "held", "interruption", "is_running", "keeps", "last", "link", "owner"),
        *("prompt_received", "received", "reopened", "request", "settles_at", "stream", "timer", "tokens"),
        *("tried", "tries", "uncertain", "unsettled", "until_s", "waiters", "was_sent"),
    )

    def __init__(
        self, link: Link, request: Generate | Resume, received: list[int], owner: Owner | None = None
    ) -> None:
        self.link = link
        self.owner = owner
        self.keeps = self.has_own_key = False
        self.has_run = self.is_running = self.uncertain = self.was_sent = False
        self.interruption: CierzoError | None = None
        self.began_s = link.loop.time()
        self.tokens: list[int] = []
        self.tries = 0
        self.tried: tuple[object, ...] = ()
        self.until_s: float | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.stream = -1
        self.held = 0
        self.unsettled = self.settles_at = 0
        self.request: Generate | Resume | None = request
        self.received = received
        self.last: list[Delta | None] = [None] * len(received)
        self.prompt_received = request.prompt_received if isinstance(request, Resume) else 0
        self.reopened = False
        self.deltas: deque[Delta] = deque()
        self.costs: deque[int] = deque()
        self.accepted: Accepted | None = None
        self.final: Final | None = None
        self.error: CierzoError | None = None
        self.waiters: list[asyncio.Future[bool]] = []  # for a delta. True: there is news; False: the time is over
        self.accepting: list[asyncio.Future[bool]] = []  # as `waiters`, for the server to accept the request
        self.cancelled = False
        self.dropped = False

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.final is not None or self.error is not None

    @property
    def is_scored(self) -> bool:
        """Whether its server tells log-probabilities of the prompt, if they are wanted: one to which it moved does
        not, as all had come before."""
        return not isinstance(self.request, Generate) or self.request.sampling.prompt_logprobs is not None

    @property
    def failure(self) -> CierzoError | None:
        """The error, to be raised: one that ends a connection is raised by all its generations, and would otherwise
        keep what each of them was doing."""
        return None if self.error is None else self.error.with_traceback(None)

    def add(self, delta: Delta, cost: int) -> None:
        """Take in a delta of this cost, which is `held`, and wake those who wait for one."""
        self.deltas.append(delta)
        self.costs.append(cost)
        self.has_run = self.is_running = True
        if self.keeps:
            self.tokens += delta.token_ids
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(True)

    def put(self, message: Accepted | Final | CierzoError) -> None:
        """Take in other news, and wake those who wait for it."""
        woken = self.accepting
        if isinstance(message, Accepted):
            self.accepted, self.uncertain = message, False
            self.has_run = self.is_running = True
            if not self.keeps:
                self.request = None
        elif isinstance(message, Final):
            self.final = message
        elif self.owner is not None and self.owner.recovers(self, message):
            return
        else:
            self.error = self._told(message)
        if self.ended:
            self.request, self.owner = None, None
            self.unset_timer()
            woken = woken + self.waiters
        for waiter in woken:
            _settle(waiter, True)

    def _told(self, error: CierzoError) -> CierzoError:
        """The error as the caller gets it: one that ends a connection is others' too, of which each has its own."""
        if self.reopened and self.accepted is not None and isinstance(error, NotFound | InvalidRequest):
            what = f"the connection was lost, and the server knows no more of it: {error}; it may have run"
            error = ConnectionLost(what)
        elif self.interruption is not None and self.accepted is None and isinstance(error, InvalidRequest):
            error = copy.copy(self.interruption)  # of an answer that was complete but for its last record
        else:
            error = copy.copy(error)
        error.may_have_run = self.has_run or (self.was_sent and not self.is_refused(error))
        return error

    def is_refused(self, error: CierzoError) -> bool:
        """Whether this error says that its server does not work on it."""
        is_refused = is_refusal(error, tells_acceptance=_tells_acceptance(self.link))
        return is_refused and not self.is_running and not self.uncertain

    def sent(self, is_resumed: bool) -> None:
        """Note that it is on a connection now."""
        self.was_sent = True
        self.has_run |= is_resumed
        self.unset_timer()

    def unset_timer(self) -> None:
        """Nothing happens to it any more while it waits."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def rewind(self) -> None:
        """The connection is lost: what was not taken will come again, but for what another server had told before
        it moved here."""
        known, kept = 0, []
        if self.interruption is not None and isinstance(self.request, Generate):
            place, known = self.received[0], len(self.request.output_token_ids)
            for delta in self.deltas:
                place += len(delta.token_ids)
                if place > known or (delta.prompt_logprobs and self.is_scored):
                    break
                kept.append(delta)
        self.deltas.clear()
        self.costs.clear()
        self.deltas.extend(kept)
        self.costs.extend([0] * len(kept))
        self.held = self.unsettled = 0
        if self.keeps:
            del self.tokens[max(known, self.received[0]) :]
        self.reopened = True

    def move(self, request: Generate, interruption: CierzoError) -> None:
        """Have it go on at another server, from what came, by this request: its own has ended it unfinished."""
        self.link.consumed(self, self.held)  # no connection waits for what is left to be taken
        self.link.settle(self)
        self.held = self.unsettled = 0
        self.request, self.accepted, self.interruption = request, None, interruption
        self.reopened = self.is_running = False

    def take(self) -> Delta:
        """The next delta, which counts as received; whoever takes it says `consumed` once it is done with it."""
        delta = self.deltas.popleft()
        if delta.prompt_logprobs:
            self.prompt_received += len(delta.prompt_logprobs)
        elif self.received and delta.sample < len(self.received):
            self.received[delta.sample] += len(delta.token_ids)
            self.last[delta.sample] = delta
        return delta

    def consume(self) -> Delta:
        """The next delta, with which its taker is done at once."""
        delta = self.take() if self.received else self.deltas.popleft()
        cost = min(self.costs.popleft(), self.held)  # less where a batch of an earlier connection was given back
        self.held -= cost
        self.unsettled += cost
        if self.unsettled >= self.settles_at:
            self.link.settle(self)
        return delta

    def repeats(self, delta: Delta) -> bool:
        """Whether a resumed stream's delta was taken before: text without a token, which no offset counts."""
        last = self.last[delta.sample] if delta.sample < len(self.last) else None
        if last is None or last.token_ids or delta.token_ids:
            return False
        return last.text == delta.text and last.parts == delta.parts

    async def until(
        self, is_there: Callable[[], object], timeout_s: float | None, waiters: list[asyncio.Future[bool]]
    ) -> None:
        """Wait, among those who are woken for it, until `is_there`, or the generation has ended. Raises
        TimeoutError."""
        loop = self.link.loop
        limit_s = timeout(timeout_s)
        until_s = None if limit_s is None else loop.time() + limit_s
        while not is_there() and self.final is None and self.error is None:
            waiter = loop.create_future()
            waiters.append(waiter)
            timer = None if until_s is None else loop.call_at(until_s, _settle, waiter, False)
            try:
                if not await waiter:
                    raise TimeoutError(f"nothing came for {timeout_s:g} s; the generation goes on")
            except asyncio.CancelledError:
                self.cancel()
                raise
            finally:
                waiters.remove(waiter)
                if timer is not None:
                    timer.cancel()

    def cancel(self) -> None:
        """Ask the server to stop, once."""
        if not self.ended and not self.cancelled:
            self.cancelled = True
            self.link.cancel(self)
            if self.owner is not None:
                self.owner.withdrawn(self)

    def drop(self) -> None:
        """Nobody reads this generation any more."""
        self.dropped = True
        self.deltas.clear()
        self.costs.clear()
        self.cancel()
        self.link.consumed(self, self.held)


def _tells_acceptance(link: Link) -> bool:
    """Whether its server says when it accepts a request."""
    return not link.features.isdisjoint(("resume", ACCEPTANCE))


def _settle(waiter: asyncio.Future[bool], has_news: bool) -> None:
    if not waiter.done():
        waiter.set_result(has_news)


class Generation:
    """A request under way: iterate over its Deltas. `final` is the last record, set when the iteration has ended.

    Dropping it (leaving the loop early) cancels the request; so does cancelling the task that waits in it, which is
    what `asyncio.wait_for` does. To wait for a limited time and go on afterwards, use `timeout_s`:

        while (delta := await generation.next(timeout_s=5.0)) is not None:  # TimeoutError: nothing came for 5 s
            print(delta.text, end="")

    Several iterators of one Generation share it: each delta goes to one of them, and all of them end.
    """

    __slots__ = ("_answers", "_inbox")

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._answers = Answers(joins="parts" in inbox.link.features)

    @property
    def final(self) -> Final:
        """Usage, timings, seed, and how each sample ended. Raises RuntimeError while the generation still runs, and
        the error of one that failed."""
        if (error := self._inbox.failure) is not None:
            raise error
        if self._inbox.final is None:
            raise RuntimeError("the generation has not ended")
        return self._inbox.final

    def answer(self, sample: int = 0) -> Answer:
        """Give what was taken of a sample so far: its text, thoughts and calls, and, once the iteration has ended,
        the turn with which the conversation goes on. Of a resumed one, what came behind the tokens received.

        Raises InvalidRequest for an answer that came in deltas on a connection without the feature "parts".
        """
        return self._answers.of(sample, self._inbox.final)

    @property
    def request_id(self) -> str | None:
        """The server's name for the request, to resume or cancel it by; None until it is accepted."""
        return None if self._inbox.accepted is None else self._inbox.accepted.request_id

    @property
    def seed(self) -> int | None:
        """The seed that repeats the generation; None until it is accepted."""
        return None if self._inbox.accepted is None else self._inbox.accepted.seed

    @property
    def queue_position(self) -> int | None:
        """Requests before this one that had no token when it was accepted; None until then."""
        return None if self._inbox.accepted is None else self._inbox.accepted.queue_position

    async def accepted(self, timeout_s: float | None = None) -> Accepted:
        """Wait until the server has accepted the request.

        Raises its refusal, TimeoutError if neither comes in time (the request goes on), and InvalidRequest where
        the server does not have the feature "resume", with which it would say so.
        """
        inbox = self._inbox
        if inbox.accepted is None and not _tells_acceptance(inbox.link) and not inbox.ended:
            raise InvalidRequest(
                "the server does not say when it accepts a request: it has not granted the feature resume",
                field="features",
                limit="resume",
            )
        await inbox.until(lambda: inbox.accepted, timeout_s, inbox.accepting)
        if inbox.accepted is not None:
            return inbox.accepted
        raise inbox.failure or ProtocolError(
            "the request has ended, and the server did not say that it was accepted"
        )

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        inbox = self._inbox
        while not inbox.deltas:  # as `until`, whose own coroutine each token would pay for
            if inbox.final is not None or inbox.error is not None:
                raise inbox.failure or StopAsyncIteration
            inbox.waiters.append(waiter := inbox.link.loop.create_future())
            try:
                await waiter
            except asyncio.CancelledError:
                inbox.cancel()
                raise
            finally:
                inbox.waiters.remove(waiter)
        delta = inbox.consume()
        if self._answers.joins:
            self._answers.add(delta)
        return delta

    async def next(self, timeout_s: float | None = None) -> Delta | None:
        """The next delta; None at the end. Raises TimeoutError if none comes in time: the generation goes on, and
        nothing of it is lost."""
        return await self.__anext__() if await self._more(timeout_s) else None

    async def next_batch(self, timeout_s: float | None = None) -> list[Delta]:
        """All deltas that have come and were not taken, at least one; none at the end. `timeout_s` as in `next`."""
        deltas, cost = await self.take_batch(timeout_s)
        self.used(cost)
        if self._answers.joins:
            for delta in deltas:
                self._answers.add(delta)
        return deltas

    async def take_batch(self, timeout_s: float | None = None) -> tuple[list[Delta], int]:
        """As `next_batch`, for who handles deltas elsewhere, such as in another thread: they come with their cost,
        and until `consumed` is told so much, the server sends no more than it would if they still waited here.
        `answer` does not have them."""
        inbox = self._inbox
        await self._more(timeout_s)
        cost = sum(inbox.costs)
        inbox.costs.clear()
        return [inbox.take() for _ in range(len(inbox.deltas))], cost

    def consumed(self, cost: int) -> None:
        """Say of deltas that `take_batch` gave, in parts or all, that they are dealt with: for this cost the server
        may send others. Any thread may call."""
        link = self._inbox.link
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the connection with it
            link.loop.call_soon_threadsafe(link.consumed, self._inbox, cost)

    def used(self, cost: int) -> None:
        """As `consumed`, for who is on the loop of the connection."""
        self._inbox.link.consumed(self._inbox, cost)

    def cancel(self) -> None:
        """Ask the server to stop. What it had sent still comes, then `final` says "cancelled"."""
        self._inbox.cancel()

    def __del__(self) -> None:
        if self._inbox.held or not self._inbox.ended:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the connection with it
                self._inbox.link.loop.call_soon_threadsafe(self._inbox.drop)

    async def _more(self, timeout_s: float | None) -> bool:
        """Wait until there is a delta to take (True), or the generation has ended well. Raises its error."""
        inbox = self._inbox
        if not inbox.deltas:
            await inbox.until(inbox.deltas.__len__, timeout_s, inbox.waiters)
            if not inbox.deltas and (error := inbox.failure) is not None:
                raise error
        return bool(inbox.deltas)
