"""Lines of OpenAI's batch files, and the way from one to its answer: the handlers of HTTP, without HTTP.

What a server refuses for now is asked again for as long as it takes; an answer that failed, a few times.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from typing import Annotated, Any, NoReturn, Unpack

import msgspec
from msgspec import Meta

from cierzo.engine.errors import (
    CierzoError,
    ConnectionLost,
    CoreFailed,
    CoreStalled,
    InvalidRequest,
    KeyReused,
    NotFound,
    ProtocolError,
    Unauthorized,
)
from cierzo.engine.frontend.bounds import must_be
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.client_options import GenerateArguments
from cierzo.engine.frontend.generation import Generation
from cierzo.engine.frontend.retries import Retry, is_worth_repeating
from cierzo.engine.gateway.bodies import Request
from cierzo.engine.gateway.call import Call, Event
from cierzo.engine.gateway.config import HttpConfig
from cierzo.engine.gateway.endpoints import answering, responses
from cierzo.engine.gateway.errors import Failed, Late, Unfinished, encoded
from cierzo.engine.gateway.house import House
from cierzo.engine.gateway.reading import Endpoint
from cierzo.engine.gateway.remote import ClientDesk

URLS = {
    "/v1/chat/completions": answering("chat"),
    "/v1/completions": answering("completions"),
    "/v1/fim/completions": answering("fim"),
    "/v1/responses": responses,
}
MOST_FAILURES = 3  # of one line, until that is its answer
KEYLESS_S = 60.0  # for which no keys are given, once a server has no room for them
NO_ROOM = "max_idempotency_keys"


class Patience(Retry, frozen=True):
    """Repeats without an end what is refused for now; but not for want of room for a key, which a request can do
    without, nor where the server has failed."""

    def pause_s(self, num_tries: int, error: CierzoError) -> float:
        """Seconds to wait."""
        return math.inf if error.field == NO_ROOM or _is_of_core(error) else super().pause_s(num_tries, error)


LONGEST_PAUSE_S = 1.0  # on top of what the server asks for
PATIENCE = Patience(max_attempts=2**31, ratio=1.0, burst=1e9, within_s=1e9, longest_pause_s=LONGEST_PAUSE_S)
PAUSES = Retry(longest_pause_s=LONGEST_PAUSE_S)  # before an answer that was lost is asked for anew


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request of a batch file. body: as it stands there."""

    custom_id: Annotated[str, Meta(min_length=1)]
    method: str
    url: str
    body: msgspec.Raw


class Response(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to a request. passed_over: names of fields that were not looked at."""

    status_code: int
    request_id: str
    body: msgspec.Raw
    passed_over: tuple[str, ...] = ()


_line = msgspec.json.Decoder(Line)


def read_line(data: bytes) -> Line:
    """The request that a line is. Raises InvalidRequest."""
    try:
        line = _line.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        what = f"it is no request: {error}"
        limit = 'an object with "custom_id", "method", "url" and "body"'
        raise InvalidRequest(what, field="line", limit=limit) from None
    for field, value, known in (("method", line.method, ["POST"]), ("url", line.url, URLS)):
        if value not in known:
            limit = ", ".join(known)
            raise InvalidRequest(
                f"{field} must be {limit}, got {value[:200]!r}", field=field, limit=limit, value=value
            )
    return line


class _House(House):
    """Things that all lines share. Raises InvalidRequest for one that asks for a stream."""

    async def requests(self, call: Call, endpoint: Endpoint) -> list[Request]:
        found = await super().requests(call, endpoint)
        if found[0].asked.stream:
            raise must_be("stream", "false in a batch", True)
        return found


class _Desk(ClientDesk):
    """The engine for one line. key: that its requests have, with their number behind it; "" for none."""

    __slots__ = ("_key",)

    def __init__(self, client: Client, key: str) -> None:
        super().__init__(client)
        self._key = key

    def generate(self, **arguments: Unpack[GenerateArguments]) -> Generation:
        if self._key:
            arguments["idempotency_key"] = f"{self._key}-{len(self._generations)}"
        return super().generate(**arguments)


class Asker:
    """Asks for the answers to lines, by a client that has `PATIENCE`. `close` it. salt: what tells the requests of
    one file of answers from those of others."""

    def __init__(self, client: Client, config: HttpConfig, salt: str) -> None:
        self._client = client
        self._house = _House(config)
        self._salt = salt
        self._keyless_until_s = 0.0

    def close(self) -> None:
        """End what runs on the side."""
        self._house.close()

    async def answer(self, line: Line, request_id: str) -> Response:
        """Wait for the answer to a line, be it an error. Raises the CierzoError for which no other line has one
        either: the server has gone, or takes this client no more.

        A key, made of what stands in the file, is the same for as long as the request may run under it, so that it
        runs once; an answer that has ended without its end needs another.
        """
        digest = self._digest(line)
        number = num_tries = num_failures = 0
        while True:
            has_key = time.monotonic() >= self._keyless_until_s
            try:
                return await self._once(line, request_id, f"{digest}-{number}" if has_key else "")
            except CierzoError as error:
                found = error
            if isinstance(found, ConnectionLost | ProtocolError | Unauthorized):
                await self._client.ping()  # once there is a connection again
            if _is_of_core(found) and found.may_have_run is False:
                raise found
            num_failures += _is_failure(found)
            if num_failures >= MOST_FAILURES or not _is_passing(found):
                return Response(found.http_status, request_id, msgspec.Raw(encoded(found)))
            if found.field == NO_ROOM:
                self._keyless_until_s = time.monotonic() + KEYLESS_S
                continue
            number += not isinstance(found, ConnectionLost) and found.may_have_run is not False
            number += found.field == "idempotency_key"
            num_tries += 1
            await asyncio.sleep(PAUSES.pause_s(num_tries, found))

    def _digest(self, line: Line) -> str:
        """A name for what a line asks for."""
        said = msgspec.msgpack.encode((self._salt, line.custom_id, line.url, bytes(line.body)))
        return hashlib.blake2b(said, digest_size=16).hexdigest()

    async def _once(self, line: Line, request_id: str, key: str) -> Response:
        pieces: list[bytes] = []

        async def send(event: Event) -> None:
            pieces.append(event.get("body", b""))

        call = Call({}, _nobody_leaves, send, {}, request_id)
        call.body = bytes(line.body)
        call.backend = desk = _Desk(self._client, key)
        try:
            await URLS[line.url](self._house, call)
        finally:
            desk.close()
        passed_over = [name for _, names in call.headers for name in names.decode().split(", ")]
        return Response(200, request_id, msgspec.Raw(b"".join(pieces)), tuple(passed_over))


async def _nobody_leaves() -> NoReturn:
    """Wait for a caller to go away."""
    await asyncio.Future[Any]()
    raise AssertionError


def _is_of_core(error: CierzoError) -> bool:
    """Whether an error says that the core has failed, and not that it is waited for."""
    return isinstance(error, CoreFailed) and not isinstance(error, CoreStalled)


def _is_failure(error: CierzoError) -> bool:
    """Whether an error may be the request's own doing, such as the end of whatever server takes it."""
    return isinstance(error, ConnectionLost | Failed) or _is_of_core(error)


def _is_passing(error: CierzoError) -> bool:
    """Whether the same request may be answered another time."""
    if isinstance(error, Unfinished):
        return not isinstance(error, Late)
    is_of_key = isinstance(error, NotFound | KeyReused) and error.field == "idempotency_key"
    return is_of_key or isinstance(error, Unauthorized) or (error.retry and is_worth_repeating(error))
