"""Clients of the RPC: `Client` for asyncio, `SyncClient` for scripts. Imports neither torch nor numpy.

    async with await Client.connect("127.0.0.1:7071") as client:
        async for delta in client.generate(messages=[{"role": "user", "content": "Hi"}], max_tokens=32):
            print(delta.text, end="")

`generate` gives a `Generation`: an iterator of Deltas; afterwards its `final` holds the last record. Leaving the
loop early, or cancelling the task that runs it, cancels the request at the server. A refusal or failure is
raised as the class of `engine.errors` that its code names. A lost connection is not repaired: connect again, and
resume with `output_token_ids` and the seed if need be.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar, cast

import msgspec

from cierzo.engine.errors import ConnectionLost
from cierzo.engine.frontend.address import TcpAddress, parse_address
from cierzo.engine.frontend.client_link import ClientLink, Generation
from cierzo.engine.messages import (
    ChatMessage,
    Delta,
    Drain,
    Experts,
    ExpertStatistics,
    Final,
    Generate,
    GetExperts,
    GetHealth,
    GetModel,
    GetStats,
    Health,
    ModelInfo,
    Ping,
    SamplingParams,
    Stats,
    Welcome,
)

CONNECT_TIMEOUT_S = 10.0
Messages = Iterable[ChatMessage | Mapping[str, Any]]
T = TypeVar("T")


class Client:
    """One connection; any number of generations at a time. For use on one event loop."""

    def __init__(self, link: ClientLink, welcome: Welcome) -> None:
        self._link = link
        self.welcome = welcome

    @classmethod
    async def connect(cls, address: str, timeout_s: float = CONNECT_TIMEOUT_S) -> Self:
        """Connect to "HOST:PORT" or "unix:PATH". Raises ConnectionLost where nobody answers, or the refusal."""
        loop, where = asyncio.get_running_loop(), parse_address(address)
        link = ClientLink(loop)
        try:
            async with asyncio.timeout(timeout_s):
                if isinstance(where, TcpAddress):
                    await loop.create_connection(lambda: link, where.host, where.port)
                else:
                    await loop.create_unix_connection(lambda: link, where.path)
                return cls(link, await link.welcome)
        except (OSError, TimeoutError) as error:
            link.close()
            raise ConnectionLost(f"no server answers at {where}: {error or 'timeout'}") from error

    def generate(
        self,
        *,
        text: str | None = None,
        messages: Messages | None = None,
        token_ids: Sequence[int] | None = None,
        sampling: SamplingParams | None = None,
        output_token_ids: Sequence[int] = (),
        reasoning_effort: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        deltas: bool = True,
        **params: Any,
    ) -> Generation:
        """Send a request now, and give what iterates over its answer.

        Exactly one of `text`, `messages`, `token_ids`. Further keywords are the fields of SamplingParams
        (`max_tokens`, `temperature`, `seed`, `stop`, ...), on top of `sampling` if that is given. The other
        arguments are those of `messages.Generate`. Refusals are raised by the iteration.
        """
        request = Generate(
            stream=0,
            text=text,
            messages=None if messages is None else msgspec.convert(list(messages), list[ChatMessage]),
            token_ids=None if token_ids is None else list(token_ids),
            sampling=_sampling(sampling, params),
            output_token_ids=list(output_token_ids),
            reasoning_effort=reasoning_effort,
            priority=priority,
            deadline_s=deadline_s,
            deltas=deltas,
        )
        return self._link.open(request)

    async def complete(self, **arguments: Any) -> Final:
        """As `generate`, but the whole answer at once: `final.samples[i].text`, `.token_ids`, `.logprobs`."""
        generation = self.generate(deltas=False, **arguments)
        async for _ in generation:
            pass
        return generation.final

    async def ping(self) -> None:
        """Wait for an answer of the front end."""
        await self._link.call(Ping)

    async def health(self) -> Health:
        """The server's state: loading, ready, draining or failed."""
        return cast(Health, await self._link.call(GetHealth))

    async def stats(self) -> Stats:
        """Counters and gauges of the server."""
        return cast(Stats, await self._link.call(GetStats))

    async def experts(self) -> ExpertStatistics:
        """Which experts the tokens chose since the core's start. Raises InvalidRequest where nobody counts them."""
        return cast(Experts, await self._link.call(GetExperts)).statistics

    async def model_info(self) -> ModelInfo:
        """What is served."""
        return cast(ModelInfo, await self._link.call(GetModel))

    async def drain(self) -> None:
        """Have the server take nothing more, and wait until it has finished what it had."""
        await self._link.call(Drain)

    async def close(self) -> None:
        """Close the connection; what still runs is cancelled by the server, and fails here with ConnectionLost."""
        self._link.close()
        await self._link.closed

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


class SyncGeneration:
    """A `Generation` for a plain `for` loop."""

    def __init__(
        self, generation: Generation, run: Callable[[Coroutine[Any, Any, list[Delta]]], list[Delta]]
    ) -> None:
        self._generation = generation
        self._run = run
        self._batch: deque[Delta] = deque()

    @property
    def final(self) -> Final:
        """As `Generation.final`."""
        return self._generation.final

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        if not self._batch:
            self._batch.extend(self._run(self._generation.next_batch()))
            if not self._batch:
                raise StopIteration
        return self._batch.popleft()


class SyncClient:
    """`Client` for scripts: the same methods, blocking. Its event loop runs in a thread; any thread may call."""

    def __init__(self, address: str, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Connect; raises as `Client.connect` does."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cierzo-client", daemon=True)
        self._thread.start()
        try:
            self._client = self._run(Client.connect(address, timeout_s))
        except BaseException:
            self._stop()
            raise

    @property
    def welcome(self) -> Welcome:
        """What the server said of itself and its limits."""
        return self._client.welcome

    def generate(self, **arguments: Any) -> SyncGeneration:
        """As `Client.generate`; iterate with `for`."""
        return SyncGeneration(self._run(self._begin(arguments)), self._run)

    def complete(self, **arguments: Any) -> Final:
        """As `Client.complete`."""
        return self._run(self._client.complete(**arguments))

    def ping(self) -> None:
        """As `Client.ping`."""
        self._run(self._client.ping())

    def health(self) -> Health:
        """As `Client.health`."""
        return self._run(self._client.health())

    def stats(self) -> Stats:
        """As `Client.stats`."""
        return self._run(self._client.stats())

    def experts(self) -> ExpertStatistics:
        """As `Client.experts`."""
        return self._run(self._client.experts())

    def model_info(self) -> ModelInfo:
        """As `Client.model_info`."""
        return self._run(self._client.model_info())

    def drain(self) -> None:
        """As `Client.drain`."""
        self._run(self._client.drain())

    def close(self) -> None:
        """Close the connection and end the thread."""
        if not self._loop.is_closed():
            self._run(self._client.close())
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def _begin(self, arguments: dict[str, Any]) -> Generation:
        return self._client.generate(**arguments)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # an interrupt here must not leave it running there
            raise

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _sampling(base: SamplingParams | None, params: dict[str, Any]) -> SamplingParams:
    for name in ("stop", "stop_token_ids"):
        if name in params:
            given = params[name]
            params[name] = (given,) if isinstance(given, str) else tuple(given)
    if base is None:
        return SamplingParams(**params)
    return msgspec.structs.replace(base, **params)
