"""Bodies that came, made into requests: short ones at once, long ones by a process of their own.

JSON takes time in proportion to its length, and reading it holds the event loop. So a body over `INLINE_BYTES` is
read elsewhere; where the engine is in this process it comes back as the bytes of a `generate` message, which the
front end hands on to its encoders unread.
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from typing import Any

import msgspec

from cierzo.engine.errors import CierzoError, Overloaded
from cierzo.engine.frontend.arguments import generate_message
from cierzo.engine.frontend.job_queue import JobQueue
from cierzo.engine.gateway.asked import Asked, Rules, in_body, read_chat, read_completions, read_fim, read_responses
from cierzo.engine.gateway.reading import Endpoint
from cierzo.engine.server_process import end_with_parent

INLINE_BYTES = 16 * 1024  # read in 12 ms, whatever they are
WHOLE_TOKENS = 256 * 1024  # an answer of more is gathered as it is made
LONG = ("text", "messages", "token_ids", "tools", "suffix", "grammar")  # fields that may be of any length


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A request for one answer. arguments: of `Client.generate`, all of them, or, where `packed` is the message
    that they make, those that are short. prompt_text: where it comes before the answer, and is a text.
    images: files that were fetched for it."""

    asked: Asked
    arguments: dict[str, Any]
    packed: bytes = b""
    prompt_text: str = ""
    images: tuple[bytes, ...] = ()

    @property
    def num_samples(self) -> int:
        """Answers that are asked for."""
        n = self.arguments.get("n", 1)
        return n if type(n) is int and n > 0 else 1


class Turn:
    """A long body that waits for the process. tenant: whose it is."""

    __slots__ = ("is_due", "length_bytes", "rank", "tenant")

    def __init__(self, tenant: str, length_bytes: int) -> None:
        self.tenant = tenant
        self.length_bytes = length_bytes
        self.rank = float(length_bytes)
        self.is_due = asyncio.Event()


class Bodies:
    """Reads bodies; tenants take turns with long ones. `close` it."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._waiting = JobQueue[Turn]()
        self._reading: Turn | None = None

    async def read(
        self, endpoint: Endpoint, body: bytes, rules: Rules, named: Mapping[str, str], *, packs: bool, tenant: str
    ) -> list[Request]:
        """The requests of a body, one for each prompt. named: arguments that the head of the request gives. packs:
        whether long ones are to come as messages. Raises InvalidRequest and NotFound, as the readers do."""
        if len(body) <= INLINE_BYTES:
            return requests_of(endpoint, body, rules, named)
        turn = Turn(tenant, len(body))
        self._waiting.add(turn)
        try:
            if self._reading is None:
                self._next()
            await turn.is_due.wait()
            return await self._read(packed_requests_of if packs else requests_of, endpoint, body, rules, named)
        finally:
            self._waiting.discard(turn)
            if self._reading is turn:
                self._next()

    def _next(self) -> None:
        """Let the next body be read."""
        self._reading = self._waiting.take(math.inf)
        if self._reading is not None:
            self._reading.is_due.set()

    async def _read(self, read: Callable[..., list[Request]], *given: Any) -> list[Request]:
        for _ in range(2):
            try:
                pool = self._started()
                return await asyncio.get_running_loop().run_in_executor(pool, read, *given)
            except BrokenExecutor:  # somebody has killed it, or the machine had no memory for it
                self.close()
        raise Overloaded("the process that reads long bodies has died", field="body", retry_after_s=1.0)

    def close(self) -> None:
        """End the process."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork would have this process's threads and sockets
            self._pool = ProcessPoolExecutor(1, context, _begin)
        return self._pool


def _begin() -> None:
    """Prepare the process: it ends when the server ends it, and not with the terminal's Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def requests_of(endpoint: Endpoint, body: bytes, rules: Rules, named: Mapping[str, str]) -> list[Request]:
    """The requests of a body, with all their arguments."""
    return [_request(asked, rules, named) for asked in _asked_of(endpoint, body, rules)]


def packed_requests_of(endpoint: Endpoint, body: bytes, rules: Rules, named: Mapping[str, str]) -> list[Request]:
    """The requests of a body as messages, whose streams are numbered from 1."""
    asked = _asked_of(endpoint, body, rules)
    return [_packed(_request(each, rules, named), number) for number, each in enumerate(asked, 1)]


def _asked_of(endpoint: Endpoint, body: bytes, rules: Rules) -> Sequence[Asked]:
    if endpoint == "completions":
        return read_completions(body, rules)
    return [{"chat": read_chat, "fim": read_fim, "responses": read_responses}[endpoint](body, rules)]


def _request(asked: Asked, rules: Rules, named: Mapping[str, str]) -> Request:
    arguments = {**asked.arguments, **named}
    most, n = arguments.get("max_tokens"), arguments.get("n", 1)
    is_long = type(most) is int and type(n) is int and min(most, rules.model.max_model_len) * n > WHOLE_TOKENS
    if is_long or asked.logprobs is not None or asked.prompt_logprobs is not None:
        arguments["deltas"] = True
    return Request(asked=asked, arguments=arguments, prompt_text=arguments.get("text", "") if asked.echo else "")


def _packed(request: Request, stream: int) -> Request:
    asked, arguments = request.asked, request.arguments
    try:
        message = msgspec.structs.replace(generate_message(**arguments), stream=stream)
    except CierzoError as error:
        raise in_body(error, asked) from None
    short = {name: value for name, value in arguments.items() if name not in LONG}
    given = {name: value for name, value in asked.given.items() if name not in ("input", "messages", "prompt")}
    if asked.echo and "token_ids" in arguments:
        short["token_ids"] = arguments["token_ids"]
    return msgspec.structs.replace(
        request,
        asked=msgspec.structs.replace(asked, arguments=short, given=given),
        arguments=short,
        packed=msgspec.msgpack.encode(message),
    )
