"""A whole front end on loopback with a fake core in the same event loop, and a tokenizer whose ids are bytes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest
import tokenizers
import uvloop
from fake_rpc_server import Script, scripted
from tokenizers import decoders, models, pre_tokenizers, processors

from cierzo.engine.frontend.chat import ChatTemplate
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.core_link import CoreLink, Spawn
from cierzo.engine.frontend.encoders import Encoders
from cierzo.engine.frontend.encoding import Encoded, Job, Refused, RequestEncoder, packed
from cierzo.engine.frontend.flights import Flights
from cierzo.engine.frontend.frames import Buffer, FrameSplitter, pack
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.prompt import PromptEncoder
from cierzo.engine.frontend.room import Room
from cierzo.engine.frontend.rpc import RpcServer
from cierzo.engine.frontend.tokenizer import Tokenizer
from cierzo.engine.frontend.tokenizer_config import TokenizerConfig
from cierzo.engine.messages import (
    Abort,
    CoreCommand,
    CoreError,
    CoreStats,
    Finish,
    Hello,
    Message,
    ModelInfo,
    Ready,
    ServerMessage,
    Shutdown,
    StepOutput,
    Submit,
    TokenDelta,
    TokenLogprobs,
    Welcome,
)

BOS, EOS, VOCAB = 256, 257, 300
Answer = Callable[[Submit, int], list[int]]  # (request, sample) -> all its output tokens


class FakeEngineConfig(msgspec.Struct, frozen=True):
    """Stands for the EngineConfig that a core is sent."""

    name: str = "fake"


def plain_answer(submit: Submit, sample: int) -> list[int]:
    """`max_tokens` tokens that depend on prompt, seed, sample and position."""
    start = sum(submit.prompt_token_ids) + (submit.sampling.seed or 0) + 17 * sample
    return [(start + 7 * position) % 256 for position in range(submit.sampling.max_tokens)]


@dataclass
class Sequence:
    submit: Submit
    answer: list[int]
    done: int


class FakeCore(asyncio.Protocol):
    """One life of a core process: speaks the pipe's protocol, one token per running sequence and step.

    Runs freely while `gate` is set; with the gate closed, `step()` runs one step. `error` instead of Ready, if set.
    """

    def __init__(self, owner: FakeCores) -> None:
        self.owner = owner
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.hello: bytes | None = None
        self.submits: list[Submit] = []
        self.aborts: list[Abort] = []
        self.running: dict[tuple[int, int], Sequence] = {}
        self.splitter = FrameSplitter(1 << 30)
        self.transport: asyncio.Transport | None = None
        self.scheduled = False
        self.deaf = False  # hears nothing, and says nothing unless told to: as if stopped

    pid = 0  # it gives no signs of life: nobody looks for its process

    async def wait(self) -> int:
        return await asyncio.shield(self.exited)

    def kill(self) -> None:
        """What the link calls, and what a test calls to see the core die."""
        if self.exited.done():
            raise ProcessLookupError
        if self.transport is not None:
            self.transport.abort()
        self.exited.set_result(-9)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.exited.done():
            self.exited.set_result(0)

    def data_received(self, data: bytes) -> None:
        if self.deaf:
            return
        for body in self.splitter.feed(data):
            if self.hello is None:
                self.hello = bytes(body)
                if self.owner.silent:
                    self.owner.news.set()
                    return
                error = self.owner.error
                self.say(Ready(startup="fake core") if error is None else error)
                if error is not None:
                    self.kill()
                continue
            command = msgspec.msgpack.decode(body, type=CoreCommand)
            if isinstance(command, Submit):
                self.submit(command)
            elif isinstance(command, Abort):
                self.abort(command)
            elif isinstance(command, Shutdown) and self.transport is not None:
                self.transport.close()
        self.owner.news.set()
        self.go_on()

    def submit(self, submit: Submit) -> None:
        self.submits.append(submit)
        for sample in range(submit.first_sample, submit.first_sample + submit.sampling.n):
            key = (submit.request_id, sample)
            assert key not in self.running
            answer = self.owner.answer(submit, sample)
            assert answer[: len(submit.output_token_ids)] == submit.output_token_ids
            self.running[key] = Sequence(submit, answer, len(submit.output_token_ids))

    def abort(self, abort: Abort) -> None:
        self.aborts.append(abort)
        keys = [k for k in self.running if k[0] == abort.request_id and abort.sample in (None, k[1])]
        self.say(StepOutput(deltas=[self.end(key, abort.reason) for key in keys]))

    def end(self, key: tuple[int, int], reason: str, token_ids: tuple[int, ...] = ()) -> TokenDelta:
        sequence = self.running.pop(key)
        stop = token_ids[-1] if reason == "stop" and token_ids else None
        finish = Finish(
            cast(Any, reason), "", stop, len(sequence.submit.prompt_token_ids), sequence.done, 3, 1, 0.1, 0.2, 0.3
        )
        return TokenDelta(*key, list(token_ids), self.logprobs(sequence, token_ids), finish)

    def logprobs(self, sequence: Sequence, token_ids: tuple[int, ...]) -> list[TokenLogprobs] | None:
        if sequence.submit.sampling.logprobs is None:
            return None
        return [TokenLogprobs(token, -1.0, [token, 0], [-1.0, -2.0]) for token in token_ids]

    def step(self) -> None:
        """One token for every running sequence."""
        deltas = []
        for key, sequence in list(self.running.items()):
            token = sequence.answer[sequence.done]
            sequence.done += 1
            sampling = sequence.submit.sampling
            stops = (*sampling.stop_token_ids, *([] if sampling.ignore_eos else [EOS]))
            if token in stops and sequence.done >= sampling.min_tokens:
                deltas.append(self.end(key, "stop", (token,)))
            elif sequence.done == len(sequence.answer):
                deltas.append(self.end(key, "length", (token,)))
            else:
                deltas.append(TokenDelta(*key, [token], self.logprobs(sequence, (token,)), None))
        self.say(StepOutput(deltas=deltas, stats=CoreStats(running=len(self.running), total_blocks=9)))

    def go_on(self) -> None:
        if not self.scheduled and self.running and self.owner.free and self.transport is not None:
            self.scheduled = True
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        self.scheduled = False
        if self.running and self.owner.free and not self.deaf and not self.exited.done():
            self.step()
            self.go_on()

    def say(self, message: Message) -> None:
        assert self.transport is not None
        self.transport.write(pack([message]))


@dataclass
class FakeCores:
    """The `Spawn` of the tests: every core that was started, and how they behave."""

    answer: Answer = plain_answer
    free: bool = True
    error: CoreError | None = None
    silent: bool = False
    lives: list[FakeCore] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, path: str) -> FakeCore:
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
        core = FakeCore(self)
        self.lives.append(core)
        await asyncio.get_running_loop().create_unix_connection(lambda: core, path)
        return core

    @property
    def now(self) -> FakeCore:
        """The one that lives."""
        return self.lives[-1]

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until `condition` holds; it is looked at whenever a command has come."""
        while not condition():
            self.news.clear()
            await self.news.wait()


@dataclass
class House:
    """A running front end."""

    frontend: Frontend
    server: RpcServer
    link: CoreLink
    cores: FakeCores

    @property
    def address(self) -> str:
        return self.server.address


class FakeClock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class LocalEncoders:
    """Encodes in the event loop, a turn later: for tests where a process is not the point."""

    encoder: RequestEncoder
    room: Room

    def submit(
        self, job: Job, body: Buffer, attached: list[Buffer], deadline_at_s: float
    ) -> asyncio.Future[Encoded]:
        num_bytes = len(body) + sum(map(len, attached))
        self.room.take(num_bytes)
        future: asyncio.Future[Encoded] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: self.room.give(num_bytes))
        asyncio.get_running_loop().call_soon(self._answer, future, job, bytes(body), b"".join(attached))
        return future

    def _answer(self, future: asyncio.Future[Encoded], job: Job, body: bytes, attached: bytes) -> None:
        if future.done():
            return
        first, *rest = self.encoder.answer(job, body, attached if job.has_attached else None)
        answer = msgspec.msgpack.decode(first, type=Encoded | Refused)
        if isinstance(answer, Refused):
            future.set_exception(answer.error())
            return
        submit = msgspec.structs.replace(answer.submit, prompt_token_ids=packed(rest[0]))
        future.set_result(msgspec.structs.replace(answer, submit=submit))


def byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are bytes, 256 and 257 begin and end a text, 258 is an added word with a space in it."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    from cierzo.engine.frontend.tokenizer import _BYTE_OF

    vocabulary = {char: _BYTE_OF[char] for char in alphabet}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    inner.add_tokens(["<two words>"])
    inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])
    eos_token = tokenizers.AddedToken("</s>", special=True)
    return Tokenizer(inner, TokenizerConfig(named={"eos_token": eos_token}))


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if reasoning_effort %}({{ reasoning_effort }}){% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture
def prompts(tokenizer: Tokenizer) -> PromptEncoder:
    return PromptEncoder(tokenizer, ChatTemplate(TEMPLATE, "<s>", "</s>"))


@pytest.fixture
def run() -> Callable[..., None]:
    """Run a test's coroutine on uvloop, and see that it leaves no task behind."""

    async def watched(body: Coroutine[Any, Any, None], limit_s: float) -> None:
        before = asyncio.all_tasks()
        async with asyncio.timeout(limit_s):
            await body
        left = asyncio.all_tasks() - before
        assert not left, left

    return lambda body, limit_s=20.0: uvloop.run(watched(body, limit_s))


@pytest.fixture
def serving(prompts: PromptEncoder) -> Callable[..., AbstractAsyncContextManager[House]]:
    """`async with serving(max_samples=2) as house`: the keywords are FrontendConfig's, and some of our own."""

    @asynccontextmanager
    async def start(
        *,
        cores: FakeCores | None = None,
        text: bool = True,
        clock: Callable[[], float] | None = None,
        engine_config: msgspec.Struct = FakeEngineConfig(),  # noqa: B008, it is frozen
        spawn: Spawn | None = None,
        flights: Flights | None = None,
        encoders: Encoders | None = None,
        **limits: Any,
    ) -> AsyncIterator[House]:
        config = FrontendConfig(**{"address": "127.0.0.1:0", **limits})
        encoder = prompts if text else PromptEncoder()
        cores = cores or FakeCores()
        clocks = {} if clock is None else {"clock": clock}
        link = CoreLink(config, engine_config, spawn or cores, flights=flights, **clocks)
        pool = encoders or LocalEncoders(RequestEncoder(encoder, config, model(text)), Room(config))
        frontend = Frontend(config, model(text), encoder, link, pool, **clocks)
        server = RpcServer(config, frontend)
        await server.start()
        try:
            if encoders is not None:
                encoders.start()
            await link.start(frontend.core)
            yield House(frontend, server, link, cores)
        finally:
            await server.close()
            await frontend.close()
            if encoders is not None:
                await encoders.close()
            await link.close()

    return start


def model(text: bool = True) -> ModelInfo:
    """What the fake core serves."""
    return ModelInfo(
        stream=0,
        name="fake",
        architecture="none",
        dtype="float32",
        device="cpu",
        vocab_size=VOCAB,
        max_model_len=4096,
        block_tokens=16,
        num_blocks=64,
        eos_token_ids=[EOS],
        has_tokenizer=text,
        has_chat_template=text,
    )


@pytest.fixture
def cores() -> FakeCores:
    return FakeCores()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def model_info() -> ModelInfo:
    return model()


class Peer:
    """A client that may say anything."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def raw(self, data: bytes) -> None:
        self.writer.write(data)

    def frame(self, body: bytes) -> None:
        self.raw(len(body).to_bytes(4, "big") + body)

    def say(self, message: object) -> None:
        self.frame(msgspec.msgpack.encode(message))

    async def hear(self) -> Any:
        """The next message, None at the end of the connection."""
        try:
            size = int.from_bytes(await self.reader.readexactly(4), "big")
            return msgspec.msgpack.decode(await self.reader.readexactly(size), type=ServerMessage)
        except (asyncio.IncompleteReadError, ConnectionResetError):
            return None

    async def hear_until(self, kind: type) -> Any:
        """The next message of a kind; others are passed over."""
        while not isinstance(message := await self.hear(), kind | None):
            pass
        return message

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


HELLO = Hello(client="test")


@pytest.fixture
def peering() -> Callable[..., AbstractAsyncContextManager[Peer]]:
    """`async with peering(house) as peer`: connected and, unless `hello=None`, welcomed."""

    @asynccontextmanager
    async def connect(house: House, hello: Hello | None = HELLO) -> AsyncIterator[Peer]:
        host, port = house.address.split(":")
        peer = Peer(*await asyncio.open_connection(host, int(port)))
        try:
            if hello is not None:
                peer.say(hello)
                assert isinstance(await peer.hear(), Welcome)
            yield peer
        finally:
            await peer.close()

    return connect


@dataclass
class Served:
    """A front end whose loop runs in another thread, for clients that block."""

    house: House
    loop: asyncio.AbstractEventLoop

    @property
    def address(self) -> str:
        return self.house.address

    def do(self, ask: Callable[[], Any]) -> Any:
        """Call a function in that thread, and wait for what it gives."""

        async def call() -> Any:
            answer = ask()
            return await answer if asyncio.iscoroutine(answer) else answer

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(20)


@pytest.fixture
def served(serving: Callable[..., AbstractAsyncContextManager[House]], cores: FakeCores) -> Iterator[Served]:
    loop, stop = uvloop.new_event_loop(), asyncio.Event()
    started: concurrent.futures.Future[House] = concurrent.futures.Future()

    async def serve() -> None:
        async with serving(cores=cores) as house:
            started.set_result(house)
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    yield Served(started.result(20), loop)
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@dataclass
class Scripted:
    """A scripted server whose loop runs in another thread, for clients that block."""

    address: str
    loop: asyncio.AbstractEventLoop

    def wait(self, ask: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """The result of a coroutine that runs in that thread."""
        return asyncio.run_coroutine_threadsafe(ask(), self.loop).result(20)


@pytest.fixture
def scripting() -> Iterator[Callable[..., Scripted]]:
    """Start a server that runs a script for each connection; what the script raises, the test raises at its end."""
    started: list[Callable[[], None]] = []

    def start(script: Script, **options: Any) -> Scripted:
        address: concurrent.futures.Future[str] = concurrent.futures.Future()
        loop, stop = uvloop.new_event_loop(), asyncio.Event()

        async def serve() -> None:
            async with scripted(script, **options) as where:
                address.set_result(where)
                await stop.wait()

        thread = concurrent.futures.ThreadPoolExecutor(1)
        ended = thread.submit(loop.run_until_complete, serve())

        def end() -> None:
            loop.call_soon_threadsafe(stop.set)
            try:
                ended.result(20)
            finally:
                thread.shutdown()
                loop.close()

        started.append(end)
        return Scripted(address.result(20), loop)

    yield start
    for end in started:
        end()
