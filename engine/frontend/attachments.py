"""Bytes that clients attach to streams, until the `generate` that they belong to comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cierzo.engine.errors import InvalidRequest, Overloaded
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.expiry import Expiry
from cierzo.engine.frontend.frames import Buffer
from cierzo.engine.frontend.limits import ByteBudget, require_room
from cierzo.engine.frontend.stream import Sink

ATTACHED_S = 60.0  # how long attached bytes are kept without news
JOIN_BYTES = 64 * 1024  # smaller pieces are joined; larger ones stay where they came, uncopied
ENTRY_BYTES = 512  # charged for each stream that has some, besides them


@dataclass(slots=True)
class Attached:
    """Bytes attached to a stream. `refused`: the client has an error for its answer already, and nothing is
    kept; up to the `generate`, what still comes of this prompt is passed over in silence."""

    pieces: list[Buffer] = field(default_factory=list)
    num_bytes: int = 0
    refused: bool = False

    def append(self, data: Buffer) -> None:
        """Keep a piece."""
        self.num_bytes += len(data)
        last = self.pieces[-1] if self.pieces else None
        if isinstance(last, bytearray) and len(last) + len(data) <= JOIN_BYTES:
            last += data
        else:
            self.pieces.append(bytearray(data) if len(data) < JOIN_BYTES else data)


class Attachments:
    """Attached bytes by connection and stream, charged as they come."""

    def __init__(
        self,
        config: FrontendConfig,
        budget: ByteBudget,
        clock: Callable[[], float],
        expired: Callable[[Sink, int], None],
    ) -> None:
        """`expired` is told of a stream whose bytes were let go because nothing more came."""
        self._config = config
        self._budget = budget
        self._expired = expired
        self._sinks: dict[Sink, dict[int, Attached]] = {}
        self._expiry: Expiry[tuple[Sink, int]] = Expiry(ATTACHED_S, clock, self._expire)

    def add(self, sink: Sink, stream_id: int, data: Buffer) -> None:
        """Append to what `stream_id` has; raises InvalidRequest or Overloaded, and keeps nothing then."""
        entry = self._entry(sink, stream_id)
        if entry.refused:
            return
        most = self._config.max_attached_bytes
        num_bytes = entry.num_bytes + len(data)
        if num_bytes > most:
            raise InvalidRequest(
                f"{num_bytes} bytes are attached, allowed: {most}",
                field="max_attached_bytes",
                limit=most,
                value=num_bytes,
            )
        self._budget.take(len(data))
        entry.append(data)

    def refuse(self, sink: Sink, stream_id: int) -> None:
        """An error was the answer to part of a prompt: keep nothing of it, and pass over the rest."""
        try:
            entry = self._entry(sink, stream_id)
        except Overloaded:
            return
        self._budget.give(entry.num_bytes)
        entry.pieces, entry.num_bytes, entry.refused = [], 0, True

    def take(self, sink: Sink, stream_id: int) -> Attached | None:
        """Let go of what a stream has: it is the caller's, and not charged any more."""
        entry = self._sinks.get(sink, {}).pop(stream_id, None)
        if entry is not None:
            self._expiry.discard((sink, stream_id))
            self._budget.give(ENTRY_BYTES + entry.num_bytes)
        return entry

    def disconnect(self, sink: Sink) -> None:
        """A connection is gone, and what it attached."""
        for stream_id in list(self._sinks.get(sink, {})):
            self.take(sink, stream_id)
        self._sinks.pop(sink, None)

    def close(self) -> None:
        """Stop the timer."""
        self._expiry.close()

    def _entry(self, sink: Sink, stream_id: int) -> Attached:
        entries = self._sinks.setdefault(sink, {})
        entry = entries.get(stream_id)
        if entry is None:
            require_room(self._config, "max_streams_per_connection", len(entries) + 1)
            self._budget.take(ENTRY_BYTES)
            entry = entries[stream_id] = Attached()
        self._expiry.add((sink, stream_id))
        return entry

    def _expire(self, place: tuple[Sink, int]) -> None:
        sink, stream_id = place
        entry = self.take(sink, stream_id)
        if entry is not None and not entry.refused:
            self._expired(sink, stream_id)
