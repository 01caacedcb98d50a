"""Open streams by each of their names, and what they amount to."""

from __future__ import annotations

from collections.abc import Iterator

from cierzo.engine.frontend.stream import Sink, Stream
from cierzo.engine.frontend.tenancy import Tenancy


class Registry:
    """The tables of streams. Each enters by `open`. It leaves the open ones by `close`, when no more is computed
    for it, and its connection by `detach` or `disconnect`: when that has its last message, or is gone.

    Samples, and tokens of prompts and resumed answers, of open streams are counted in the books of their tenants.
    num_read: streams that have a connection.
    """

    def __init__(self, tenancy: Tenancy) -> None:
        self.num_read = 0
        self._samples, self._tokens = tenancy.pools["max_open_samples"], tenancy.pools["max_open_tokens"]
        self._charge = tenancy.charge
        self._streams: dict[int, Stream] = {}  # by request id; an orphan's sink is None
        self._sinks: dict[Sink, dict[int, Stream]] = {}  # by the client's stream id

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[Stream]:
        """All open streams, oldest first; streams may be closed meanwhile."""
        return iter([*self._streams.values()])

    def __contains__(self, stream: Stream) -> bool:
        return stream.request_id in self._streams

    @property
    def num_sinks(self) -> int:
        """Connections that said Hello."""
        return len(self._sinks)

    @property
    def num_samples(self) -> int:
        """Samples of all open streams."""
        return self._samples.num

    @property
    def num_tokens(self) -> int:
        """Prompt and resumed tokens of all open streams."""
        return self._tokens.num

    def connect(self, sink: Sink) -> None:
        """A connection finished its handshake."""
        self._sinks[sink] = {}

    def disconnect(self, sink: Sink) -> list[Stream]:
        """A connection is gone: the streams that were its own, whose sink is None now."""
        streams = [*self._sinks.pop(sink, {}).values()]
        self.num_read -= len(streams)
        for stream in streams:
            stream.sink = None
        return streams

    def has(self, sink: Sink) -> bool:
        """Whether a connection said Hello and is there."""
        return sink in self._sinks

    def of(self, sink: Sink) -> dict[int, Stream]:
        """The streams of a connection by the client's ids; empty for one that is gone. Not to be changed."""
        return self._sinks.get(sink, {})

    @property
    def num_unsent(self) -> int:
        """Connections with messages that are not on their way yet."""
        return sum(sink.unsent_bytes > 0 for sink in self._sinks)

    def with_readers(self) -> list[Stream]:
        """All streams that have a connection, also those that have ended and still have something for it."""
        return [stream for streams in self._sinks.values() for stream in streams.values()]

    def open(self, stream: Stream) -> None:
        """Enter a stream of a connection."""
        assert stream.sink is not None
        self._streams[stream.request_id] = stream
        book = stream.book
        self._samples.add(book.tenant.name, stream.num_samples)
        book.num_requests += 1
        book.num_tokenless += 1
        self.attach(stream, stream.sink, stream.stream_id)

    def began(self, stream: Stream, first_token_s: float) -> None:
        """The first token has come."""
        stream.first_token_s = first_token_s
        stream.book.num_tokenless -= 1

    def position(self, stream: Stream) -> int:
        """Open streams of the same tenant before this one that have no token yet: of others it learns nothing."""
        if stream.first_token_s is not None or stream not in self:
            return 0
        if next(reversed(self._streams)) == stream.request_id:
            return stream.book.num_tokenless - 1
        book, before = stream.book, stream.request_id
        return sum(o.first_token_s is None and o.book is book for o in self if o.request_id < before)

    def resize(self, stream: Stream, num_samples: int) -> None:
        """Learn how many samples an open stream has."""
        self._samples.add(stream.tenant.name, num_samples - stream.num_samples)
        stream.num_samples = num_samples

    def charge(self, stream: Stream, num_tokens: int) -> None:
        """Count the tokens of a stream, until it is closed."""
        stream.num_tokens = num_tokens
        self._charge(stream.book, num_tokens)

    def close(self, stream: Stream) -> None:
        """Remove a stream from the open ones; its connection keeps it until it has got its last message."""
        del self._streams[stream.request_id]
        book = stream.book
        self._samples.add(book.tenant.name, -stream.num_samples)
        self._charge(book, -stream.num_tokens)
        book.num_requests -= 1
        book.num_tokenless -= stream.first_token_s is None

    def attach(self, stream: Stream, sink: Sink, stream_id: int) -> None:
        """Give a stream to a connection, under an id that is free there."""
        self._sinks[sink][stream_id] = stream
        stream.sink, stream.stream_id = sink, stream_id
        self.num_read += 1

    def detach(self, stream: Stream) -> None:
        """Take a stream from its connection, which may use the stream id again."""
        if stream.sink is not None:
            del self._sinks[stream.sink][stream.stream_id]
            stream.sink = None
            self.num_read -= 1
