"""A whole front end on loopback with a fake core in the same event loop, and a tokenizer whose ids are bytes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import pytest
import trustme
import uvloop
from fake_core import FakeCores, FakeEngineConfig
from fake_rpc_server import Script, scripted

from cierzo.engine.frontend.child import Spawn
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.core_link import CoreLink
from cierzo.engine.frontend.encoders import Encoders
from cierzo.engine.frontend.flights import Flights
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.rpc import RpcServer
from cierzo.engine.messages import (
    Delta,
    Deltas,
    Hello,
    ModelInfo,
    Ping,
    Pong,
    ServerMessage,
    Vocabulary,
    Welcome,
)
from cierzo.engine.testing.local_encoders import local_encoders
from cierzo.engine.testing.words import fake_model, marked_prompts
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.weights.make import make_checkpoint


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
        words: PromptEncoder | None = None,
        clock: Callable[[], float] | None = None,
        engine_config: msgspec.Struct = FakeEngineConfig(),  # noqa: B008, it is frozen
        spawn: Spawn | None = None,
        flights: Flights | None = None,
        encoders: Encoders | None = None,
        vocabulary: Vocabulary | None = None,
        model: ModelInfo | None = None,
        **limits: Any,
    ) -> AsyncIterator[House]:
        config = FrontendConfig(**{"address": "127.0.0.1:0", **limits})
        encoder = words or (prompts if text else PromptEncoder())
        model = model or fake_model(has_tokenizer=text, has_chat_template=text)
        cores = cores or FakeCores()
        clocks = {} if clock is None else {"clock": clock}
        link = CoreLink(config, engine_config, spawn or cores, flights=flights, vocabulary=vocabulary, **clocks)
        pool = encoders or local_encoders(encoder, config, model)
        frontend = Frontend(config, model, encoder, link, pool, **clocks)
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


@pytest.fixture
def cores() -> FakeCores:
    return FakeCores()


@pytest.fixture
def marking(
    serving: Callable[..., AbstractAsyncContextManager[House]], cores: FakeCores
) -> Callable[..., AbstractAsyncContextManager[House]]:
    """A server of a model that marks its thoughts and calls; the keywords are those of `serving`."""
    return lambda **limits: serving(cores=cores, words=marked_prompts(), **limits)


@pytest.fixture
def children() -> list[asyncio.subprocess.Process]:
    """The core processes that were started."""
    return []


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def model_info() -> ModelInfo:
    return fake_model()


class Peer:
    """A client that may say anything."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._batch: list[Delta] = []

    def raw(self, data: bytes) -> None:
        self.writer.write(data)

    def frame(self, body: bytes) -> None:
        self.raw(len(body).to_bytes(4, "big") + body)

    def say(self, message: object) -> None:
        self.frame(msgspec.msgpack.encode(message))

    async def hear(self) -> Any:
        """The next message, whether it came alone or with others; None at the end of the connection."""
        if not self._batch:
            message = await self.hear_frame()
            if not isinstance(message, Deltas):
                return message
            self._batch = [*message.deltas]
        return self._batch.pop(0)

    async def hear_frame(self) -> Any:
        """The message of the next frame, None at the end of the connection."""
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

    async def hear_so_far(self) -> list[Any]:
        """What is said until a ping is answered: by then the server has read all that it was sent."""
        self.say(Ping(stream=99))
        heard = []
        while not isinstance(message := await self.hear(), Pong | None):
            heard.append(message)
        assert message == Pong(stream=99)
        return heard

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
def serves(
    serving: Callable[..., AbstractAsyncContextManager[House]], cores: FakeCores
) -> Iterator[Callable[..., Served]]:
    """Start a front end in another thread; the keywords are those of `serving`."""
    ends: list[Callable[[], None]] = []

    def start(**given: Any) -> Served:
        loop, stop = uvloop.new_event_loop(), asyncio.Event()
        started: concurrent.futures.Future[House] = concurrent.futures.Future()

        async def serve() -> None:
            async with serving(cores=cores, **given) as house:
                started.set_result(house)
                await stop.wait()

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
        thread.start()

        def end() -> None:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()

        ends.append(end)
        return Served(started.result(20), loop)

    yield start
    for end in ends:
        end()


@pytest.fixture
def served(serves: Callable[..., Served]) -> Served:
    return serves()


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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small one; the fake runner reads its config.json alone."""
    return make_checkpoint(tmp_path_factory.mktemp("served") / "tiny", like="small3")


@pytest.fixture
def start(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Start `cierzo serve` on `tmp_path`'s socket, with options; it and its core's process id, once it is ready."""
    servers = []

    def ready(*options: str, stderr: IO[bytes] | None = None) -> tuple[subprocess.Popen[str], int]:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "cierzo", "serve", str(checkpoint), "--runner", "fake"),
                *("--rpc", f"unix:{tmp_path / 'rpc.sock'}", "--flight-folder", "", *options),
            ],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        servers.append(server)
        assert server.stdout is not None
        assert any(line.startswith("ready: tiny at unix:") for line in server.stdout)
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text(encoding="ascii").split()
        return server, int(children[0])

    yield ready
    for server in servers:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


@pytest.fixture(scope="module")
def ca():
    return trustme.CA()


@pytest.fixture
def issue(ca, tmp_path):
    """Write a certificate and its key; the settings that name them."""

    def write(authority=ca, name="server", **options):
        certificate = authority.issue_cert("localhost", "127.0.0.1", **options)
        files = {"tls_certificate": tmp_path / f"{name}.pem", "tls_key": tmp_path / f"{name}.key"}
        chain = b"".join(each.bytes() for each in certificate.cert_chain_pems)
        files["tls_certificate"].write_bytes(chain)
        files["tls_key"].write_bytes(certificate.private_key_pem.bytes())
        return {field: str(path) for field, path in files.items()}

    return write


@pytest.fixture
def client_ca(ca, tmp_path):
    path = tmp_path / "clients.pem"
    ca.cert_pem.write_to_path(str(path))
    return {"tls_client_ca": str(path)}


@pytest.fixture
def trusting(ca):
    """A client's context of one version of TLS, with a certificate of `shown` if that is given."""

    def make(version=ssl.TLSVersion.TLSv1_3, shown=None):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = context.maximum_version = version
        ca.configure_trust(context)
        if shown is not None:
            shown.configure_cert(context)
        return context

    return make
