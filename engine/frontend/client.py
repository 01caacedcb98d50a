"""Clients of the RPC: `Client` for asyncio, `SyncClient` for scripts. Imports neither torch nor numpy.

    async with await Client.connect("127.0.0.1:7071") as client:
        await client.wait_ready()  # a server that has just been started still loads its model
        async for delta in client.generate(messages=[{"role": "user", "content": "Hi"}], max_tokens=32):
            print(delta.text, end="")

`generate` gives a `Generation`: an iterator of Deltas; afterwards its `final` holds the last record. Leaving the
loop early, or cancelling the task that runs it, cancels the request at the server. A refusal or failure is
raised as the class of `engine.errors` that its code names; what no message can carry is refused as InvalidRequest
before anything is sent. A lost connection is not repaired: connect again, and resume with `output_token_ids` and
the seed if need be.

Waits can be limited:

    client = await Client.connect("127.0.0.1:7071", timeout_s=5.0)  # ConnectionLost
    await client.wait_ready(timeout_s=600.0)  # TimeoutError
    generation = client.generate(text="Hi", deadline_s=30.0)  # ends with what there is by then
    delta = await generation.next(timeout_s=5.0)  # TimeoutError; the generation goes on
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Self, TypeVar, cast

from cierzo.engine.errors import ConnectionLost, CoreFailed, Draining
from cierzo.engine.frontend.address import Address, TcpAddress, parse_address
from cierzo.engine.frontend.arguments import generate_message
from cierzo.engine.frontend.client_link import ClientLink, Generation
from cierzo.engine.frontend.loop_thread import LoopThread
from cierzo.engine.frontend.one_process import OneProcess
from cierzo.engine.messages import (
    ChatMessage,
    Delta,
    Drain,
    Final,
    Generate,
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
FIRST_READY_POLL_S, LONGEST_READY_POLL_S = 0.05, 1.0
Message = ChatMessage | Mapping[str, Any]
T = TypeVar("T")
Run = Callable[[Callable[[], Coroutine[Any, Any, T]]], T]  # runs the coroutine that a function makes


class Client:
    """A connection to a server, for any number of generations at a time. For use on one event loop."""

    def __init__(self, link: ClientLink, welcome: Welcome) -> None:
        self._link = link
        self.welcome = welcome

    @classmethod
    async def connect(cls, address: str, timeout_s: float = CONNECT_TIMEOUT_S) -> Self:
        """Connect to "HOST:PORT" or "unix:PATH".

        Raises ConnectionLost where no server answers, ProtocolError where something else does, or the refusal.
        """
        loop, where = asyncio.get_running_loop(), parse_address(address)
        link = ClientLink(loop, str(where))
        try:
            async with asyncio.timeout(timeout_s):
                if isinstance(where, TcpAddress):
                    await loop.create_connection(lambda: link, where.host, where.port)
                else:
                    await loop.create_unix_connection(lambda: link, where.path)
                return cls(link, await link.welcome)
        except BaseException as error:
            link.close()
            if isinstance(error, OSError):  # a TimeoutError too
                raise ConnectionLost(_unanswered(where, link, error, timeout_s)) from error
            raise

    def generate(
        self,
        *,
        text: str | None = None,
        messages: Message | Iterable[Message] | None = None,
        token_ids: Iterable[Any] | None = None,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        output_token_ids: Iterable[Any] | None = None,
        reasoning_effort: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        deltas: bool = True,
        **params: Any,
    ) -> Generation:
        """Send a request now, and give what iterates over its answer.

        Exactly one of `text`, `messages`, `token_ids`. Further keywords are the fields of SamplingParams
        (`max_tokens`, `temperature`, `seed`, `stop`, ...), on top of `sampling` if that is given. The other
        arguments are those of `messages.Generate`. Raises InvalidRequest for an unknown keyword and for what no
        message can carry, FrameTooLarge for more than the server reads at once; the server's refusals are raised by
        the iteration.
        """
        message = generate_message(
            text=text,
            messages=messages,
            token_ids=token_ids,
            sampling=sampling,
            output_token_ids=output_token_ids,
            reasoning_effort=reasoning_effort,
            priority=priority,
            deadline_s=deadline_s,
            deltas=deltas,
            **params,
        )
        return self._send(message)

    async def complete(self, **arguments: Any) -> Final:
        """As `generate`, but the whole answer at once: `final.samples[i].text`, `.token_ids`, `.logprobs`."""
        generation = self.generate(deltas=False, **arguments)
        async for _ in generation:
            pass
        return generation.final

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until the server takes requests; that it still loads its model is no error.

        Raises Draining or CoreFailed if it never will, and TimeoutError with the state seen last.
        """
        state, pause_s = "unknown, as it does not answer", FIRST_READY_POLL_S
        try:
            async with asyncio.timeout(timeout_s):
                while (state := (await self.health()).state) == "loading":
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_READY_POLL_S)
        except TimeoutError:
            raise TimeoutError(f"the server is not ready after {timeout_s:g} s; its state is {state}") from None
        if state == "draining":
            raise Draining("the server drains: it takes no new requests")
        if state != "ready":
            raise CoreFailed(f"the server takes no requests: its state is {state}")

    async def ping(self) -> None:
        """Wait for an answer of the front end."""
        await self._link.call(Ping)

    async def health(self) -> Health:
        """The server's state: loading, ready, draining or failed."""
        return cast(Health, await self._link.call(GetHealth))

    async def stats(self) -> Stats:
        """Counters and gauges of the server."""
        return cast(Stats, await self._link.call(GetStats))

    async def model_info(self) -> ModelInfo:
        """Describe the model that is served, and its limits."""
        return cast(ModelInfo, await self._link.call(GetModel))

    async def drain(self) -> None:
        """Have the server take nothing more, and wait until it has finished what it had."""
        await self._link.call(Drain)

    async def close(self) -> None:
        """Close the connection; what still runs is cancelled by the server, and fails here with ConnectionLost."""
        self._link.close(ConnectionLost("this client is closed"))
        await asyncio.shield(self._link.closed)

    def _send(self, message: Generate) -> Generation:
        return self._link.open(message)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


def _unanswered(where: Address, link: ClientLink, error: Exception, timeout_s: float) -> str:
    """The reason why there is no client, in words: a TimeoutError of asyncio has none."""
    if link.is_connected:
        return f"{where} takes connections, but did not say welcome within {timeout_s:g} s: is it a cierzo server?"
    return f"no server answers at {where}: {str(error) or f'not connected within {timeout_s:g} s'}"


class SyncGeneration:
    """A `Generation` for a plain `for` loop. Threads may share it: each delta goes to one of them."""

    def __init__(self, generation: Generation, run: Run) -> None:
        self._generation = generation
        self._run = run
        self._batch: deque[Delta] = deque()

    @property
    def final(self) -> Final:
        """As `Generation.final`."""
        return self._generation.final

    def next(self, timeout_s: float | None = None) -> Delta | None:
        """As `Generation.next`: None at the end; after a TimeoutError the generation goes on."""
        while True:
            with contextlib.suppress(IndexError):
                return self._batch.popleft()
            batch = self._run(lambda: self._generation.next_batch(timeout_s))
            if not batch:
                return None
            self._batch.extend(batch)

    def cancel(self) -> None:
        """As `Generation.cancel`."""

        async def cancel() -> None:
            self._generation.cancel()

        with contextlib.suppress(ConnectionLost):  # which has cancelled it already
            self._run(cancel)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        if (delta := self.next()) is None:
            raise StopIteration
        return delta


class SyncClient(OneProcess):
    """`Client` for scripts: the same methods, blocking. Its event loop runs in a thread; any thread may call.

        with SyncClient("127.0.0.1:7071") as client:
            client.wait_ready(timeout_s=600.0)
            generation = client.generate(text="Hi", max_tokens=32)
            while (delta := generation.next(timeout_s=5.0)) is not None:  # or: for delta in generation
                print(delta.text, end="")

    After `close`, and in threads that wait while it is called, everything raises ConnectionLost.
    """

    def __init__(self, address: str, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Connect; raises as `Client.connect` does."""
        super().__init__()
        self._thread = LoopThread("cierzo-client")

        async def connect() -> Client:
            return await self._thread.exits.enter_async_context(await Client.connect(address, timeout_s))

        try:
            self._client = self._run(connect)
        except BaseException:
            self.close()
            raise

    @property
    def welcome(self) -> Welcome:
        """The server's description of itself and its limits."""
        return self._client.welcome

    def generate(self, **arguments: Any) -> SyncGeneration:
        """As `Client.generate`; iterate with `for`."""
        message = generate_message(**arguments)  # in this thread: an iterable may ask this client as well

        async def send() -> Generation:
            return self._client._send(message)

        return SyncGeneration(self._run(send), self._run)

    def complete(self, **arguments: Any) -> Final:
        """As `Client.complete`."""
        generation = self.generate(deltas=False, **arguments)
        for _ in generation:
            pass
        return generation.final

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """As `Client.wait_ready`."""
        self._run(lambda: self._client.wait_ready(timeout_s))

    def ping(self) -> None:
        """As `Client.ping`."""
        self._run(self._client.ping)

    def health(self) -> Health:
        """As `Client.health`."""
        return self._run(self._client.health)

    def stats(self) -> Stats:
        """As `Client.stats`."""
        return self._run(self._client.stats)

    def model_info(self) -> ModelInfo:
        """As `Client.model_info`."""
        return self._run(self._client.model_info)

    def drain(self) -> None:
        """As `Client.drain`."""
        self._run(self._client.drain)

    def close(self) -> None:
        """Close the connection and end the thread. Does nothing the second time, nor in a forked child."""
        if not self._is_forked:
            self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        self._check_process()
        return self._thread.run(ask)
