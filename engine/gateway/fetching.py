"""Images that are fetched for who asks, from hosts that the server's owner has named.

A name is resolved once, and the address that was found is the one that is dialled, so that it cannot be another one
by then. It must be a public one. Nothing is followed elsewhere; size and time are bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import SplitResult

import httptools

from cierzo import __version__
from cierzo.engine.errors import CierzoError, InvalidRequest
from cierzo.engine.frontend.pool import Pool
from cierzo.engine.gateway.asked_images import PORTS, address

FETCH_S = 10.0  # for all of an answer, from the name's resolution to the last byte
READ_BYTES = 64 * 1024
MAX_HEAD_BYTES = 64 * 1024
AT_ONCE = 4  # of one request
RETRY_AFTER_S = 1.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # addresses of IPv4, private ones too
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(found: Address) -> bool:
    """Whether an address is one of the internet at large, and not of this machine or a network of its own."""
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if inner is not None:
            return is_public(inner)
        if found in _NAT64:
            return is_public(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF))
    return found.is_global and not found.is_multicast


class Fetching:
    """Fetches images. Bytes that have come are charged to `arriving` until their request has them."""

    def __init__(
        self,
        hosts: tuple[str, ...],
        max_bytes: int,
        arriving: Pool,
        *,
        allows: Callable[[Address], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """max_bytes: of a file. allows, tls: other rules for addresses and certificates, for tests."""
        self._hosts = hosts
        self._max_bytes = max_bytes
        self._arriving = arriving
        self._allows = allows
        self._tls = tls

    async def fetch(self, wanted: Iterable[tuple[str, str]], tenant: str) -> list[bytes]:
        """The files at these addresses, each behind its place in the body. They are charged to nobody any more.

        Raises InvalidRequest for the first that cannot be had, Overloaded where there is no room for them.
        """
        gate, charged = asyncio.Semaphore(AT_ONCE), [0]

        async def one(place: str, url: str) -> bytes:
            async with gate:
                return await self._one(place, url, tenant, charged)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(place, url)) for place, url in wanted]
        except BaseExceptionGroup as errors:
            raise next((each for each in errors.exceptions if isinstance(each, CierzoError)), errors) from None
        finally:
            self._arriving.add(tenant, -charged[0])
        return [task.result() for task in tasks]

    async def _one(self, place: str, url: str, tenant: str, charged: list[int]) -> bytes:
        parts = address(place, url, self._hosts)
        try:
            async with asyncio.timeout(FETCH_S):
                reader, writer = await self._dial(place, parts)
                try:
                    return await self._ask(place, parts, reader, writer, tenant, charged)
                finally:
                    writer.transport.abort()
        except TimeoutError:
            raise _failed(place, f"it did not come within {FETCH_S:g} s", f"{FETCH_S:g} s", "longer") from None
        except (OSError, httptools.HttpParserError) as error:
            said = f"{type(error).__name__}: {error}"[:200]
            raise _failed(place, said, "an image that can be had", said) from None

    async def _dial(self, place: str, parts: SplitResult) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the address that the name has now."""
        assert parts.hostname is not None
        loop, port = asyncio.get_running_loop(), parts.port or PORTS[parts.scheme]
        found = await loop.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        where = [ipaddress.ip_address(each[4][0]) for each in found]
        for each in where:
            if not self._allows(each):
                raise _failed(place, "its host is at no public address", "a public address", parts.hostname)
        tls: dict[str, Any] = {}
        if parts.scheme == "https":
            tls = {"ssl": self._tls or ssl.create_default_context(), "server_hostname": parts.hostname}
        return await asyncio.open_connection(str(where[0]), port, limit=READ_BYTES, **tls)

    async def _ask(
        self,
        place: str,
        parts: SplitResult,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        tenant: str,
        charged: list[int],
    ) -> bytes:
        host = parts.netloc
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: cierzo/{__version__}\r\nAccept: image/*\r\n"
        writer.write(f"{head}Accept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii"))
        answer = _Answer()
        parser = httptools.HttpResponseParser(answer)
        num_bytes = 0
        while not answer.is_complete and (data := await reader.read(READ_BYTES)):
            num_bytes += len(data)
            self._arriving.require(tenant, len(data), RETRY_AFTER_S)
            self._arriving.add(tenant, len(data))
            charged[0] += len(data)
            parser.feed_data(data)
            if answer.has_head and (status := parser.get_status_code()) != 200:
                raise _failed(place, f"its host answers with status {status}", "status 200", status)
            if answer.is_encoded:
                raise _failed(place, "its host sends it compressed", "identity", answer.encoding)
            size = max(len(answer.body), answer.length)
            if size > self._max_bytes:
                what = f"it has {size} bytes or more"
                raise _failed(place, what, f"{self._max_bytes} bytes (max_fetched_bytes)", size)
            if not answer.has_head and num_bytes > MAX_HEAD_BYTES:
                raise _failed(place, "its head is too long", f"{MAX_HEAD_BYTES} bytes", num_bytes)
        if not answer.is_complete and (answer.length or answer.is_chunked or not answer.has_head):
            raise _failed(place, "it ends in the middle", "a whole answer", f"{len(answer.body)} bytes")
        return bytes(answer.body)


class _Answer:
    """An answer, as far as httptools has found it."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.length = 0
        self.encoding = ""
        self.has_head = self.is_complete = self.is_chunked = False

    @property
    def is_encoded(self) -> bool:
        return self.encoding not in ("", "identity")

    def on_header(self, name: bytes, value: bytes) -> None:
        match name.lower():
            case b"content-length":
                with contextlib.suppress(ValueError):
                    self.length = int(value)
            case b"content-encoding":
                self.encoding = value.decode("latin-1").strip().lower()
            case b"transfer-encoding":
                self.is_chunked = True

    def on_headers_complete(self) -> None:
        self.has_head = True

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.is_complete = True


def _failed(place: str, why: str, limit: str, value: object) -> InvalidRequest:
    return InvalidRequest(f"{place} cannot be fetched: {why}", field=place, limit=limit, value=value)
