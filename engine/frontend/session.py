"""A client over its connections: which one a request is sent on, and where it goes on when that fails."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from cierzo.engine.errors import CierzoError, ConnectionLost, Interrupted, NotFound, refusal
from cierzo.engine.frontend.address import Address
from cierzo.engine.frontend.client_link import ClientLink
from cierzo.engine.frontend.endpoint import Endpoint
from cierzo.engine.frontend.generation import Generation, Inbox
from cierzo.engine.frontend.request_frames import check_request, require
from cierzo.engine.frontend.retries import Budget, Reconnect, Retry, is_of_server, is_worth_repeating
from cierzo.engine.messages import CancelRequest, Generate, Message, Resume

KEY_BYTES = 16  # of an idempotency key that the client makes
GRACE_S = 0.25  # for the other addresses to connect, once one has
KEYLESS_S = 60.0  # for which no keys are made, once a server has no room for them
Connect = Callable[[Address, bool], Awaitable[ClientLink]]


@contextmanager
def unsent() -> Iterator[None]:
    """Say of what is raised within that no server had to do with it."""
    try:
        yield
    except CierzoError as error:
        error.may_have_run = False
        raise


class Session:
    """The connections of one client, to one address or several.

    A request goes to the connection with the fewest open ones, at an address that has not failed of late. If a
    server refuses it for now, it is repeated elsewhere, or later, within the bounds of `retry`. If a server stops
    before the answer is complete, that goes on at another address, from the tokens that came.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        connect: Connect,
        *,
        connections: int,
        reconnect: Reconnect | None,
        retry: Retry | None,
        default_deadline_s: float | None,
    ) -> None:
        def connecting(address: Address) -> Callable[[bool], Awaitable[ClientLink]]:
            return lambda is_known: connect(address, is_known)

        self.endpoints = [
            Endpoint(str(address), connecting(address), reconnect, connections, self) for address in addresses
        ]
        self._loop = asyncio.get_running_loop()
        self._is_mended = reconnect is not None
        self._retry = retry
        self._budget = Budget(retry or Retry())
        self._default_deadline_s = default_deadline_s
        self._end: CierzoError | None = None  # the client was closed
        self._waiting: list[Inbox] = []  # for a connection to any address
        self._pausing: dict[Inbox, CierzoError] = {}  # until they are sent again, and why they were refused
        self._num_calls = 0  # that wait for a connection
        self._num_requests = 0
        self._keyless_until_s = 0.0

    async def open(self) -> None:
        """Connect, to one address at least. Raises the errors of `Dial.connect`."""
        left = {endpoint.start() for endpoint in self.endpoints}
        try:
            while left and self._choose() is None:
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            if left:
                await asyncio.wait(left, timeout=GRACE_S)
            wrong = next((error for error in _errors(self.endpoints) if not error.retry), None)
            if wrong is not None or self._choose() is None:
                raise wrong or _reason(_errors(self.endpoints))
        except BaseException:
            await self.close()
            raise

    @property
    def link(self) -> ClientLink:
        """The connection that the next request goes to; one that was lost, if there is none."""
        link = self._choose() or next(
            (endpoint.last for endpoint in self.endpoints if endpoint.last is not None), None
        )
        assert link is not None
        return link

    def endpoint(self, address: str | None) -> Endpoint | None:
        """The endpoint at an address; None for none. Raises InvalidRequest for another one."""
        if address is None:
            return None
        for endpoint in self.endpoints:
            if endpoint.name == address:
                return endpoint
        limit = ", ".join(endpoint.name for endpoint in self.endpoints)
        raise refusal("address", f"one of this client's: {limit}", address)

    def generate(self, message: Generate) -> Generation:
        """Send a request. Raises what the limits of the server are known to refuse."""
        if message.deadline_s is None and self._default_deadline_s is not None:
            message = msgspec.structs.replace(message, deadline_s=self._default_deadline_s)
        link = self.link
        if "trace" not in link.features and (message.caller_id or message.traceparent):
            message = msgspec.structs.replace(message, caller_id="", traceparent="")
        if self._end is None and link.error is None:
            check_request(message, link.welcome)
        makes_key = (
            self._is_mended
            and "resume" in link.features
            and message.idempotency_key is None
            and self._loop.time() >= self._keyless_until_s
        )
        if makes_key:
            message = msgspec.structs.replace(message, idempotency_key=_new_key())
        inbox = self._inbox(link, message, [len(message.output_token_ids)] * message.sampling.n)
        inbox.has_own_key = makes_key
        if self._is_mended and len(self.endpoints) > 1:
            inbox.keeps, inbox.tokens = True, [*message.output_token_ids]
        if message.deadline_s is not None:
            inbox.until_s = self._loop.time() + message.deadline_s
        self._budget.earn()
        return self._begin(inbox, message)

    def resume(self, request_id: str, received: Iterable[int], prompt_received: int) -> Generation:
        """Go on with a request whose first tokens are known, at whichever address knows it. Raises InvalidRequest
        without the feature "resume"."""
        link = self.link
        require(link.welcome, "resume", "resume")
        request = Resume(stream=0, request_id=request_id, received=[*received], prompt_received=prompt_received)
        return self._begin(self._inbox(link, request, request.received), request)

    async def cancel_request(self, request_id: str) -> None:
        """Cancel a request of whatever connection, at whichever address knows it. Raises NotFound."""
        require(self.link.welcome, "resume", "cancel_request")
        for endpoint in self.endpoints[1:]:
            try:
                await self.call(CancelRequest, endpoint, request_id=request_id)
                return
            except CierzoError:  # what the first one says is told
                continue
        await self.call(CancelRequest, self.endpoints[0], request_id=request_id)

    async def call(self, method: Callable[..., Message], endpoint: Endpoint | None = None, **fields: Any) -> Any:
        """Send a message that has one answer, and wait for it; first for a connection, if one is being made."""
        endpoints = self.endpoints if endpoint is None else [endpoint]
        while (link := self._choose(endpoints)) is None:
            mendable = [endpoint for endpoint in endpoints if endpoint.may_mend]
            if self._end is not None or not mendable:
                raise self._end or _reason(_errors(endpoints))
            if errors := await self._mended(mendable):
                raise _reason(errors)
        return await link.call(method, **fields)

    async def _mended(self, endpoints: list[Endpoint]) -> list[CierzoError]:
        """Wait until there is a connection to one of the endpoints, or why there is none to any."""
        self._num_calls += 1
        left, errors = {endpoint.mend() for endpoint in endpoints}, []
        try:
            while left and self._choose(endpoints) is None:
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                errors += [error for task in done if not task.cancelled() and (error := task.result()) is not None]
        finally:
            self._num_calls -= 1
        return errors if self._choose(endpoints) is None else []

    async def close(self) -> None:
        """Cancel what still runs, and close the connections."""
        reason = self._end = self._end or ConnectionLost("this client is closed")
        for inbox in [*self._waiting, *self._pausing]:
            inbox.put(reason)
        self._waiting.clear()
        self._pausing.clear()
        for endpoint in self.endpoints:
            await endpoint.close(reason)

    # --- where a request goes --------------------------------------------------------------------------

    def _choose(
        self, endpoints: Iterable[Endpoint] | None = None, *, but: Collection[object] = ()
    ) -> ClientLink | None:
        """The connection for another request, at none of the endpoints `but`; None if there is none."""
        best: ClientLink | None = None
        least: tuple[Any, ...] = ()
        for endpoint in self.endpoints if endpoints is None else endpoints:
            if endpoint in but:
                continue
            for link in endpoint.links:
                if link.error is None:
                    is_full = link.num_open >= link.welcome.limits.max_streams
                    order = (is_full, endpoint.is_resting, link.num_open, link.last_used)
                    if best is None or order < least:
                        best, least = link, order
        return best

    def _inbox(self, link: ClientLink, request: Generate | Resume, received: list[int]) -> Inbox:
        return Inbox(link, request, [*received] if self._is_mended else [], self)

    def _begin(self, inbox: Inbox, request: Generate | Resume) -> Generation:
        """Send a new request. Raises what its connection has no room for."""
        link = inbox.link
        assert isinstance(link, ClientLink)
        if self._end is not None:
            inbox.put(self._end)
        elif link.error is None:
            self._use(link)
            link.open(inbox, request)
            for endpoint in self.endpoints:
                endpoint.grow()
        else:
            self._await_connection(inbox)
        return Generation(inbox)

    def _use(self, link: ClientLink) -> None:
        self._num_requests += 1
        link.last_used = self._num_requests

    def _await_connection(self, inbox: Inbox) -> None:
        """Have a generation sent by whichever connection there is next."""
        mendable = [endpoint for endpoint in self.endpoints if endpoint.may_mend]
        if not mendable:
            inbox.put(_reason(_errors(self.endpoints)))
            return
        self._waiting.append(inbox)
        self.park(inbox)
        for endpoint in mendable:
            endpoint.mend()

    def _send(self, inbox: Inbox) -> None:
        """Send a request again that no server works on, on the best connection there is now."""
        self._pausing.pop(inbox, None)
        if inbox.ended or self._end is not None:
            return
        link = self._choose(but=inbox.tried) or self._choose()
        if link is None:
            self._await_connection(inbox)
            return
        self._use(link)
        self._endpoint_of(link).reopen(inbox, link)

    def _endpoint_of(self, link: object) -> Endpoint:
        """The endpoint that a connection is of."""
        assert isinstance(link, ClientLink)
        return next(endpoint for endpoint in self.endpoints if endpoint.name == link.peer)

    # --- what waits ------------------------------------------------------------------------------------

    @property
    def is_awaiting(self) -> bool:
        """Whether something waits for a connection to any address."""
        return bool(self._waiting or self._num_calls)

    def park(self, inbox: Inbox) -> None:
        """A generation waits for a connection, no longer than its deadline."""
        if inbox.until_s is not None:
            inbox.unset_timer()
            inbox.timer = self._loop.call_at(inbox.until_s, self._expire, inbox)

    def _expire(self, inbox: Inbox) -> None:
        for waiting in (self._waiting, *(endpoint.waiting for endpoint in self.endpoints)):
            if inbox in waiting:
                waiting.remove(inbox)
        what = "its deadline passed while there was no connection"
        inbox.put(ConnectionLost(what, field="deadline_s"))

    def connected(self, endpoint: Endpoint) -> None:
        """There is a connection, for whatever waits for any."""
        waiting, self._waiting = self._waiting, []
        for inbox in waiting:
            self._send(inbox)

    def gave_up(self, endpoint: Endpoint, error: CierzoError) -> None:
        """There will be none to this endpoint for now; what waits for any ends if there is no other either."""
        if not any(other.is_mending for other in self.endpoints if other is not endpoint):
            waiting, self._waiting = self._waiting, []
            for inbox in waiting:
                inbox.put(error)

    # --- what goes on ----------------------------------------------------------------------------------

    def recovers(self, inbox: Inbox, error: CierzoError) -> bool:
        """Whether a generation goes on in spite of this error: elsewhere, or later."""
        request = inbox.request
        if self._end is not None or inbox.cancelled or inbox.dropped or request is None:
            return False
        if isinstance(request, Generate) and isinstance(error, Interrupted):
            return inbox.keeps and self._move(inbox, request, error)
        if not inbox.was_sent or not inbox.is_refused(error):
            return False
        if isinstance(request, Resume):
            return isinstance(error, NotFound) and self._elsewhere(inbox)
        if inbox.has_own_key and error.field == "max_idempotency_keys":
            self._keyless_until_s = self._loop.time() + KEYLESS_S
            inbox.request, inbox.has_own_key = msgspec.structs.replace(request, idempotency_key=None), False
            self._loop.call_soon(self._send, inbox)
            return True
        return self._retry is not None and is_worth_repeating(error) and self._repeat(inbox, error, self._retry)

    def _move(self, inbox: Inbox, request: Generate, interruption: Interrupted) -> bool:
        """Have an answer that its server has interrupted go on elsewhere, from the tokens that came."""
        num_known = len(request.output_token_ids)
        came = bool(inbox.deltas or inbox.prompt_received)
        came = came or any(received > num_known for received in inbox.received)
        params = request.sampling
        if came and (params.n > 1 or (params.prompt_logprobs is not None and len(inbox.tokens) == num_known)):
            return False  # of log-probabilities of a prompt too, no request can name those that came
        self._endpoint_of(inbox.link).rest()
        inbox.tried = ()
        if not self._elsewhere(inbox):
            return False
        if interruption.value is not None:
            scored = None if came else params.prompt_logprobs  # all of them came before the first token
            params = msgspec.structs.replace(params, seed=int(interruption.value), prompt_logprobs=scored)
            request = msgspec.structs.replace(request, sampling=params, output_token_ids=[*inbox.tokens])
        if inbox.has_own_key:
            request = msgspec.structs.replace(request, idempotency_key=_new_key())
        inbox.move(request, interruption)
        return True

    def _elsewhere(self, inbox: Inbox) -> bool:
        """Send a request at an endpoint that it was not at, if there is one with a connection."""
        inbox.tried = (*inbox.tried, self._endpoint_of(inbox.link))
        if self._choose(but=inbox.tried) is None:
            return False
        self._loop.call_soon(self._send, inbox)
        return True

    def _repeat(self, inbox: Inbox, error: CierzoError, policy: Retry) -> bool:
        """Send a request that was refused again: at another endpoint now or, where there is none, later."""
        inbox.tries += 1
        if is_of_server(error):
            self._endpoint_of(inbox.link).rest(error.retry_after_s or 0.0)
        if inbox.tries >= policy.max_attempts:
            return False
        at_s = self._loop.time() + policy.pause_s(inbox.tries, error)
        last_s = inbox.began_s + policy.within_s
        is_late = at_s > (last_s if inbox.until_s is None else min(last_s, inbox.until_s))
        has_other = self._choose(but=(*inbox.tried, self._endpoint_of(inbox.link))) is not None
        if (is_late and not has_other) or not self._budget.spend():
            return False
        if not self._elsewhere(inbox):
            self._pausing[inbox] = error
            inbox.timer = self._loop.call_at(at_s, self._send, inbox)
        return True

    def withdrawn(self, inbox: Inbox) -> None:
        """Nobody wants a generation any more that may wait for its next attempt."""
        if (error := self._pausing.pop(inbox, None)) is not None:
            inbox.put(error)


def _errors(endpoints: Sequence[Endpoint]) -> list[CierzoError]:
    """Why endpoints have no connection, or have lost one."""
    lost = [link.error for endpoint in endpoints for link in endpoint.links]
    return [error for error in (*(endpoint.error for endpoint in endpoints), *lost) if error is not None]


def _reason(errors: Sequence[CierzoError]) -> CierzoError:
    """The error for no connection at all: one that no repetition mends before others, and else all of them."""
    if not errors:
        return ConnectionLost("there is no connection")
    wrong = next((error for error in errors if not error.retry), None)
    told = [*dict.fromkeys(error.message for error in errors)]
    return wrong or (errors[0] if len(told) == 1 else ConnectionLost("; ".join(told)))


def _new_key() -> str:
    return os.urandom(KEY_BYTES).hex()
