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
MAX_REFUSED = 1024  # prompts of a connection that were refused in part and may go on; one more ends it


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
    """Attached bytes by connection and stream, charged as they come; and which streams had theirs refused."""

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
        self._refused: dict[Sink, set[int]] = {}  # no stream is in both
        self._expiry: Expiry[tuple[Sink, int]] = Expiry(ATTACHED_S, clock, self._expire)

    def add(self, sink: Sink, stream_id: int, data: Buffer) -> None:
        """Append to what `stream_id` has; raises InvalidRequest or Overloaded, and keeps nothing then."""
        if stream_id in self._refused.get(sink, ()):
            self._expiry.add((sink, stream_id))
            return
        entry = self._entry(sink, stream_id)
        most = self._config.max_attached_bytes
        num_bytes = entry.num_bytes + len(data)
        if num_bytes > most:
            raise InvalidRequest(
                f"{num_bytes} bytes are attached, allowed: {most}",
                field="max_attached_bytes",
                limit=most,
                value=num_bytes,
            )
        self._budget.take(len(data), sink.access.tenant.name)
        entry.append(data)

    def refuse(self, sink: Sink, stream_id: int) -> None:
        """An error was the answer to part of a prompt: keep nothing of it, and pass over the rest. Raises
        Overloaded if that is so of too many."""
        self.take(sink, stream_id)
        refused = self._refused.setdefault(sink, set())
        refused.add(stream_id)
        self._expiry.add((sink, stream_id))
        if len(refused) > MAX_REFUSED:
            raise Overloaded(
                f"of more than {MAX_REFUSED} prompts of this connection a part was refused, and no generate came",
                field="attached",
                limit=MAX_REFUSED,
                retry_after_s=self._config.retry_after_s,
            )

    def take(self, sink: Sink, stream_id: int) -> Attached | None:
        """Let go of what a stream has: it is the caller's, and not charged any more. What was refused counts as
        something."""
        if stream_id in self._refused.get(sink, ()):
            self._refused[sink].discard(stream_id)
            self._expiry.discard((sink, stream_id))
            return Attached(refused=True)
        entry = self._sinks.get(sink, {}).pop(stream_id, None)
        if entry is not None:
            self._expiry.discard((sink, stream_id))
            self._budget.give(ENTRY_BYTES + entry.num_bytes, sink.access.tenant.name)
        return entry

    def disconnect(self, sink: Sink) -> None:
        """A connection is gone, and what it attached."""
        for stream_id in [*self._sinks.get(sink, ()), *self._refused.get(sink, ())]:
            self.take(sink, stream_id)
        self._sinks.pop(sink, None)
        self._refused.pop(sink, None)

    def close(self) -> None:
        """Stop the timer."""
        self._expiry.close()

    def _entry(self, sink: Sink, stream_id: int) -> Attached:
        entries = self._sinks.setdefault(sink, {})
        entry = entries.get(stream_id)
        if entry is None:
            require_room(self._config, "max_streams_per_connection", len(entries) + 1)
            self._budget.take(ENTRY_BYTES, sink.access.tenant.name)
            entry = entries[stream_id] = Attached()
        self._expiry.add((sink, stream_id))
        return entry

    def _expire(self, place: tuple[Sink, int]) -> None:
        sink, stream_id = place
        entry = self.take(sink, stream_id)
        if entry is not None and not entry.refused:
            self._refused.setdefault(sink, set()).add(stream_id)
            self._expiry.add((sink, stream_id))
            self._expired(sink, stream_id)
