"""An HTTP request under way: its head, its body, whose it is, and its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.frames import Buffer
from cierzo.engine.frontend.pool import Pool
from cierzo.engine.gateway.backend import Backend
from cierzo.engine.gateway.errors import BodyTooLarge, Headers, WrongMediaType

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Any]
Send = Callable[[Event], Any]
PIECE_BYTES = 128 * 1024  # of a long body, written at a time
UNCOUNTED_BYTES = 64 * 1024  # of a body, as much as the connection keeps besides
RETRY_AFTER_S = 1.0
ANYBODY = "default"
JSON = b"application/json"


class Gone(Exception):
    """The caller has gone away: there is nobody to answer."""


class Call:
    """A request, and what is told to its caller. `backend`: the engine for it, once it is known whose it is.

    request_id: the caller's own name of it, or one that was made. headers: of the answer, beside the usual ones.
    """

    __slots__ = (
        *("_counted", "_num_bytes", "_receive", "_send", "backend", "body"),
        *("fields", "has_begun", "headers", "request_id", "scope"),
    )

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, fields: dict[bytes, bytes], request_id: str
    ) -> None:
        self.scope = scope
        self.fields = fields
        self.request_id = request_id
        self.headers: Headers = []
        self.body = b""
        self.has_begun = False
        self.backend: Backend | None = None
        self._num_bytes = self._counted = 0
        self._receive = receive
        self._send = send

    @property
    def engine(self) -> Backend:
        """The engine for it: its caller has been let in."""
        assert self.backend is not None
        return self.backend

    def field(self, name: bytes) -> str:
        """A header of the request, "" if it has none of this name."""
        return self.fields.get(name, b"").decode("latin-1")

    async def read(self, most: int, arriving: Pool) -> None:
        """Read the body, of so many bytes at most. arriving: what all long bodies count in. Raises WrongMediaType
        for what is no plain JSON, BodyTooLarge, Overloaded, and Gone if the caller goes away."""
        if "upgrade" in self.field(b"connection").lower() and (wanted := self.field(b"upgrade")):
            limit = "left out"  # the parser takes what comes behind the head for the other protocol, not for a body
            what = f"no upgrade to {wanted[:100]} is served: have the client speak HTTP/1.1"
            raise InvalidRequest(what, field="upgrade", limit=limit, value=wanted)
        kind = self.field(b"content-type").partition(";")[0].strip().lower()
        if kind != "application/json":
            what = f"the body must be application/json, and is {kind or 'of no media type'}"
            raise WrongMediaType(what, field="content-type", limit="application/json", value=kind)
        coding = self.field(b"content-encoding").strip().lower()
        if coding not in ("", "identity"):
            what = f"a body that is {coding} is not taken: send it plain"
            raise WrongMediaType(what, field="content-encoding", limit="identity", value=coding)
        announced = self.field(b"content-length")
        if announced.isdecimal() and int(announced) > most:
            raise _too_large(most, announced)
        pieces, more = [], True
        while more:
            event = await self._receive()
            if event["type"] == "http.disconnect":
                raise Gone
            pieces.append(event.get("body", b""))
            self._num_bytes += len(pieces[-1])
            if self._num_bytes > most:
                raise _too_large(most, f"more than {most}")
            if self._num_bytes > UNCOUNTED_BYTES:
                self._count(arriving, self._num_bytes)
            more = event.get("more_body", False)
        self.body = pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def forget(self, arriving: Pool) -> None:
        """Let go of the body: all that it says is known."""
        self.body = b""
        self._count(arriving, 0)

    def _count(self, arriving: Pool, num_bytes: int) -> None:
        """Take so much of the pool, in place of what was taken before. Raises Overloaded."""
        more = num_bytes - self._counted
        arriving.require(ANYBODY, more, RETRY_AFTER_S)
        arriving.add(ANYBODY, more)
        self._counted = num_bytes

    def pass_over(self, names: Iterable[str]) -> None:
        """Tell the names of fields that were not looked at."""
        if told := ", ".join(names):
            self.headers.append((b"x-passed-over", told.encode("ascii", "backslashreplace")))

    async def gone(self) -> None:
        """Wait until nobody waits for the answer any more."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def begin(self, status: int, kind: bytes, more: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Send the answer's head; its body comes in pieces."""
        self.has_begun = True
        headers = [(b"content-type", kind), *self.headers, *more]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes | memoryview) -> None:
        """Send a piece of the body, once there is room for it."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """Send the end of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def reply(self, pieces: bytes | Iterable[Buffer], status: int = 200, kind: bytes = JSON) -> None:
        """Send a whole answer."""
        found = [pieces] if isinstance(pieces, bytes) else [*pieces]
        num_bytes = sum(map(len, found))
        await self.begin(status, kind, [(b"content-length", b"%d" % num_bytes)])
        if num_bytes <= PIECE_BYTES:
            await self.end(b"".join(found))
            return
        for piece in found:
            for start in range(0, len(piece), PIECE_BYTES):
                await self.write(memoryview(piece)[start : start + PIECE_BYTES])
        await self.end()


def _too_large(most: int, value: object) -> BodyTooLarge:
    what = f"the body has {value} bytes, allowed at this path: {most}"
    return BodyTooLarge(what, field="body", limit=most, value=value)
