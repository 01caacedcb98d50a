"""The RPC's methods: one function per message a client may send. The row of a new method goes here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from cierzo.engine.errors import CierzoError, Forbidden, Overloaded, ProtocolError
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.stream import Sink
from cierzo.engine.frontend.tenants import Right
from cierzo.engine.frontend.versions import without_parts
from cierzo.engine.frontend.wire_checks import features, require_feature
from cierzo.engine.messages import (
    Attach,
    Cancel,
    CancelRequest,
    ClientMessage,
    Credit,
    Detokenize,
    Done,
    Drain,
    Generate,
    GetHealth,
    GetModel,
    GetStats,
    GetTokenizer,
    Health,
    Hello,
    Ping,
    Pong,
    Resume,
    Stats,
    Tokenize,
)

# Messages that belong to a feature.
FEATURE_OF = {
    Attach: "attach",
    Credit: "credit",
    Pong: "keepalive",
    **dict.fromkeys((Resume, CancelRequest), "resume"),
    **dict.fromkeys((Tokenize, Detokenize, GetTokenizer), "tokenize"),
}


class Methods:
    """Answers messages; what a method raises becomes the Failure of the message's stream."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._table: dict[type, Callable[[Sink, Any], None]] = {
            Attach: self._attach,
            Generate: self._generate,
            Resume: frontend.resume,
            Pong: self._pong,
            Cancel: self._cancel,
            CancelRequest: self._cancel_request,
            Credit: frontend.credit,
            Ping: self._ping,
            GetHealth: self._health,
            GetStats: self._stats,
            GetModel: self._model,
            Tokenize: frontend.words.take,
            Detokenize: frontend.words.take,
            GetTokenizer: self._tokenizer,
            Drain: self._drain,
        }

    def dispatch(self, sink: Sink, message: ClientMessage) -> None:
        """Run the method of `message`. Raises ProtocolError for a second Hello and for a negative stream id, and
        Overloaded for one cancellation too many."""
        if isinstance(message, Hello):
            raise ProtocolError("hello is said once, first", field="type", value="hello")
        if message.stream < 0:
            raise ProtocolError("a stream id is negative", field="stream", limit="at least 0", value=message.stream)
        try:
            if (feature := FEATURE_OF.get(type(message))) is not None:
                tag = str(type(message).__struct_config__.tag)
                require_feature(sink.features, feature, tag, "type", tag)
            self._table[type(message)](sink, message)
        except CierzoError as error:
            if isinstance(error, Overloaded) and isinstance(message, Cancel | CancelRequest):
                raise  # one cancellation too many ends the connection
            attaching = isinstance(message, Attach) and "attach" in sink.features
            self._frontend.fail(sink, message.stream, error, attaching=attaching)

    def generate_large(self, sink: Sink, stream_id: int, body: bytearray, deadline_s: float | None) -> None:
        """Run `generate` for a message that is too long to be decoded here."""
        try:
            self._frontend.generate_large(sink, stream_id, body, deadline_s)
        except CierzoError as error:
            self._frontend.fail(sink, stream_id, error)

    def words_large(self, sink: Sink, stream_id: int, method: str, body: bytearray) -> None:
        """Answer a message about words that is too long to be decoded here."""
        try:
            require_feature(sink.features, "tokenize", method, "type", method)
            self._frontend.words.take_large(sink, stream_id, method, body)
        except CierzoError as error:
            self._frontend.fail(sink, stream_id, error)

    def _attach(self, sink: Sink, message: Attach) -> None:
        if message.image is not None:
            require_feature(sink.features, "images", "image", "image", message.image)
        self._frontend.attach(sink, message.stream, message.data, message.image)

    def _generate(self, sink: Sink, message: Generate) -> None:
        try:
            features(message, sink.features)
        except CierzoError as error:
            self._frontend.refused(error, sink, message)
            raise
        self._frontend.generate(sink, message)

    def _pong(self, sink: Sink, message: Pong) -> None:
        """Any byte is a sign of life."""

    def _cancel(self, sink: Sink, message: Cancel) -> None:
        self._frontend.cancel(sink, message.stream)

    def _cancel_request(self, sink: Sink, message: CancelRequest) -> None:
        self._frontend.cancel_request(sink, message.request_id)
        sink.put(Done(stream=message.stream))

    def _ping(self, sink: Sink, message: Ping) -> None:
        sink.put(Pong(stream=message.stream))

    def _health(self, sink: Sink, message: GetHealth) -> None:
        frontend = self._frontend
        health = Health(stream=message.stream, state=frontend.health, uptime_s=frontend.uptime_s)
        if "probes" in sink.features:
            health = msgspec.structs.replace(health, **frontend.probes._asdict())
        sink.put(health)

    def _stats(self, sink: Sink, message: GetStats) -> None:
        require_right(sink, "stats")
        frontend, counters = self._frontend, self._frontend.counters
        core = frontend.core.stats
        if core.experts is not None and "experts" not in sink.access.rights:
            core = msgspec.structs.replace(core, experts=None)
        sink.put(
            Stats(
                stream=message.stream,
                device=frontend.model.device,
                connections=frontend.streams.num_sinks,
                streams=len(frontend.streams),
                accepted=counters.accepted,
                refused=counters.refused,
                finished=counters.finished,
                core_restarts=frontend.core.num_restarts,
                core=core,
            )
        )

    def _model(self, sink: Sink, message: GetModel) -> None:
        model = msgspec.structs.replace(self._frontend.model, stream=message.stream)
        model = model if "images" in sink.features else msgspec.structs.replace(model, vision=None)
        sink.put(model if "parts" in sink.features else without_parts(model))

    def _tokenizer(self, sink: Sink, message: GetTokenizer) -> None:
        require_right(sink, "stats")
        sink.put(self._frontend.words.info(message))

    def _drain(self, sink: Sink, message: Drain) -> None:
        require_right(sink, "drain")
        if message.undo:
            self._frontend.undo_drain()
            sink.put(Done(stream=message.stream))
        else:
            self._frontend.drain(sink, message.stream)


def require_right(sink: Sink, right: Right) -> None:
    """Raise Forbidden unless the connection's key has this right."""
    if right not in sink.access.rights:
        raise Forbidden(f"this connection lacks the right {right}", field="rights", limit=right)
