"""The RPC's methods: one function per message a client may send. The row of a new method goes here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from cierzo.engine.errors import CierzoError, InvalidRequest, ProtocolError
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.stream import Sink
from cierzo.engine.messages import (
    Attach,
    Cancel,
    CancelRequest,
    ClientMessage,
    Credit,
    Done,
    Drain,
    Generate,
    GetHealth,
    GetModel,
    GetStats,
    Health,
    Hello,
    Ping,
    Pong,
    Resume,
    Stats,
)

# Messages and fields of `generate` that belong to a feature.
FEATURE_OF = {Attach: "attach", Resume: "resume", CancelRequest: "resume", Credit: "credit", Pong: "keepalive"}
FEATURE_OF_FIELD = {"attached": "attach", "idempotency_key": "resume"}


class Methods:
    """Answers messages; what a method raises becomes the Failure of the message's stream."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._table: dict[type, Callable[[Sink, Any], None]] = {
            Generate: self._generate,
            Resume: self._resume,
            Cancel: self._cancel,
            CancelRequest: self._cancel_request,
            Credit: self._credit,
            Ping: self._ping,
            GetHealth: self._health,
            GetStats: self._stats,
            GetModel: self._model,
            Drain: self._drain,
        }

    def dispatch(self, sink: Sink, message: ClientMessage) -> None:
        """Run the method of `message`. Raises ProtocolError for a second Hello and for a negative stream id."""
        if isinstance(message, Hello):
            raise ProtocolError("hello is said once, first", field="type", value="hello")
        if message.stream < 0:
            raise ProtocolError("a stream id is negative", field="stream", limit="at least 0", value=message.stream)
        try:
            if (feature := FEATURE_OF.get(type(message))) is not None:
                _require(sink, feature, "type", type(message).__struct_config__.tag)
        except InvalidRequest as error:
            self._frontend.fail(sink, message.stream, error)
            return
        self._table[type(message)](sink, message)

    def _generate(self, sink: Sink, message: Generate) -> None:
        try:
            for field, feature in FEATURE_OF_FIELD.items():
                if getattr(message, field) is not None:
                    _require(sink, feature, field, getattr(message, field))
            self._frontend.generate(sink, message)
        except CierzoError as error:
            self._frontend.fail(sink, message.stream, error)

    def _resume(self, sink: Sink, message: Resume) -> None:
        try:
            self._frontend.resume(sink, message)
        except CierzoError as error:
            self._frontend.fail(sink, message.stream, error)

    def _cancel(self, sink: Sink, message: Cancel) -> None:
        self._frontend.cancel(sink, message.stream)

    def _cancel_request(self, sink: Sink, message: CancelRequest) -> None:
        try:
            self._frontend.cancel_request(message.request_id)
        except CierzoError as error:
            self._frontend.fail(sink, message.stream, error)
        else:
            sink.put(Done(stream=message.stream))

    def _credit(self, sink: Sink, message: Credit) -> None:
        try:
            self._frontend.credit(sink, message)
        except CierzoError as error:
            self._frontend.fail(sink, message.stream, error)

    def _ping(self, sink: Sink, message: Ping) -> None:
        sink.put(Pong(stream=message.stream))

    def _health(self, sink: Sink, message: GetHealth) -> None:
        frontend = self._frontend
        sink.put(Health(stream=message.stream, state=frontend.health, uptime_s=frontend.uptime_s))

    def _stats(self, sink: Sink, message: GetStats) -> None:
        frontend, counters = self._frontend, self._frontend.counters
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
                core=frontend.core.stats,
            )
        )

    def _model(self, sink: Sink, message: GetModel) -> None:
        sink.put(msgspec.structs.replace(self._frontend.model, stream=message.stream))

    def _drain(self, sink: Sink, message: Drain) -> None:
        if message.undo:
            self._frontend.undo_drain()
            sink.put(Done(stream=message.stream))
        else:
            self._frontend.drain(sink, message.stream)


def _require(sink: Sink, feature: str, field: str, value: object) -> None:
    if feature not in sink.features:
        raise InvalidRequest(
            f"{value} needs the feature {feature}, which hello did not ask for or welcome did not grant",
            field=field,
            limit=f"with the feature {feature}",
            value=value,
        )
