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
        self._require_scores(sink, stream, "request_id")
        if len(message.received) != stream.num_samples:
            raise InvalidRequest(
                f"received has {len(message.received)} entries, the request {stream.num_samples} samples",
                field="received",
                limit=stream.num_samples,
                value=len(message.received),
            )
        self._take_over(stream, sink, message.stream, message.received, message.prompt_received)

    def _require_scores(self, sink: Sink, stream: Stream, field: str) -> None:
        if stream.sampling.prompt_logprobs is not None:
            what = "this request, which gives log-probabilities of its prompt,"
            require_feature(sink.features, "prompt_logprobs", what, field)

    def join(self, sink: Sink, message: Generate, stream: Stream) -> None:
        """A request came again: it gets the whole answer."""
        if stream.apart:
            require_feature(sink.features, "parts", "this request, whose answer comes in parts,", "idempotency_key")
        self._require_scores(sink, stream, "idempotency_key")
        offsets = [sample.num_brought for sample in stream.samples]
        is_cut = any(s.first_offset > offset for s, offset in zip(stream.samples, offsets, strict=True))
        if stream.deltas and (is_cut or (stream.prompt is not None and stream.prompt.first)):
            raise NotFound(
                f"the first log-probabilities under this key are kept no longer: {self._why_forgotten}",
                field="idempotency_key",
                value=message.idempotency_key,
            )
        self._take_over(stream, sink, message.stream, offsets, 0)

    @property
    def _why_forgotten(self) -> str:
        """The bounds for which a log loses its oldest log-probabilities."""
        return (
            f"an answer has at most max_answer_bytes, {self._config.max_answer_bytes}, and a paused one what its "
            f"reader may lack, or the last stream_credit_bytes, {self._config.stream_credit_bytes}"
        )

    def _require_offset(self, what: str, field: str, offset: int, first: int, end: int) -> None:
        """Raise InvalidRequest for a place at which a log cannot be resumed."""
        if not first <= offset <= end:
            kept = f" (of the log-probabilities before, {self._why_forgotten})" if first else ""
            told = f"{what} {first} to {end}{kept}, not from {offset}"
            raise InvalidRequest(told, field=field, limit=f"{first} to {end}", value=offset)

    def _take_over(
        self, stream: Stream, sink: Sink, stream_id: int, received: list[int], prompt_received: int
    ) -> None:
        """Give a stream to a connection that has so many tokens of each sample, and entries of its prompt's
        log-probabilities, and tell the one that had it."""
        for index, (sample, offset) in enumerate(zip(stream.samples, received, strict=False)):
            first, end = sample.first_offset if stream.deltas else 0, len(sample.token_ids)
            what = f"sample {index} can be resumed from token"
            self._require_offset(what, f"received[{index}]", offset, first, end)
        prompt = stream.prompt
        first, end = (0, 0) if prompt is None else (prompt.first if stream.deltas else 0, prompt.end)
        what = "log-probabilities of the prompt can be resumed from entry"
        self._require_offset(what, "prompt_received", prompt_received, first, end)
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
            if prompt is not None:
                prompt.sent = prompt_received
        self._outlets.attach(stream)
