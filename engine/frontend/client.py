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

A lost connection is made again, and its generations go on from where they were. With several addresses of servers
of one model a request goes to where the fewest are open, what one refuses for now is repeated elsewhere, and an
answer that a server interrupts goes on there:

    client = await Client.connect(["one:7071", "two:7071"])
    client = await Client.connect("one:7071", reconnect=False)  # a lost connection ends its generations, for good
    client = await Client.connect("one:7071", retry=True, default_deadline_s=60.0)  # repeats at one address, too
    generation = client.resume(request_id, received=[17])  # by hand: the answer from its 18th token on

Where the server has keys, or speaks TLS:

    client = await Client.connect("one:7071", key=secret, tls=True)  # or tls="authorities.pem"
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, Self, TypeVar, Unpack, cast

import msgspec

from cierzo.engine.errors import ConnectionLost, CoreFailed, Draining, InvalidRequest, refusal
from cierzo.engine.frontend.address import parse_address
from cierzo.engine.frontend.answer import Answer
from cierzo.engine.frontend.arguments import detokenize_message, generate_message, tokenize_message, whole_answer
from cierzo.engine.frontend.bounds import timeout
from cierzo.engine.frontend.client_options import (
    ConnectOptions,
    ConnectSettings,
    GenerateArguments,
    TokenizeArguments,
)
from cierzo.engine.frontend.dial import Dial, known_features, secret, tls_context
from cierzo.engine.frontend.endpoint import Endpoint
from cierzo.engine.frontend.generation import Generation
from cierzo.engine.frontend.loop_thread import LoopThread
from cierzo.engine.frontend.one_process import OneProcess
from cierzo.engine.frontend.request_frames import require
from cierzo.engine.frontend.retries import Reconnect, Retry
from cierzo.engine.frontend.session import Session, unsent
from cierzo.engine.frontend.sync_generation import SyncGeneration
from cierzo.engine.frontend.wire_checks import MAX_PIECES
from cierzo.engine.messages import (
    Detokenize,
    Detokenized,
    Drain,
    Final,
    GetHealth,
    GetModel,
    GetStats,
    GetTokenizer,
    Health,
    ModelInfo,
    Ping,
    Stats,
    Tokenize,
    Tokenized,
    TokenizerInfo,
    Welcome,
)
from cierzo.engine.settings import settings_of

__all__ = [
    "Client",
    "ConnectOptions",
    "GenerateArguments",
    "Generation",
    "Reconnect",
    "Retry",
    "SyncClient",
    "SyncGeneration",
    "TokenizeArguments",
]

CONNECT_TIMEOUT_S = 10.0
FIRST_READY_POLL_S, LONGEST_READY_POLL_S = 0.05, 1.0
UNREACHABLE = "out of reach"
T = TypeVar("T")


class Client:
    """A server, or several of one model, to ask for any number of generations at a time, on one event loop.

    `connect` makes one, which holds connections until it is closed, as `async with` does at its end.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    @classmethod
    async def connect(
        cls,
        addresses: str | Iterable[str],
        timeout_s: float = CONNECT_TIMEOUT_S,
        **options: Unpack[ConnectOptions],
    ) -> Self:
        """Connect to "HOST:PORT" or "unix:PATH", or to several of them, which serve the same model.

        connections: to each address, 1 to 64 (1). reconnect: mend lost connections, and go on with what was open on
        them, where the server has the feature "resume" (True; a `Reconnect` has bounds of its own). retry: repeat
        requests that were refused for now and certainly did not run, elsewhere or later (None: if there are several
        addresses; a `Retry` has bounds of its own). keepalive_s: seconds after which a silent server, of which
        something is awaited, is pinged; as many later the connection counts as lost (None: what the server tells,
        else 20). default_deadline_s: of requests that have none of their own. features: of the protocol, to be
        asked for; who needs few of them costs both sides less. key: what the server knows its tenant by. tls: True,
        the path of a file of certificates to trust, or an ssl.SSLContext, for addresses that are no Unix sockets
        (None: plain text); tls_certificate, tls_key: paths of what this client proves itself with.
        Raises ConfigError for an unknown option, for a value beyond its bounds, and where TLS does not suit,
        ConnectionLost where no server answers, ProtocolError where something else does, or the refusal:
        Unauthorized, where the server does not take the key.
        """
        session = _session(addresses, timeout_s, options)
        await session.open()
        return cls(session)

    @property
    def welcome(self) -> Welcome:
        """The server's description of itself, its limits, and the features that it grants."""
        return self._session.link.welcome

    def generate(self, **arguments: Unpack[GenerateArguments]) -> Generation:
        """Send a request now, and give what iterates over its answer.

        Exactly one of `text`, `messages`, `token_ids`. Other keywords are the fields of `messages.Generate` and of
        SamplingParams (`max_tokens`, `temperature`, `seed`, `stop`, ...), on top of `sampling` if that is given;
        messages, tools and calls may also have the fields that OpenAI's and Mistral's interfaces give them.
        `images`: the bytes of files, for the parts {"type": "image"} of messages in order.
        `caller_id` and `traceparent` are the caller's own names of it, for the logs of a server that takes them.
        Raises InvalidRequest for an unknown keyword, for what no message can carry and for what the server's limits
        refuse, FrameTooLarge for more than it reads, Overloaded for one request too many; the server's own refusals
        are raised by the iteration. Errors say in `may_have_run` whether a server may have worked on the request.
        """
        with unsent():
            return self._session.generate(generate_message(**arguments))

    def resume(self, request_id: str, received: Iterable[int], prompt_received: int = 0) -> Generation:
        """Go on with a request, of a lost connection or of another client's, behind its first tokens.

        request_id: that of its `Generation.accepted()`. received: how many tokens of each sample the caller has;
        prompt_received: how many log-probabilities of the prompt.
        Raises InvalidRequest where the server has not granted the feature "resume", the iteration NotFound.
        """
        return self._session.resume(request_id, received, prompt_received)

    async def cancel_request(self, request_id: str) -> None:
        """Cancel a request by its id, whichever connection it is of. Raises NotFound."""
        await self._session.cancel_request(request_id)

    async def complete(self, **arguments: Unpack[GenerateArguments]) -> Final:
        """Wait for the whole answer, and give its last record: `final.samples[i].text`, `.token_ids`, `.logprobs`,
        `final.usage`. Arguments and errors are those of `generate`."""
        return (await self._whole(arguments)).final

    async def ask(self, **arguments: Unpack[GenerateArguments]) -> Answer:
        """Wait for the whole answer, and give what the model said: its text, its thoughts, its calls of tools, and
        `turn`, the message to append to a conversation. Arguments and errors are those of `generate`; of several
        samples it is the first."""
        return (await self._whole(arguments)).answer()

    async def _whole(self, arguments: GenerateArguments) -> Generation:
        generation = self.generate(**whole_answer(arguments))
        async for _ in generation:
            pass
        return generation

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until a server takes requests; that it still loads its model, or finds its core hung, is no error.

        Raises Draining or CoreFailed if none ever will, and TimeoutError with the states seen last.
        """
        states, pause_s = ["unknown, as it does not answer"], FIRST_READY_POLL_S
        try:
            async with asyncio.timeout(timeout(timeout_s)):
                while "ready" not in (states := await self._states()):
                    if not {"loading", "stalled", UNREACHABLE}.intersection(states):
                        break
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_READY_POLL_S)
        except TimeoutError:
            seen = ", ".join(states)
            raise TimeoutError(f"the server is not ready after {timeout_s:g} s; its state is {seen}") from None
        if "ready" in states:
            return
        if "draining" in states:
            raise Draining("the server drains: it takes no new requests")
        raise CoreFailed(f"the server takes no requests: its state is {', '.join(states)}")

    async def _states(self) -> list[str]:
        """The state of each server. Raises why none takes this client, where it is no matter of time."""
        endpoints = self._session.endpoints
        refused = [each.error for each in endpoints if not each.links and each.error and not each.error.retry]
        if len(refused) == len(endpoints):
            raise refused[0].with_traceback(None)
        if len(endpoints) == 1:
            return [(await self.health()).state]
        return await asyncio.gather(*map(self._state, endpoints))

    async def _state(self, endpoint: Endpoint) -> str:
        if not endpoint.links:
            endpoint.grow()
            return UNREACHABLE
        try:
            return cast(Health, await self._session.call(GetHealth, endpoint)).state
        except ConnectionLost:
            return UNREACHABLE

    async def ping(self, address: str | None = None) -> None:
        """Ask a server for a sign of life, and wait for it. address: which one of those that this client was given;
        without it, the one that the next request would go to. Says nothing of the model: `health` does."""
        await self._call(Ping, address)

    async def health(self, address: str | None = None) -> Health:
        """The server's state: loading, ready, stalled, draining or failed; where it has the feature "probes" also
        `startup`, `live` and `ready` apart, and `notes`. address: as in `ping`."""
        return cast(Health, await self._call(GetHealth, address))

    async def stats(self, address: str | None = None) -> Stats:
        """Counters and gauges of the server. address: as in `ping`."""
        return cast(Stats, await self._call(GetStats, address))

    async def model_info(self, address: str | None = None) -> ModelInfo:
        """Describe the model that is served, and its limits. address: as in `ping`."""
        return cast(ModelInfo, await self._call(GetModel, address))

    async def tokenize(self, **arguments: Unpack[TokenizeArguments]) -> list[int]:
        """Give the tokens of a prompt, and compute nothing.

        Exactly one of `text` and `messages`; with `messages` also `tools` and `reasoning_effort`. With `text` also
        special_tokens: with what is put around a prompt, such as a beginning-of-text token (True); and
        control_tokens: whether the spelling of a control token is that token, as in no prompt (False).
        Raises InvalidRequest, for more tokens than the model's context has, too.
        """
        return cast(Tokenized, await self._words(tokenize_message(**arguments))).token_ids

    async def detokenize(self, token_ids: Iterable[Any], *, control_tokens: bool = False) -> str:
        """Give the text of tokens. control_tokens: with the spellings of those, which have no text."""
        return cast(Detokenized, await self._words(detokenize_message(token_ids, control_tokens))).text

    async def token_bytes(self, token_ids: Iterable[Any]) -> list[bytes]:
        """Give the bytes of each token, of a control token those of its spelling."""
        return await self._pieces(detokenize_message(token_ids, pieces=True))

    async def _pieces(self, message: Detokenize) -> list[bytes]:
        pieces: list[bytes] = []
        for start in range(0, len(message.token_ids), MAX_PIECES):
            part = message.token_ids[start : start + MAX_PIECES]
            answer: Detokenized = await self._words(msgspec.structs.replace(message, token_ids=part))
            pieces += answer.pieces
        return pieces

    async def _words(self, message: Tokenize | Detokenize) -> Any:
        require(self.welcome, "tokenize", str(type(message).__struct_config__.tag))
        return await self._session.call(partial(msgspec.structs.replace, message))

    async def tokenizer_info(self, address: str | None = None) -> TokenizerInfo:
        """Describe the tokenizer of the model that is served, and tell its chat template. address: as in `ping`.
        Raises Forbidden without the right "stats", where the server has keys."""
        require(self.welcome, "tokenize", "tokenizer_info")
        return cast(TokenizerInfo, await self._call(GetTokenizer, address))

    async def drain(self, address: str | None = None, *, undo: bool = False) -> None:
        """Have the server take nothing more, and wait until it has finished what it had, or, after its `drain_s`,
        has ended that as Interrupted. undo: have it take requests again. address: which server, of several; raises
        InvalidRequest if none of them is named."""
        if address is None and len(self._session.endpoints) > 1:
            limit = ", ".join(endpoint.name for endpoint in self._session.endpoints)
            what = f"address must say which server is to drain: {limit}"
            raise InvalidRequest(what, field="address", limit=limit)
        await self._call(Drain, address, undo=undo)

    async def _call(self, method: Callable[..., Any], address: str | None, **fields: Any) -> Any:
        return await self._session.call(method, self._session.endpoint(address), **fields)

    async def close(self) -> None:
        """Close the connection; what still runs is cancelled by the server, and fails here with ConnectionLost."""
        await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


def _session(addresses: str | Iterable[str], timeout_s: float, options: ConnectOptions) -> Session:
    """The session that the arguments of `Client.connect` ask for, which is not open yet."""
    names = [addresses] if isinstance(addresses, str) else [*addresses]
    endpoints = [*dict.fromkeys(map(parse_address, names))]
    if not endpoints:
        raise refusal("addresses", "at least one", "none")
    known = ConnectSettings.__struct_fields__  # the value of a name that is none may be a secret: it is not told
    given = {name: value if name in known else None for name, value in options.items()}
    settings = settings_of(ConnectSettings, {"timeout_s": timeout_s, **given})
    dial = Dial(
        timeout_s=settings.timeout_s,
        keepalive_s=settings.keepalive_s,
        features=known_features(settings.features),
        key=secret(settings.key),
        tls=tls_context(settings.tls, settings.tls_certificate, settings.tls_key),
    )
    reconnect, retry = settings.reconnect, settings.retry
    retry = len(endpoints) > 1 if retry is None else retry
    return Session(
        endpoints,
        dial.connect,
        connections=settings.connections,
        reconnect=(reconnect if isinstance(reconnect, Reconnect) else Reconnect() if reconnect else None),
        retry=retry if isinstance(retry, Retry) else Retry() if retry else None,
        default_deadline_s=settings.default_deadline_s,
    )


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
        addresses: str | Iterable[str],
        timeout_s: float = CONNECT_TIMEOUT_S,
        **options: Unpack[ConnectOptions],
    ) -> None:
        """Connect; arguments and errors are those of `Client.connect`."""
        super().__init__()
        self._thread = LoopThread("cierzo-client")

        async def connect() -> Client:
            client = await Client.connect(addresses, timeout_s, **options)
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

    def generate(self, **arguments: Unpack[GenerateArguments]) -> SyncGeneration:
        """As `Client.generate`; iterate with `for`."""
        with unsent():
            message = generate_message(**arguments)  # in this thread: an iterable may ask this client as well

            async def send() -> Generation:
                return self._client._session.generate(message)

            return SyncGeneration(self._run(send), self._run)

    def resume(self, request_id: str, received: Iterable[int], prompt_received: int = 0) -> SyncGeneration:
        """As `Client.resume`; iterate with `for`."""
        tokens = [*received]

        async def send() -> Generation:
            return self._client.resume(request_id, tokens, prompt_received)

        return SyncGeneration(self._run(send), self._run)

    def cancel_request(self, request_id: str) -> None:
        """As `Client.cancel_request`."""
        self._run(lambda: self._client.cancel_request(request_id))

    def complete(self, **arguments: Unpack[GenerateArguments]) -> Final:
        """As `Client.complete`."""
        return self._whole(arguments).final

    def ask(self, **arguments: Unpack[GenerateArguments]) -> Answer:
        """As `Client.ask`."""
        return self._whole(arguments).answer()

    def _whole(self, arguments: GenerateArguments) -> SyncGeneration:
        generation = self.generate(**whole_answer(arguments))
        for _ in generation:
            pass
        return generation

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """As `Client.wait_ready`."""
        self._run(lambda: self._client.wait_ready(timeout_s))

    def ping(self, address: str | None = None) -> None:
        """As `Client.ping`."""
        self._run(lambda: self._client.ping(address))

    def health(self, address: str | None = None) -> Health:
        """As `Client.health`."""
        return self._run(lambda: self._client.health(address))

    def stats(self, address: str | None = None) -> Stats:
        """As `Client.stats`."""
        return self._run(lambda: self._client.stats(address))

    def model_info(self, address: str | None = None) -> ModelInfo:
        """As `Client.model_info`."""
        return self._run(lambda: self._client.model_info(address))

    def tokenize(self, **arguments: Unpack[TokenizeArguments]) -> list[int]:
        """As `Client.tokenize`."""
        message = tokenize_message(**arguments)  # in this thread: an iterable may ask this client as well
        return cast(Tokenized, self._run(lambda: self._client._words(message))).token_ids

    def detokenize(self, token_ids: Iterable[Any], *, control_tokens: bool = False) -> str:
        """As `Client.detokenize`."""
        message = detokenize_message(token_ids, control_tokens)
        return cast(Detokenized, self._run(lambda: self._client._words(message))).text

    def token_bytes(self, token_ids: Iterable[Any]) -> list[bytes]:
        """As `Client.token_bytes`."""
        message = detokenize_message(token_ids, pieces=True)
        return self._run(lambda: self._client._pieces(message))

    def tokenizer_info(self, address: str | None = None) -> TokenizerInfo:
        """As `Client.tokenizer_info`."""
        return self._run(lambda: self._client.tokenizer_info(address))

    def drain(self, address: str | None = None, *, undo: bool = False) -> None:
        """As `Client.drain`."""
        self._run(lambda: self._client.drain(address, undo=undo))

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
