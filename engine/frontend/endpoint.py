"""The connections of a client to one address, and the requests that wait for one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import msgspec

from cierzo.engine.errors import CierzoError, ConnectionLost, Forbidden, Unauthorized
from cierzo.engine.frontend.client_link import ClientLink
from cierzo.engine.frontend.generation import Inbox
from cierzo.engine.frontend.request_frames import require
from cierzo.engine.frontend.retries import Reconnect
from cierzo.engine.messages import CancelRequest, Generate, Resume

LEAST_S = 1e-3  # of time that is sent as what a deadline leaves
Connect = Callable[[bool], Awaitable[ClientLink]]  # is the server known to us?


class Owner(Protocol):
    """The client that an address belongs to."""

    @property
    def is_awaiting(self) -> bool:
        """Whether something waits for a connection to any address."""

    def park(self, inbox: Inbox) -> None:
        """A generation waits for a connection, no longer than its deadline."""

    def connected(self, endpoint: Endpoint) -> None:
        """There is a connection, for whatever waits for any."""

    def gave_up(self, endpoint: Endpoint, error: CierzoError) -> None:
        """There will be none for now, and this is why."""


class Endpoint:
    """An address. With a `policy`, lost connections are replaced, and what was open on them goes on there:
    accepted requests from the tokens that were taken, others by their idempotency key.

    links: connections in use. last: the one that was made last, which may be lost. waiting: generations for which
    the next connection is made. error: why the last attempt failed, or the last connection was lost.
    """

    def __init__(self, name: str, connect: Connect, policy: Reconnect | None, wanted: int, owner: Owner) -> None:
        self.name = name
        self.links: list[ClientLink] = []
        self.last: ClientLink | None = None
        self.error: CierzoError | None = None
        self.waiting: list[Inbox] = []
        self._connect = connect
        self._policy = policy
        self._wanted = wanted
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._mending: asyncio.Task[CierzoError | None] | None = None
        self._attempts = self._failures = 0
        self._lost_s: float | None = None
        self._rest_until_s = 0.0
        self._is_closed = False

    @property
    def is_resting(self) -> bool:
        """Whether it failed of late, and others are asked first."""
        return self._loop.time() < self._rest_until_s

    @property
    def is_mending(self) -> bool:
        """Whether a connection is being made."""
        return self._mending is not None and not self._mending.done()

    @property
    def may_mend(self) -> bool:
        """Whether a connection that is lost is made again: by whoever needs one next, also after a refusal that
        no repetition would mend, for keys and certificates change."""
        return self._policy is not None

    def start(self) -> asyncio.Task[CierzoError | None]:
        """The task that makes all connections, at the start; it gives the reason if one is missing."""
        self._mending = self._loop.create_task(self._open())
        return self._mending

    def rest(self, hint_s: float = 0.0) -> None:
        """Leave it alone for a while, which grows from failure to failure."""
        if self._policy is None:
            return
        now = self._loop.time()
        quiet_s = now - self._rest_until_s
        self._failures = 1 if quiet_s > self._policy.longest_pause_s else self._failures + 1
        self._rest_until_s = now + max(self._policy.pause_s(self._failures), hint_s)

    def grow(self) -> None:
        """Make a connection that is missing, on the side, unless it rests."""
        if self.may_mend and len(self.links) < self._wanted and not self.is_mending and not self.is_resting:
            self.mend()

    def mend(self) -> asyncio.Task[CierzoError | None]:
        """The task that makes a connection; it gives the reason if there is none to be had."""
        if self._mending is None or self._mending.done():
            assert self._policy is not None
            self._mending = self._loop.create_task(self._reconnect(self._policy))
        return self._mending

    async def close(self, reason: CierzoError) -> None:
        """Cancel what still runs, and close the connections."""
        self._is_closed = True
        self._end_waiting(reason)
        if self._mending is not None and self.is_mending:
            self._mending.cancel()
            await asyncio.wait([self._mending])
        links = self.links or ([] if self.last is None else [self.last])
        for link in links:
            link.cancel_all()
            link.close(reason)
        for closed in [link.closed for link in links]:
            await asyncio.shield(closed)

    def reopen(self, inbox: Inbox, link: ClientLink) -> None:
        """Open a generation, on another connection than before if there was one; nothing if nobody wants it."""
        request = _again(inbox) if inbox.reopened else inbox.request
        if inbox.dropped or request is None:
            if inbox.accepted is not None and "resume" in link.features:
                link.tell(CancelRequest, request_id=inbox.accepted.request_id)
            return
        try:
            if isinstance(request, Resume) or request.idempotency_key is not None:
                require(link.welcome, "resume", "going on after a lost connection")
            link.open(inbox, self._timely(inbox, request))
        except CierzoError as error:
            inbox.put(error)
            return
        if inbox.cancelled:
            link.cancel(inbox)

    def _timely(self, inbox: Inbox, request: Generate | Resume) -> Generate | Resume:
        """The request, with the time that its deadline leaves."""
        if inbox.until_s is None or isinstance(request, Resume):
            return request
        return msgspec.structs.replace(request, deadline_s=max(inbox.until_s - self._loop.time(), LEAST_S))

    async def _open(self) -> CierzoError | None:
        made = await asyncio.gather(*(self._connect(False) for _ in range(self._wanted)), return_exceptions=True)
        for link in made:
            if isinstance(link, ClientLink) and link.error is None:
                self._adopt(link)
        for error in (link.error if isinstance(link, ClientLink) else link for link in made):
            if isinstance(error, CierzoError):
                self.error = error
                self.rest()
            elif isinstance(error, BaseException):
                raise error
        return self.error

    def _adopt(self, link: ClientLink) -> None:
        """Use a new connection, for what waits for one first."""
        link.on_lost, self.last, self.error = partial(self._lost, link), link, None
        self.links.append(link)
        waiting, self.waiting = self.waiting, []
        for inbox in waiting:
            self.reopen(inbox, link)
        self._owner.connected(self)

    def _lost(self, link: ClientLink, inboxes: list[Inbox], error: CierzoError) -> list[Inbox]:
        """Keep the generations that can go on on another connection; the others are given back, to fail."""
        if link in self.links:  # else it was closed while it was made
            self.links.remove(link)
        self.error = error
        if self._policy is None or self._is_closed:
            return inboxes
        if link.had_news or not error.retry:
            self._attempts, self._failures, self._lost_s = 0, 0, None
        self.rest()
        if not error.retry:
            return inboxes
        kept = [inbox for inbox in inboxes if _again(inbox) is not None]
        for inbox in kept:
            inbox.rewind()
        other = next((other for other in self.links if other.error is None), None)
        if other is None:
            self.waiting += kept
            for inbox in kept:
                self._owner.park(inbox)
            if kept:
                self.mend()
        else:
            for inbox in kept:
                self.reopen(inbox, other)
        return [inbox for inbox in inboxes if inbox not in kept]

    async def _reconnect(self, policy: Reconnect) -> CierzoError | None:
        """Make a connection, in as many attempts as somebody waits for; after a refusal that no repetition would
        mend at once, and in one."""
        self._lost_s = self._loop.time() if self._lost_s is None else self._lost_s
        until_s = self._lost_s + policy.within_s
        while self._attempts < policy.max_attempts and self._loop.time() < until_s:
            self._attempts += 1
            try:
                async with asyncio.timeout_at(until_s):
                    if self.error is None or self.error.retry:
                        await asyncio.sleep(max(0.0, self._rest_until_s - self._loop.time()))
                    link = await self._connect(self.last is not None)
                if link.error is not None:
                    raise link.error
            except TimeoutError:
                break
            except CierzoError as refused:
                self.error = refused
                self.rest(refused.retry_after_s or 0.0)
                if not refused.retry or not (self.waiting or self._owner.is_awaiting):
                    break
            else:
                self._adopt(link)
                return None
        return self._give_up()

    def _give_up(self) -> CierzoError:
        failed = self.error
        if not isinstance(failed, Unauthorized | Forbidden):
            tries = f"(tried to connect again {self._attempts} times)"
            failed = ConnectionLost(f"the connection was lost: {self.error} {tries}")
        self._attempts, self._lost_s = 0, None
        self._end_waiting(failed)
        self._owner.gave_up(self, failed)
        return failed

    def _end_waiting(self, error: CierzoError) -> None:
        waiting, self.waiting = self.waiting, []
        for inbox in waiting:
            inbox.put(error)


def _again(inbox: Inbox) -> Generate | Resume | None:
    """The message by which a generation goes on on another connection to its server, if one can."""
    request = inbox.request
    if inbox.accepted is not None:
        request = Resume(stream=0, request_id=inbox.accepted.request_id, received=[])
    if isinstance(request, Resume):
        received, scores = [*inbox.received], inbox.prompt_received if inbox.is_scored else 0
        if inbox.interruption is not None:  # what waits to be taken, another server had told
            received[0] += sum(len(delta.token_ids) for delta in inbox.deltas)
        return msgspec.structs.replace(request, received=received, prompt_received=scores)
    return request if request is not None and request.idempotency_key is not None else None
