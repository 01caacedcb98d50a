"""A client over its connections: the one in use, and the requests that outlive it."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from cierzo.engine.errors import CierzoError, ConnectionLost
from cierzo.engine.frontend.client_link import ClientLink
from cierzo.engine.frontend.generation import Generation, Inbox
from cierzo.engine.frontend.request_frames import check_request, require
from cierzo.engine.messages import CancelRequest, Generate, Message, Resume

KEY_BYTES = 16  # of an idempotency key that the client makes


@dataclass(frozen=True, slots=True)
class Reconnect:
    """Bounds on the mending of a lost connection; past them its requests end with ConnectionLost.

    max_attempts, within_s: connections tried, and seconds since the loss; both count from the last connection on
    which something came for a request. The pause before an attempt doubles up to `longest_pause_s`, and is cut at
    random to a half at least, so that many clients do not come back at once.
    """

    max_attempts: int = 10
    within_s: float = 30.0
    first_pause_s: float = 0.05
    longest_pause_s: float = 5.0


Connect = Callable[[], Awaitable[ClientLink]]


class Session:
    """The connection of one client. With a `policy`, a lost one is replaced, and what was open on it goes on:
    accepted requests from the tokens that were taken, others by their idempotency key.
    """

    def __init__(self, link: ClientLink, connect: Connect, policy: Reconnect | None) -> None:
        self.link = link
        self._connect = connect
        self._policy = policy
        self._end: CierzoError | None = None  # the client was closed
        self._waiting: list[Inbox] = []  # for a connection
        self._mending: asyncio.Task[CierzoError | None] | None = None
        self._attempts = 0
        self._lost_s: float | None = None
        link.on_lost = self._lost

    def generate(self, message: Generate) -> Generation:
        """Send a request. Raises what the limits of the server are known to refuse."""
        if self._end is None and self.link.error is None:
            check_request(message, self.link.welcome)
        is_kept = self._policy is not None and "resume" in self.link.features
        if is_kept and message.idempotency_key is None:
            message = msgspec.structs.replace(message, idempotency_key=secrets.token_hex(KEY_BYTES))
        return self._open(message, [len(message.output_token_ids)] * message.sampling.n)

    def resume(self, request_id: str, received: Iterable[int]) -> Generation:
        """Go on with a request whose first tokens are known. Raises InvalidRequest without the feature "resume"."""
        require(self.link.welcome, "resume", "resume")
        tokens = [*received]
        return self._open(Resume(stream=0, request_id=request_id, received=tokens), tokens)

    async def cancel_request(self, request_id: str) -> None:
        """Cancel a request of whatever connection. Raises NotFound."""
        require(self.link.welcome, "resume", "cancel_request")
        await self.call(CancelRequest, request_id=request_id)

    async def call(self, method: Callable[..., Message], **fields: Any) -> Any:
        """Send a message that has one answer, and wait for it; first for a connection, if one is being made."""
        while self.link.error is not None:
            if self._end is not None or self._policy is None or not self.link.error.retry:
                raise self._end or self.link.error
            await asyncio.wait([mending := self._mend()])
            if not mending.cancelled() and (error := mending.result()) is not None:
                raise error
        return await self.link.call(method, **fields)

    async def close(self) -> None:
        """Cancel what still runs, and close the connection."""
        reason = self._end = self._end or ConnectionLost("this client is closed")
        if self._mending is not None:
            self._mending.cancel()
        self._give_up(reason)
        self.link.cancel_all()
        self.link.close(reason)
        await asyncio.shield(self.link.closed)

    def _open(self, request: Generate | Resume, received: list[int]) -> Generation:
        inbox = Inbox(self.link, request, [] if self._policy is None else [*received])
        if self._end is not None:
            inbox.put(self._end)
        elif self._policy is not None and self.link.error is not None and self.link.error.retry:
            self._waiting.append(inbox)
            self._mend()
        else:
            self.link.open(inbox, request)
        return Generation(inbox)

    # --- lost connections ------------------------------------------------------------------------------

    def _lost(self, inboxes: list[Inbox], error: CierzoError) -> list[Inbox]:
        """Keep the generations that can go on elsewhere; the others are given back, to fail."""
        if self._policy is None or self._end is not None or not error.retry:
            return inboxes
        if self.link.had_news:
            self._attempts, self._lost_s = 0, None
        given_back = []
        for inbox in inboxes:
            if _again(inbox) is None:
                given_back.append(inbox)
            else:
                inbox.rewind()
                self._waiting.append(inbox)
        if self._waiting:
            self._mend()
        return given_back

    def _mend(self) -> asyncio.Task[CierzoError | None]:
        """The task that makes a connection; it gives the reason if there is none to be had."""
        if self._mending is None or self._mending.done():
            assert self._policy is not None
            self._mending = self.link.loop.create_task(self._reconnect(self._policy))
        return self._mending

    async def _reconnect(self, policy: Reconnect) -> CierzoError | None:
        loop, pause_s = self.link.loop, policy.first_pause_s
        self._lost_s = loop.time() if self._lost_s is None else self._lost_s
        error, until_s = self.link.error, self._lost_s + policy.within_s
        while self._attempts < policy.max_attempts and loop.time() < until_s:
            self._attempts += 1
            try:
                async with asyncio.timeout_at(until_s):
                    await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                    link = await self._connect()
            except TimeoutError:
                break
            except CierzoError as refused:
                error = refused
                if not refused.retry:
                    break
                pause_s = max(min(2 * pause_s, policy.longest_pause_s), refused.retry_after_s or 0.0)
            else:
                if (error := link.error) is None:
                    self._take_over(link)
                    return None
        failed = ConnectionLost(f"the connection was lost: {error} (tried to connect again {self._attempts} times)")
        self._attempts, self._lost_s = 0, None
        self._give_up(failed)
        return failed

    def _take_over(self, link: ClientLink) -> None:
        """Open on a new connection what was open on the last one."""
        link.on_lost, self.link = self._lost, link
        waiting, self._waiting = self._waiting, []
        for inbox in waiting:
            request = _again(inbox) if inbox.reopened else inbox.request
            if inbox.dropped or request is None:
                if inbox.accepted is not None and "resume" in link.features:
                    link.tell(CancelRequest, request_id=inbox.accepted.request_id)
                continue
            try:
                if isinstance(request, Resume) or request.idempotency_key is not None:
                    require(link.welcome, "resume", "going on after a lost connection")
                link.open(inbox, request)
            except CierzoError as error:
                inbox.put(error)
                continue
            if inbox.cancelled:
                link.cancel(inbox)

    def _give_up(self, error: CierzoError) -> None:
        waiting, self._waiting = self._waiting, []
        for inbox in waiting:
            inbox.put(error)


def _again(inbox: Inbox) -> Generate | Resume | None:
    """The message by which a generation goes on on another connection, if one can."""
    request = inbox.request
    if inbox.accepted is not None:
        return Resume(stream=0, request_id=inbox.accepted.request_id, received=[*inbox.received])
    if isinstance(request, Resume):
        return msgspec.structs.replace(request, received=[*inbox.received])
    return request if request is not None and request.idempotency_key is not None else None
