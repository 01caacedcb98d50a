"""Clients of the RPC: `Client` for asyncio, `SyncClient` for scripts. Imports neither torch nor numpy.

    async with await Client.connect("127.0.0.1:7071") as client:
        await client.wait_ready()  # a server that has just been started still loads its model
        async for delta in client.generate(messages=[{"role": "user", "content": "Hi"}], max_tokens=32):
            print(delta.text, end="")

`generate` gives a `Generation`: an iterator of Deltas; afterwards its `final` holds the last record. Leaving the
loop early, or cancelling the task that runs it, cancels the request at the server. A refusal or failure is
raised as the class of `engine.errors` that its code names; what no message can carry, and what the server's limits
refuse, is refused before anything is sent. Output that nobody takes stays at the server, but for a bounded part.

What came is `generation.answer()`: text, thoughts and calls of tools apart, where the model marks them. A
conversation with tools, `run` being yours:

    while (answer := await client.ask(messages=messages, tools=tools)).tool_calls:
        messages.append(answer.turn)
        for call in answer.tool_calls:
            result = run(call.name, call.arguments)
            messages.append({"role": "tool", "content": result, "tool_call_id": call.id, "name": call.name})

Waits can be limited:

    client = await Client.connect("127.0.0.1:7071", timeout_s=5.0)  # ConnectionLost
    await client.wait_ready(timeout_s=600.0)  # TimeoutError
    generation = client.generate(text="Hi", deadline_s=30.0)  # ends with what there is by then
    await generation.accepted(timeout_s=1.0)  # TimeoutError, or the refusal
    delta = await generation.next(timeout_s=5.0)  # TimeoutError; the generation goes on

A lost connection ends its generations with ConnectionLost, unless the client may mend it, and they go on then:

    client = await Client.connect("127.0.0.1:7071", reconnect=True)  # or a Reconnect, with limits of its own
    generation = client.resume(request_id, received=[17])  # by hand: the answer from its 18th token on
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Self, TypeVar, cast

from cierzo.engine.errors import ConnectionLost, CoreFailed, Draining, InvalidRequest, VersionMismatch
from cierzo.engine.frontend.address import Address, TcpAddress, parse_address
from cierzo.engine.frontend.answer import Answer
from cierzo.engine.frontend.arguments import generate_message, whole_answer
from cierzo.engine.frontend.client_link import ClientLink
from cierzo.engine.frontend.generation import Generation
from cierzo.engine.frontend.loop_thread import LoopThread
from cierzo.engine.frontend.one_process import OneProcess
from cierzo.engine.frontend.session import Reconnect, Session
from cierzo.engine.frontend.sync_generation import SyncGeneration
from cierzo.engine.messages import (
    FEATURES,
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    ChatMessage,
    Drain,
    Final,
    GetHealth,
    GetModel,
    GetStats,
    Health,
    ModelInfo,
    Ping,
    SamplingParams,
    Stats,
    Tool,
    Welcome,
)

__all__ = ["Client", "Generation", "Reconnect", "SyncClient", "SyncGeneration"]

CONNECT_TIMEOUT_S = 10.0
FIRST_READY_POLL_S, LONGEST_READY_POLL_S = 0.05, 1.0
Message = ChatMessage | Mapping[str, Any]
T = TypeVar("T")


class Client:
    """A connection to a server, for any number of generations at a time. For use on one event loop."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @classmethod
    async def connect(
        cls,
        address: str,
        timeout_s: float = CONNECT_TIMEOUT_S,
        *,
        reconnect: bool | Reconnect = False,
        keepalive_s: float | None = None,
        features: Iterable[str] = FEATURES,
    ) -> Self:
        """Connect to "HOST:PORT" or "unix:PATH".

        reconnect: mend lost connections, and go on with what was open on them; where the server has the feature
        "resume". keepalive_s: seconds after which a silent server, of which something is awaited, is pinged; as
        many later the connection counts as lost (None: what the server tells, else 20). features: of the protocol,
        to be asked for; who needs few of them costs both sides less.
        Raises ConnectionLost where no server answers, ProtocolError where something else does, or the refusal.
        """
        where, features = parse_address(address), _known(features)

        async def again() -> ClientLink:
            return await _connected(where, timeout_s, keepalive_s, features, is_known=True)

        policy = reconnect if isinstance(reconnect, Reconnect) else Reconnect() if reconnect else None
        return cls(Session(await _connected(where, timeout_s, keepalive_s, features), again, policy))

    @property
    def welcome(self) -> Welcome:
        """The server's description of itself, its limits, and the features that it grants."""
        return self._session.link.welcome

    def generate(
        self,
        *,
        text: str | None = None,
        messages: Message | Iterable[Message] | None = None,
        token_ids: Iterable[Any] | None = None,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        output_token_ids: Iterable[Any] | None = None,
        tools: Iterable[Tool | Mapping[str, Any]] | None = None,
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
        suffix: str | None = None,
        reasoning_effort: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        deltas: bool = True,
        idempotency_key: str | None = None,
        **params: Any,
    ) -> Generation:
        """Send a request now, and give what iterates over its answer.

        Exactly one of `text`, `messages`, `token_ids`. Further keywords are the fields of SamplingParams
        (`max_tokens`, `temperature`, `seed`, `stop`, ...), on top of `sampling` if that is given. The other
        arguments are those of `messages.Generate`; messages, tools and calls may also have the fields that OpenAI's
        and Mistral's interfaces give them. Raises InvalidRequest for an unknown keyword, for what no
        message can carry and for what the server's limits refuse, FrameTooLarge for more than it reads, Overloaded
        for one request too many; the server's own refusals are raised by the iteration.
        """
        message = generate_message(
            text=text,
            messages=messages,
            token_ids=token_ids,
            sampling=sampling,
            output_token_ids=output_token_ids,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            suffix=suffix,
            reasoning_effort=reasoning_effort,
            priority=priority,
            deadline_s=deadline_s,
            deltas=deltas,
            idempotency_key=idempotency_key,
            **params,
        )
        return self._session.generate(message)

    def resume(self, request_id: str, received: Iterable[int]) -> Generation:
        """Go on with a request, of a lost connection or of another client's, behind its first tokens.

        request_id: that of its `Generation.accepted()`. received: how many tokens of each sample the caller has.
        Raises InvalidRequest where the server has not granted the feature "resume", the iteration NotFound.
        """
        return self._session.resume(request_id, received)

    async def cancel_request(self, request_id: str) -> None:
        """Cancel a request by its id, whichever connection it is of. Raises NotFound."""
        await self._session.cancel_request(request_id)

    async def complete(self, **arguments: Any) -> Final:
        """As `generate`, but the whole answer at once: `final.samples[i].text`, `.token_ids`, `.logprobs`."""
        return (await self._whole(arguments)).final

    async def ask(self, **arguments: Any) -> Answer:
        """As `complete`, but what was said: text, thoughts and calls of sample 0, and the turn that they are."""
        return (await self._whole(arguments)).answer()

    async def _whole(self, arguments: dict[str, Any]) -> Generation:
        generation = self.generate(**whole_answer(arguments))
        async for _ in generation:
            pass
        return generation

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until the server takes requests; that it still loads its model, or finds its core hung, is no error.

        Raises Draining or CoreFailed if it never will, and TimeoutError with the state seen last.
        """
        state, pause_s = "unknown, as it does not answer", FIRST_READY_POLL_S
        try:
            async with asyncio.timeout(timeout_s):
                while (state := (await self.health()).state) in ("loading", "stalled"):
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
        await self._session.call(Ping)

    async def health(self) -> Health:
        """The server's state: loading, ready, stalled, draining or failed."""
        return cast(Health, await self._session.call(GetHealth))

    async def stats(self) -> Stats:
        """Counters and gauges of the server."""
        return cast(Stats, await self._session.call(GetStats))

    async def model_info(self) -> ModelInfo:
        """Describe the model that is served, and its limits."""
        return cast(ModelInfo, await self._session.call(GetModel))

    async def drain(self, *, undo: bool = False) -> None:
        """Have the server take nothing more, and wait until it has finished what it had, or, after its `drain_s`,
        has ended that as Interrupted. undo: have it take requests again."""
        await self._session.call(Drain, undo=undo)

    async def close(self) -> None:
        """Close the connection; what still runs is cancelled by the server, and fails here with ConnectionLost."""
        await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


def _known(features: Iterable[str]) -> tuple[str, ...]:
    """The features, if each is one that there is; raises InvalidRequest."""
    for feature in (features := tuple(features)):
        if feature not in FEATURES:
            limit = ", ".join(FEATURES)
            raise InvalidRequest(
                f"there is no feature {feature!r}, only {limit}", field="features", limit=limit, value=feature
            )
    return features


async def _connected(
    where: Address, timeout_s: float, keepalive_s: float | None, features: tuple[str, ...], is_known: bool = False
) -> ClientLink:
    """A connection that was welcomed, by a server of this version or the one before. `is_known`: it has welcomed us
    before."""
    until_s = asyncio.get_running_loop().time() + timeout_s
    try:
        return await _welcomed(where, PROTOCOL_VERSION, features, until_s, timeout_s, keepalive_s, is_known)
    except VersionMismatch as error:
        if error.limit != str(OLDEST_VERSION):
            raise
    return await _welcomed(where, OLDEST_VERSION, (), until_s, timeout_s, keepalive_s, is_known)


async def _welcomed(
    where: Address,
    version: int,
    features: tuple[str, ...],
    until_s: float,
    timeout_s: float,
    keepalive_s: float | None,
    is_known: bool,
) -> ClientLink:
    loop = asyncio.get_running_loop()
    link = ClientLink(
        loop, str(where), version=version, features=features, keepalive_s=keepalive_s, is_known=is_known
    )

    def protocol() -> ClientLink:
        return link

    try:
        async with asyncio.timeout_at(until_s):
            if isinstance(where, TcpAddress):
                await loop.create_connection(protocol, where.host, where.port)
            else:
                await loop.create_unix_connection(protocol, where.path)
            await link.welcomed
            return link
    except BaseException as error:
        link.close()
        if isinstance(error, OSError):  # a TimeoutError too
            raise ConnectionLost(_unanswered(where, link, error, timeout_s)) from error
        raise


def _unanswered(where: Address, link: ClientLink, error: Exception, timeout_s: float) -> str:
    """The reason why there is no client, in words: a TimeoutError of asyncio has none."""
    if link.is_connected:
        return f"{where} takes connections, but did not say welcome within {timeout_s:g} s{link.question}"
    return f"no server answers at {where}: {str(error) or f'not connected within {timeout_s:g} s'}"


class SyncClient(OneProcess):
    """`Client` for scripts: the same methods, blocking. Its event loop runs in a thread; any thread may call.

        with SyncClient("127.0.0.1:7071") as client:
            client.wait_ready(timeout_s=600.0)
            generation = client.generate(text="Hi", max_tokens=32)
            while (delta := generation.next(timeout_s=5.0)) is not None:  # or: for delta in generation
                print(delta.text, end="")

    After `close`, and in threads that wait while it is called, everything raises ConnectionLost.
    """

    def __init__(
        self,
        address: str,
        timeout_s: float = CONNECT_TIMEOUT_S,
        *,
        reconnect: bool | Reconnect = False,
        keepalive_s: float | None = None,
        features: Iterable[str] = FEATURES,
    ) -> None:
        """Connect; arguments and errors are those of `Client.connect`."""
        super().__init__()
        self._thread = LoopThread("cierzo-client")

        async def connect() -> Client:
            client = await Client.connect(
                address, timeout_s, reconnect=reconnect, keepalive_s=keepalive_s, features=features
            )
            return await self._thread.exits.enter_async_context(client)

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
            return self._client._session.generate(message)

        return SyncGeneration(self._run(send), self._run)

    def resume(self, request_id: str, received: Iterable[int]) -> SyncGeneration:
        """As `Client.resume`; iterate with `for`."""
        tokens = [*received]

        async def send() -> Generation:
            return self._client.resume(request_id, tokens)

        return SyncGeneration(self._run(send), self._run)

    def cancel_request(self, request_id: str) -> None:
        """As `Client.cancel_request`."""
        self._run(lambda: self._client.cancel_request(request_id))

    def complete(self, **arguments: Any) -> Final:
        """As `Client.complete`."""
        return self._whole(arguments).final

    def ask(self, **arguments: Any) -> Answer:
        """As `Client.ask`."""
        return self._whole(arguments).answer()

    def _whole(self, arguments: dict[str, Any]) -> SyncGeneration:
        generation = self.generate(**whole_answer(arguments))
        for _ in generation:
            pass
        return generation

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

    def drain(self, *, undo: bool = False) -> None:
        """As `Client.drain`."""
        self._run(lambda: self._client.drain(undo=undo))

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
