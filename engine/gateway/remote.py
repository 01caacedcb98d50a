"""The engine at the other end of RPC connections: a client for each key that callers bring.

The server decides who may come: a key is handed on as it is. One that was refused is not tried again for a moment,
so that guessing costs the server little.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Unpack

from cierzo.engine.errors import CierzoError, NotFound, Overloaded, Unauthorized
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.client_options import GenerateArguments, TokenizeArguments
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.generation import Generation
from cierzo.engine.frontend.keys import digest_of
from cierzo.engine.frontend.tenants import Right
from cierzo.engine.gateway.backend import Caller
from cierzo.engine.messages import Health, ModelInfo, Stats, TokenizerInfo

log = logging.getLogger(__name__)

MAX_CLIENTS = 256  # of keys, the gateway's own beside them
IDLE_S = 300.0  # after which the client of a key is closed
REFUSED_S = 2.0  # for which a key that was refused is refused again without a question
MAX_REFUSED = 4096
HEALTH_S = 2.0  # that a server has to say how it is
NO_KEY = "this server wants a key that it knows"
Connect = Callable[[str | None], Coroutine[Any, Any, Client]]


class Kept:
    """The client of a key, as soon as it is connected, and how many requests are on it."""

    __slots__ = ("client", "idle_since_s", "num_open")

    def __init__(self, client: asyncio.Task[Client]) -> None:
        self.client = client
        self.num_open = 0
        self.idle_since_s = 0.0  # set when the last of them ends


class Remote:
    """Lets callers in as the server at the other end does. `open`, `close`.

    connect: makes the client of a caller's key, None for none. connect_own: makes the gateway's own, by which it
    asks how the server is. trusts_all: callers of other machines need no key either; the server would take them
    for this machine's.
    """

    def __init__(
        self,
        connect: Connect,
        connect_own: Callable[[], Awaitable[Client]],
        *,
        trusts_all: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._connect_own = connect_own
        self._trusts_all = trusts_all
        self._clock = clock
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()  # by the digest of the key, the last used last
        self._refused: OrderedDict[bytes, float] = OrderedDict()  # until when
        self._closing: set[asyncio.Task[None]] = set()
        self._own: Client | None = None
        self.frontend: Frontend | None = None  # it is in another process

    async def open(self) -> None:
        """Connect, if the server is there. Raises Unauthorized where it wants a key of the gateway itself."""
        try:
            await self._asked()
        except Unauthorized:
            raise
        except CierzoError as error:
            log.warning("the server is not there yet: %s", error)

    async def close(self) -> None:
        """End all connections."""
        clients = [kept.client for kept in self._kept.values()]
        self._kept.clear()
        for client in clients:
            await _closed(client)
        await asyncio.gather(*self._closing)
        if self._own is not None:
            await self._own.close()

    async def admit(self, caller: Caller) -> RemoteDesk:
        """The engine for a request. Raises Unauthorized, and ConnectionLost where no server is there."""
        digest, now = digest_of(caller.key), self._clock()
        if not (caller.key or caller.is_local or self._trusts_all):
            raise Unauthorized(NO_KEY, field="key", limit="one that is known")
        if (until_s := self._refused.get(digest)) is not None and now < until_s:
            raise Unauthorized(NO_KEY, field="key", limit="one that is known")
        kept = self._kept.get(digest)
        if kept is None:
            self._make_room()
            kept = self._kept[digest] = Kept(asyncio.ensure_future(self._connect(caller.key or None)))
        self._kept.move_to_end(digest)
        kept.num_open += 1
        try:
            client = await asyncio.shield(kept.client)
        except BaseException as error:
            self.left(kept)
            if isinstance(error, CierzoError):
                self._failed(digest, kept, error)
            raise
        return RemoteDesk(self, kept, client, digest.hex())  # a gateway knows keys alone

    def left(self, kept: Kept) -> None:
        """A request is over."""
        kept.num_open -= 1
        kept.idle_since_s = self._clock()

    async def health(self) -> Health:
        """The server's state. One that cannot be asked is no reason to restart the gateway."""
        try:
            async with asyncio.timeout(HEALTH_S):
                return await (await self._asked()).health()
        except (CierzoError, TimeoutError) as error:
            note = str(error) or f"the server does not answer within {HEALTH_S:g} s"
            return Health(stream=0, state="unreachable", uptime_s=0.0, live=True, notes=[note])

    def metrics(self) -> bytes:
        """There are none here."""
        raise NotFound("a gateway has no metrics: the server tells them, at its own address (--metrics)")

    async def _asked(self) -> Client:
        """The gateway's own client."""
        if self._own is None:
            self._own = await self._connect_own()
        return self._own

    def _failed(self, digest: bytes, kept: Kept, error: CierzoError) -> None:
        """A key has no client: the next request with it tries again, if not at once."""
        if self._kept.get(digest) is kept:
            del self._kept[digest]
        if isinstance(error, Unauthorized):
            self._refused[digest] = self._clock() + REFUSED_S
            self._refused.move_to_end(digest)
            if len(self._refused) > MAX_REFUSED:
                self._refused.popitem(last=False)

    def _make_room(self) -> None:
        """Close clients that are idle. Raises Overloaded if all that there may be are busy."""
        now = self._clock()
        idle = [digest for digest, kept in self._kept.items() if not kept.num_open]
        surplus = len(self._kept) - MAX_CLIENTS + 1
        if surplus > len(idle):
            limit = MAX_CLIENTS
            raise Overloaded(f"requests of {limit} keys are open", field="keys", limit=limit, retry_after_s=1.0)
        old = [digest for digest in idle if now - self._kept[digest].idle_since_s > IDLE_S]
        for digest in {*old, *idle[: max(0, surplus)]}:
            closing = asyncio.ensure_future(_closed(self._kept.pop(digest).client))
            self._closing.add(closing)  # nobody waits for it: who comes meanwhile finds what is kept as it is
            closing.add_done_callback(self._closing.discard)


class ClientDesk:
    """The engine for one request, by a client."""

    __slots__ = ("_client", "_generations", "tenant")

    def __init__(self, client: Client, tenant: str = "") -> None:
        self.tenant = tenant
        self._client = client
        self._generations: list[Generation] = []

    def generate(self, **arguments: Unpack[GenerateArguments]) -> Generation:
        """Ask for an answer."""
        generation = self._client.generate(**arguments)
        self._generations.append(generation)
        return generation

    async def health(self) -> Health:
        """The state of the engine."""
        return await self._client.health()

    async def stats(self) -> Stats:
        """Counters and gauges. Raises Forbidden without the right "stats"."""
        return await self._client.stats()

    async def model_info(self) -> ModelInfo:
        """Describe the model, and its limits."""
        return await self._client.model_info()

    async def tokenize(self, **arguments: Unpack[TokenizeArguments]) -> list[int]:
        """Give the tokens of a prompt."""
        return await self._client.tokenize(**arguments)

    async def detokenize(self, token_ids: Iterable[Any], *, control_tokens: bool = False) -> str:
        """Give the text of tokens."""
        return await self._client.detokenize(token_ids, control_tokens=control_tokens)

    async def token_bytes(self, token_ids: Iterable[Any]) -> list[bytes]:
        """Give the bytes of each token."""
        return await self._client.token_bytes(token_ids)

    async def tokenizer_info(self) -> TokenizerInfo:
        """Describe the tokenizer. Raises Forbidden without the right "stats"."""
        return await self._client.tokenizer_info()

    async def require(self, right: Right) -> None:
        """Raise Forbidden unless the caller has a right: the server is asked for what needs it."""
        assert right == "stats", "no other can be tried without doing it"
        await self._client.stats()

    def close(self) -> None:
        """The request is over: what still runs of it is cancelled."""
        for generation in self._generations:
            generation.cancel()


class RemoteDesk(ClientDesk):
    """The engine for one HTTP request, by the client of its caller's key."""

    __slots__ = ("_kept", "_owner")

    def __init__(self, owner: Remote, kept: Kept, client: Client, tenant: str) -> None:
        super().__init__(client, tenant)
        self._owner = owner
        self._kept: Kept | None = kept

    def close(self) -> None:
        """The request is over, for the client of its key too."""
        kept, self._kept = self._kept, None
        if kept is not None:
            self._owner.left(kept)
            super().close()


async def _closed(client: asyncio.Task[Client]) -> None:
    """Close a client that is idle: it is connected, or could not be."""
    client.cancel()
    with contextlib.suppress(CierzoError, asyncio.CancelledError):
        await (await client).close()
