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
    kept; up to the `generate`, what still comes of this prompt is passed over in silence. `images`: their files,
    each as an entry of its own."""

    pieces: list[Buffer] = field(default_factory=list)
    num_bytes: int = 0
    refused: bool = False
    images: list[Attached] = field(default_factory=list)

    @property
    def prompt_bytes(self) -> int | None:
        """Bytes of a prompt; None if none was attached, but images alone."""
        return self.num_bytes if self.pieces else None

    @property
    def all_bytes(self) -> int:
        """Bytes of prompt and images."""
        return self.num_bytes + sum(image.num_bytes for image in self.images)

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

    def add(self, sink: Sink, stream_id: int, data: Buffer, image: int | None = None) -> None:
        """Append to what `stream_id` has of a prompt, or of the image of this number; raises InvalidRequest or
        Overloaded, and keeps nothing then."""
        if stream_id in self._refused.get(sink, ()):
            self._expiry.add((sink, stream_id))
            return
        entry = self._entry(sink, stream_id)
        most = self._config.max_attached_bytes
        num_bytes = entry.all_bytes + len(data)
        if num_bytes > most:
            raise InvalidRequest(
                f"{num_bytes} bytes are attached, allowed: {most}",
                field="max_attached_bytes",
                limit=most,
                value=num_bytes,
            )
        part = entry if image is None else self._image(entry, image, len(data))
        self._budget.take(len(data), sink.access.tenant.name)
        if image == len(entry.images):
            entry.images.append(part)
        part.append(data)

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
            self._budget.give(ENTRY_BYTES + entry.all_bytes, sink.access.tenant.name)
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

    def _image(self, entry: Attached, number: int, num_bytes: int) -> Attached:
        """The image that so many bytes are of: the last that has some, or the next. Raises InvalidRequest for any
        other, and for more images or bytes than a request may have."""
        images, config = entry.images, self._config
        if number not in (len(images) - 1, len(images)) or number < 0:
            limit = f"{len(images)}" if not images else f"{len(images) - 1} or {len(images)}"
            what = f"bytes of image {number} are attached out of order, allowed: {limit}"
            raise InvalidRequest(what, field="image", limit=limit, value=number)
        if number >= config.max_images:
            what = f"image {number} is attached, allowed: {config.max_images} images (max_images)"
            raise InvalidRequest(what, field="image", limit=config.max_images, value=number + 1)
        part = images[number] if number < len(images) else Attached()
        if (size := part.num_bytes + num_bytes) > config.max_image_bytes:
            what = f"images[{number}] has {size} bytes or more, allowed: {config.max_image_bytes} (max_image_bytes)"
            limit = f"{config.max_image_bytes} bytes"
            raise InvalidRequest(what, field=f"images[{number}]", limit=limit, value=size)
        return part

    def _expire(self, place: tuple[Sink, int]) -> None:
        sink, stream_id = place
        entry = self.take(sink, stream_id)
        if entry is not None and not entry.refused:
            self._refused.setdefault(sink, set()).add(stream_id)
            self._expiry.add((sink, stream_id))
            self._expired(sink, stream_id)
