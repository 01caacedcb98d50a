"""The engine in this process: requests and answers pass as objects, with no socket between.

Each HTTP request has a `Desk`. To the front end that is a connection (`Sink`), which is never full: what its reader
has not taken is bounded by credit, as on an RPC connection with the feature "credit". To the generations that are
read there it is their `Link`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Unpack, cast

import msgspec

from cierzo.engine.errors import CierzoError, ConnectionLost
from cierzo.engine.frontend.arguments import detokenize_message, generate_message, tokenize_message
from cierzo.engine.frontend.client_options import GenerateArguments, TokenizeArguments
from cierzo.engine.frontend.delta_cost import delta_cost
from cierzo.engine.frontend.encoders import Late
from cierzo.engine.frontend.failures import error_of
from cierzo.engine.frontend.frames import LENGTH_BYTES, Buffer
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.generation import Generation, Inbox
from cierzo.engine.frontend.keys import Door, digest_of
from cierzo.engine.frontend.methods import Methods, require_right
from cierzo.engine.frontend.outlet import DELTA_HEAP
from cierzo.engine.frontend.rpc import RpcServer
from cierzo.engine.frontend.tenants import Access, Right, Visitor
from cierzo.engine.gateway.backend import Caller
from cierzo.engine.messages import (
    ACCEPTANCE,
    Accepted,
    Cancel,
    ClientMessage,
    Credit,
    Delta,
    Detokenize,
    Detokenized,
    Failure,
    Final,
    Generate,
    GetHealth,
    GetStats,
    GetTokenizer,
    Health,
    Message,
    ModelInfo,
    ServerMessage,
    Stats,
    Tokenize,
    Tokenized,
    TokenizerInfo,
    TokenLogprobs,
    Worded,
)
from cierzo.engine.text.prompt import PromptEncoder

log = logging.getLogger(__name__)

FEATURES = frozenset(
    (
        *(ACCEPTANCE, "accounting", "credit", "grammars", "images", "masks", "parts", "probes"),
        *("prompt_logprobs", "tokenize", "trace"),
    )
)
CREDIT_PARTS = 4  # credit is given back when such a part of it has been consumed
CREDIT_S = 1.0  # and after so long whatever has been
FIRST_QUESTION = 1 << 20  # stream ids of what is no generation
_NOTHING = Generate(stream=0)  # an inbox keeps its request for servers that are to hear it again
_decode = msgspec.msgpack.Decoder(ServerMessage).decode
_decode_entries = msgspec.msgpack.Decoder(list[TokenLogprobs]).decode


class Embedded:
    """Lets callers in by the RPC server's own keys, each request at a desk of its own."""

    def __init__(self, server: RpcServer, prompts: PromptEncoder, metrics: Callable[[], bytes]) -> None:
        self.frontend: Frontend = server.frontend
        self.methods: Methods = server.methods
        self.prompts = prompts
        self.credit_part = max(1, server.config.stream_credit_bytes // DELTA_HEAP // CREDIT_PARTS)
        self.metrics = metrics
        self.visits = server.visits
        self._door: Door = server.door
        self._spellings = {token_id: word.encode() for word, token_id in prompts.special_ids.items()}

    async def admit(self, caller: Caller) -> Desk:
        """A desk for a request. Raises Unauthorized."""
        visitor = Visitor(digest_of(caller.key), caller.certificate, caller.is_local)
        return Desk(self, self._door.access(visitor), visitor, caller.peer)

    async def health(self) -> Health:
        """The front end's state."""
        frontend = self.frontend
        return Health(stream=0, state=frontend.health, uptime_s=frontend.uptime_s, **frontend.probes._asdict())

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; of a control token those by which it is spelled."""
        if (spelled := self._spellings.get(token_id)) is not None:
            return spelled
        tokenizer = self.prompts.tokenizer
        return b"" if tokenizer is None else tokenizer.token_bytes(token_id)


class Desk:
    """The engine for one HTTP request."""

    __slots__ = (
        *("__weakref__", "_calls", "_house", "_inboxes", "_is_connected", "_num_asked", "_num_generated", "_timer"),
        "_visitor",
        *("access", "features", "is_paused", "loop", "peer"),
    )

    def __init__(self, house: Embedded, access: Access, visitor: Visitor, peer: str) -> None:
        self.features = FEATURES
        self.access = access
        self.peer = peer
        self.is_paused = False
        self.loop = asyncio.get_running_loop()
        self._house = house
        self._visitor = visitor
        self._inboxes: dict[int, Inbox] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._num_generated = self._num_asked = 0
        self._timer: asyncio.TimerHandle | None = None
        self._is_connected = False

    @property
    def tenant(self) -> str:
        """The name of the caller's tenant."""
        return self.access.tenant.name

    # --- Backend ---------------------------------------------------------------------------------------

    def generate(self, **arguments: Unpack[GenerateArguments]) -> Generation:
        """Ask for an answer; as `Client.generate`."""
        message = generate_message(**arguments)
        inbox = self._inbox()
        self._house.methods.dispatch(self, msgspec.structs.replace(message, stream=inbox.stream))
        return Generation(inbox)

    def generate_packed(self, message: bytes, deadline_s: float | None, images: Sequence[bytes] = ()) -> Generation:
        """Ask for an answer by the MessagePack of a `Generate`, which nobody reads here. Raises what there is no
        room for."""
        inbox = self._inbox()
        try:
            for number, image in enumerate(images):
                self._house.frontend.attach(self, inbox.stream, image, number)
        except CierzoError:
            self._house.frontend.cancel(self, inbox.stream)
            del self._inboxes[inbox.stream]
            raise
        self._house.methods.generate_large(self, inbox.stream, bytearray(message), deadline_s)
        return Generation(inbox)

    def _inbox(self) -> Inbox:
        """Where the next answer comes in."""
        self._connect()
        self._num_generated += 1
        inbox = Inbox(self, _NOTHING, [])
        inbox.stream, inbox.settles_at, inbox.request = self._num_generated, self._house.credit_part, None
        self._inboxes[inbox.stream] = inbox
        inbox.sent(False)
        return inbox

    async def health(self) -> Health:
        """The state of the engine."""
        return cast(Health, await self._ask(GetHealth(stream=0)))

    async def stats(self) -> Stats:
        """Counters and gauges. Raises Forbidden without the right "stats"."""
        return cast(Stats, await self._ask(GetStats(stream=0)))

    async def model_info(self) -> ModelInfo:
        """Describe the model, and its limits."""
        return self._house.frontend.model

    async def tokenize(self, **arguments: Unpack[TokenizeArguments]) -> list[int]:
        """Give the tokens of a prompt; as `Client.tokenize`."""
        return cast(Tokenized, await self._words(tokenize_message(**arguments))).token_ids

    async def detokenize(self, token_ids: Iterable[Any], *, control_tokens: bool = False) -> str:
        """Give the text of tokens; as `Client.detokenize`."""
        return cast(Detokenized, await self._words(detokenize_message(token_ids, control_tokens))).text

    async def token_bytes(self, token_ids: Iterable[Any]) -> list[bytes]:
        """Give the bytes of each token, of a control token those of its spelling."""
        return [self._house.token_bytes(token_id) for token_id in token_ids]

    async def tokenizer_info(self) -> TokenizerInfo:
        """Describe the tokenizer. Raises Forbidden without the right "stats"."""
        return cast(TokenizerInfo, await self._ask(GetTokenizer(stream=0)))

    async def require(self, right: Right) -> None:
        """Raise Forbidden unless the caller has a right."""
        require_right(self, right)

    async def _words(self, message: Tokenize | Detokenize) -> Worded:
        """Have a message about words answered."""
        words = self._house.frontend.words
        try:
            return await words.ask(message, self.features, self.access.tenant)
        except Late:
            raise words.late() from None

    async def _ask(self, message: ClientMessage) -> Any:
        """Ask what has one answer, and wait for it."""
        self._connect()
        self._num_asked += 1
        stream = FIRST_QUESTION + self._num_asked
        answer = self._calls[stream] = self.loop.create_future()
        try:
            self._house.methods.dispatch(self, msgspec.structs.replace(message, stream=stream))
            return await answer
        finally:
            self._calls.pop(stream, None)

    def close(self) -> None:
        """The request is over: what still runs of it is cancelled."""
        if self._is_connected:
            self._is_connected = False
            self._house.visits.discard(self)
            if self._timer is not None:
                self._timer.cancel()
            self._house.frontend.disconnect(self)

    def _connect(self) -> None:
        """Count as a connection from now on. Raises Overloaded for one too many."""
        if not self._is_connected:
            self._house.frontend.connect(self)
            self._house.visits.add(self)
            self._is_connected = True

    def look_again(self, door: Door) -> None:
        """The keys have changed: end what is under way if it is nobody's now, or another tenant's."""
        try:
            self.access = door.again(self._visitor, self.access)
        except CierzoError as error:
            log.warning("a request from %s is ended: %s", self.peer, error.message)
            self._end(error)

    # --- Sink ------------------------------------------------------------------------------------------

    def put(self, message: Message) -> None:
        """Take in what the front end says."""
        if isinstance(message, Delta):
            self._take(message)
        elif isinstance(message, Accepted):
            self._inboxes[message.stream].put(message)
        elif isinstance(message, Final):
            self._inboxes.pop(message.stream).put(message)
        elif isinstance(message, Failure):
            error = error_of(message)
            if (inbox := self._inboxes.pop(message.stream, None)) is not None:
                inbox.put(error)
            elif (call := self._calls.get(message.stream)) is not None and not call.done():
                call.set_exception(error)
        else:
            answer = self._calls.get(cast(Any, message).stream)
            if answer is not None and not answer.done():
                answer.set_result(message)

    def put_frame(self, pieces: Iterator[Buffer]) -> None:
        """Take in a long last record, a piece in a turn of the loop; `pieces` has its end then."""
        self._gather(pieces, bytearray())

    @property
    def num_taken(self) -> int:
        """Nothing is ever written here: it is never full."""
        return 0

    @property
    def unsent_bytes(self) -> int:
        """The HTTP request is under way: a drain waits for it."""
        return int(self._is_connected)

    def drop(self) -> None:
        """Nothing more is to be had from the front end."""
        self._end(ConnectionLost("the server ended the answer in the middle"))

    def _end(self, error: CierzoError) -> None:
        """End all that is under way, and tell those who wait for it."""
        inboxes, self._inboxes = self._inboxes, {}
        self.close()
        for inbox in inboxes.values():
            inbox.put(error)
        for call in self._calls.values():
            if not call.done():
                call.set_exception(error)

    def _take(self, delta: Delta) -> None:
        inbox = self._inboxes[delta.stream]
        if isinstance(delta.prompt_logprobs, msgspec.Raw):  # as the front end hands them on, unread
            delta = msgspec.structs.replace(delta, prompt_logprobs=_decode_entries(delta.prompt_logprobs))
        cost = delta_cost(delta)
        inbox.held += cost
        if inbox.dropped:
            self.consumed(inbox, cost)
        else:
            inbox.add(delta, cost)

    def _gather(self, pieces: Iterator[Buffer], frame: bytearray) -> None:
        if (piece := next(pieces, None)) is not None:
            frame += piece
            self.loop.call_soon(self._gather, pieces, frame)
        elif self._is_connected:
            self.put(_decode(memoryview(frame)[LENGTH_BYTES:]))

    # --- Link ------------------------------------------------------------------------------------------

    def cancel(self, inbox: Inbox) -> None:
        """End a generation."""
        if self._is_connected and self._inboxes.get(inbox.stream) is inbox:
            self._house.methods.dispatch(self, Cancel(stream=inbox.stream))

    def consumed(self, inbox: Inbox, cost: int) -> None:
        """Deltas that cost so much have left the inbox for good."""
        inbox.held -= cost
        inbox.unsettled += cost
        if inbox.unsettled >= inbox.settles_at:
            self.settle(inbox)
        elif self._timer is None and self._is_connected:
            self._timer = self.loop.call_later(CREDIT_S, self._settle_all)

    def settle(self, inbox: Inbox) -> None:
        """Give credit back for what was consumed."""
        if inbox.unsettled and self._is_connected and self._inboxes.get(inbox.stream) is inbox:
            self._house.methods.dispatch(self, Credit(stream=inbox.stream, bytes=inbox.unsettled))
            inbox.unsettled = 0

    def _settle_all(self) -> None:
        """Once in a while, what is too little to be given back by itself: a slow reader is no idle one."""
        self._timer = None
        for inbox in [*self._inboxes.values()]:
            self.settle(inbox)
