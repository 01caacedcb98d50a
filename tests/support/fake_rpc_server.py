"""A server of the RPC that says what a test has written down, for tests of clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec

from cierzo.engine.frontend.frames import pack
from cierzo.engine.messages import (
    FEATURES,
    Accepted,
    ClientMessage,
    Delta,
    Final,
    Hello,
    Limits,
    Message,
    SampleEnd,
    Timings,
    Usage,
    Welcome,
)

LIMITS = Limits(
    max_frame_bytes=4096,
    max_streams=64,
    max_model_len=4096,
    max_samples=4,
    max_attached_bytes=65536,
    stream_credit_bytes=8192,
    keepalive_s=20.0,
)


class Peer:
    """One client's connection, seen from the server. `hello` is what it began with."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.hello = Hello()
        self._reader = reader
        self._writer = writer

    async def hear(self, kind: type | tuple[type, ...] = object) -> Any:
        """The client's next message, None at the end of the connection; others than `kind` are passed over."""
        while True:
            try:
                size = int.from_bytes(await self._reader.readexactly(4), "big")
                body = await self._reader.readexactly(size)
            except (asyncio.IncompleteReadError, ConnectionError):
                return None
            message = msgspec.msgpack.decode(body, type=ClientMessage)
            if isinstance(message, kind):
                return message

    def say(self, *messages: Message) -> None:
        """Send messages in one write."""
        self._writer.write(bytes(pack(messages)))

    async def flushed(self) -> None:
        """Wait until the client has taken nearly all that was sent."""
        await self._writer.drain()

    def is_stuck(self) -> bool:
        """Whether more than a little is sent that the client does not read."""
        return cast(asyncio.WriteTransport, self._writer.transport).get_write_buffer_size() > 0

    def drop(self) -> None:
        """Lose the connection."""
        cast(asyncio.WriteTransport, self._writer.transport).abort()

    async def close(self) -> None:
        """Close the connection in order."""
        self._writer.close()
        await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)


Script = Callable[[Peer, int], Awaitable[None]]  # a connection that was welcomed, and its number from 0


@asynccontextmanager
async def scripted(
    script: Script, *, features: Iterable[str] = FEATURES, limits: Limits = LIMITS, version: int = 3
) -> AsyncIterator[str]:
    """The address of a server that runs `script` for each connection. Whatever a script raises, the test raises."""
    tasks: list[asyncio.Task[None]] = []
    granted = sorted(features)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        number = len(tasks)
        tasks.append(task)
        peer = Peer(reader, writer)
        try:
            peer.hello = await peer.hear(Hello)
            assert set(granted) <= set(peer.hello.features), "granted what was not asked for"
            assert peer.hello.version == version
            peer.say(Welcome(version=version, server="scripted", model="none", limits=limits, features=granted))
            await script(peer, number)
        finally:
            await peer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.gather(*tasks)


def accepted(stream: int, request_id: str = "ab" * 16, seed: int = 7, queue_position: int = 0) -> Accepted:
    """The first message of an accepted stream."""
    return Accepted(
        stream=stream, request_id=request_id, seed=seed, queue_position=queue_position, deadline_s=3600.0
    )


def delta(stream: int, tokens: Iterable[int], sample: int = 0, text: str | None = None) -> Delta:
    """A delta whose text is its tokens as characters."""
    tokens = [*tokens]
    return Delta(
        stream=stream, sample=sample, token_ids=tokens, text="".join(map(chr, tokens)) if text is None else text
    )


def final(stream: int, output_tokens: int = 0, samples: int = 1, reason: str = "length") -> Final:
    """The last message of a stream."""
    ends = [
        SampleEnd(sample=index, finish_reason=cast(Any, reason), output_tokens=output_tokens)
        for index in range(samples)
    ]
    return Final(
        stream=stream,
        samples=ends,
        usage=Usage(prompt_tokens=1, output_tokens=output_tokens * samples, cached_tokens=0),
        timings=Timings(queue_s=0.0, prefill_s=0.0, decode_s=0.0, total_s=0.0),
        seed=7,
    )
