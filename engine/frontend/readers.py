"""Another reader for a request: one that resumes it, or one that asks for it again."""

from __future__ import annotations

from cierzo.engine.errors import InvalidRequest, NotFound, TakenOver
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.failures import failure
from cierzo.engine.frontend.keeper import Keeper
from cierzo.engine.frontend.limits import require_room
from cierzo.engine.frontend.outlet import Outlets
from cierzo.engine.frontend.registry import Registry
from cierzo.engine.frontend.stream import NewReader, Sink, Stream
from cierzo.engine.frontend.wire_checks import require_feature
from cierzo.engine.messages import Generate, Resume


class Readers:
    """Gives streams to connections. A stream has one reader at a time: the last one that came.

    Whether an answer comes in parts is settled by the connection that asked for it: of one that does, another
    connection needs the feature, and of one that does not, nobody gets parts.
    """

    def __init__(
        self,
        config: FrontendConfig,
        streams: Registry,
        keeper: Keeper,
        outlets: Outlets,
        new_reader: NewReader,
    ) -> None:
        self._config = config
        self._streams = streams
        self._keeper = keeper
        self._outlets = outlets
        self._new_reader = new_reader

    def place(self, sink: Sink, stream_id: int) -> None:
        """Raise the CierzoError that says why a connection cannot have another stream, under this id."""
        streams = self._streams.of(sink)
        if stream_id in streams:
            raise InvalidRequest("this stream is already open", field="stream", limit="unique", value=stream_id)
        require_room(self._config, "max_streams_per_connection", len(streams) + 1)

    def resume(self, sink: Sink, message: Resume) -> None:
        """Give a request to a reader who has some of it. Raises the CierzoError that says why not."""
        self.place(sink, message.stream)
        stream = self._keeper.find(message.request_id, sink.access.tenant)
        if stream.apart:
            require_feature(sink.features, "parts", "this request, whose answer comes in parts,", "request_id")
        if len(message.received) != stream.num_samples:
            raise InvalidRequest(
                f"received has {len(message.received)} entries, the request {stream.num_samples} samples",
                field="received",
                limit=stream.num_samples,
                value=len(message.received),
            )
        self._take_over(stream, sink, message.stream, message.received)

    def join(self, sink: Sink, message: Generate, stream: Stream) -> None:
        """A request came again: it gets the whole answer."""
        if stream.apart:
            require_feature(sink.features, "parts", "this request, whose answer comes in parts,", "idempotency_key")
        offsets = [sample.num_brought for sample in stream.samples]
        if stream.deltas and any(
            s.first_offset > offset for s, offset in zip(stream.samples, offsets, strict=True)
        ):
            raise NotFound(
                f"the first log-probabilities under this key are kept no longer: {self._why_forgotten}",
                field="idempotency_key",
                value=message.idempotency_key,
            )
        self._take_over(stream, sink, message.stream, offsets)

    @property
    def _why_forgotten(self) -> str:
        """The bounds for which a log loses its oldest log-probabilities."""
        return (
            f"an answer has at most max_answer_bytes, {self._config.max_answer_bytes}, and a paused one what its "
            f"reader may lack, or the last stream_credit_bytes, {self._config.stream_credit_bytes}"
        )

    def _take_over(self, stream: Stream, sink: Sink, stream_id: int, received: list[int]) -> None:
        """Give a stream to a connection that has so many tokens of each sample, and tell the one that had it."""
        for index, (sample, offset) in enumerate(zip(stream.samples, received, strict=False)):
            first, end = sample.first_offset if stream.deltas else 0, len(sample.token_ids)
            if not first <= offset <= end:
                kept = f" (of the log-probabilities before, {self._why_forgotten})" if first else ""
                raise InvalidRequest(
                    f"sample {index} can be resumed from token {first} to {end}{kept}, not from {offset}",
                    field=f"received[{index}]",
                    limit=f"{first} to {end}",
                    value=offset,
                )
        if (old := stream.sink) is not None:
            old.put(failure(stream.stream_id, TakenOver("the request was resumed by another stream")))
            self._streams.detach(stream)
            self._outlets.detach(stream, old)
        self._keeper.adopted(stream)
        self._streams.attach(stream, sink, stream_id)
        if not stream.samples and stream.ended_at_s is None:
            return  # its prompt is still being encoded
        if stream.deltas:
            for sample, offset in zip(stream.samples, received, strict=False):
                sample.seek(offset, self._new_reader(stream, sample.index))
        self._outlets.attach(stream)
