"""Clients on TLS by the standard library's own means, and what a server's log says of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import msgspec

from cierzo.engine.frontend.frames import pack
from cierzo.engine.messages import (
    Hello,
    ServerMessage,
    Welcome,
)


class Peer:
    """A client on TLS by the standard library's own means."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def say(self, *messages):
        self.writer.write(bytes(pack(messages)))

    async def hear(self):
        size = int.from_bytes(await self.reader.readexactly(4), "big")
        return msgspec.msgpack.decode(await self.reader.readexactly(size), type=ServerMessage)

    async def hear_until(self, kind):
        while not isinstance(message := await self.hear(), kind):
            pass
        return message


@contextlib.asynccontextmanager
async def connected(house, context, hello=Hello(client="test")):  # noqa: B008, it is frozen
    """A connection that was welcomed."""
    host, port = house.address.split(":")
    peer = Peer(*await asyncio.open_connection(host, int(port), ssl=context, server_hostname="localhost"))
    try:
        peer.say(hello)
        assert isinstance(await peer.hear(), Welcome)
        yield peer
    finally:
        peer.writer.close()
        with contextlib.suppress(OSError):
            await peer.writer.wait_closed()


def address_of(house):
    host, port = house.address.split(":")
    return host, int(port)


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
