"""The front end's heart: open streams between many connections and one core.

Single-threaded, on the event loop. A step of the core comes in as one message and leaves as one write per
connection. `rpc.Connection` is the only `Sink`, `core_link.CoreLink` the only `Core`; tests bring their own.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from cierzo.engine.errors import CierzoError, Draining, InvalidRequest, Overloaded
from cierzo.engine.frontend import validate
from cierzo.engine.frontend.attachments import ATTACHED_S, Attached, Attachments
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.core_side import Core, CoreSide
from cierzo.engine.frontend.detok import Detokenizer
from cierzo.engine.frontend.encoders import Encoder, Late
from cierzo.engine.frontend.encoding import Encoded, Job, RequestEncoder, pack_prompt
from cierzo.engine.frontend.frames import Buffer
from cierzo.engine.frontend.prompt import PromptEncoder
from cierzo.engine.frontend.registry import Registry
from cierzo.engine.frontend.room import Resets
from cierzo.engine.frontend.stream import Sink, Stream
from cierzo.engine.messages import (
    Drained,
    Failure,
    FinishReason,
    Generate,
    ModelInfo,
    TokenDelta,
)

log = logging.getLogger(__name__)

SEED_BITS = 53  # a seed that was drawn here survives clients whose numbers are doubles


@dataclass(slots=True)
class Counters:
    """Since the start of the front end."""

    accepted: int = 0
    refused: int = 0
    finished: int = 0


def failure(stream_id: int, error: CierzoError) -> Failure:
    """The message that carries `error`; stream -1 is the connection itself."""
    return Failure(
        stream=stream_id,
        code=error.code,
        message=error.message,
        field=error.field,
        limit=error.limit,
        value=error.value,
        retry=error.retry,
        retry_after_s=error.retry_after_s,
    )


class Frontend:
    """Owns the streams; every accepted one ends in exactly one Final or Failure, unless its connection is gone."""

    def __init__(
        self,
        config: FrontendConfig,
        model: ModelInfo,
        prompts: PromptEncoder,
        core: Core,
        encoders: Encoder,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.room = encoders.room
        self.counters = Counters()
        self.streams = Registry()
        self.core = CoreSide(config, core, self.streams, self, clock)
        self._config = config
        self._prompts = prompts
        self._clock = clock
        self._started = clock()
        self._random = random.SystemRandom()
        self._next_request_id = 0
        self._inline = RequestEncoder(prompts, config, model)
        self._encoders = encoders
        self._encoding: dict[int, asyncio.Future[Encoded]] = {}  # by request id
        self._attachments = Attachments(config, encoders.room, self._attachment_expired)
        self._resets = Resets(config, clock)
        self._draining = False
        self._drain_waiters: list[tuple[Sink, int]] = []
        self._drained = asyncio.Event()

    # --- what is going on ------------------------------------------------------------------------------

    @property
    def health(self) -> str:
        """loading, ready, draining or failed."""
        return "draining" if self._draining and self.core.state != "failed" else self.core.state

    @property
    def uptime_s(self) -> float:
        """Seconds since this object was made."""
        return self._clock() - self._started

    # --- from the connections --------------------------------------------------------------------------

    def connect(self, sink: Sink) -> None:
        """A connection finished its handshake."""
        self.streams.connect(sink)

    def disconnect(self, sink: Sink) -> None:
        """A connection is gone: nobody waits for its streams."""
        for stream in self.streams.disconnect(sink):
            self._abort(stream, "cancelled")
        self._attachments.disconnect(sink)
        self._drain_waiters = [waiter for waiter in self._drain_waiters if waiter[0] is not sink]

    def attach(self, sink: Sink, stream_id: int, data: Buffer) -> None:
        """Append bytes to what the next `generate` of this stream says they are."""
        if stream_id in self.streams.of(sink):
            raise InvalidRequest(
                "this stream is already open", field="stream", limit="attached before generate", value=stream_id
            )
        self._attachments.add(sink, stream_id, data)

    def generate(self, sink: Sink, message: Generate) -> None:
        """Accept a request, or raise the CierzoError that says why not."""
        attached = self._attachments.take(sink, message.stream)
        if attached is not None and attached.refused:
            if message.attached is not None:
                return  # the client has its answer
            attached = None
        try:
            self._admit(sink, message.stream, message.sampling.n)
            validate.fields(message, self._config, self.model, self._prompts.special_ids)
            num_bytes, most = None if attached is None else attached.num_bytes, self.model.max_model_len
            validate.attached(message, num_bytes, most, self._prompts.max_text_bytes(most))
        except CierzoError:
            self.counters.refused += 1
            raise
        stream = self._open(sink, message)
        try:
            if attached is not None or self._prompts.weight(message) > self._config.inline_chars:
                self._encode_aside(stream, msgspec.msgpack.encode(message), attached)
            else:
                self._start(stream, self._inline.encode(message))
        except CierzoError:
            self._refuse(stream)
            raise

    def generate_large(self, sink: Sink, stream_id: int, body: bytearray) -> None:
        """Accept a request that is too long to be decoded here, or raise the CierzoError that says why not."""
        attached = self._attachments.take(sink, stream_id)
        try:
            self._admit(sink, stream_id, 1)
        except CierzoError:
            self.counters.refused += 1
            raise
        stream = self._open(sink, Generate(stream=stream_id))  # the true one comes with the answer
        try:
            self._encode_aside(stream, body, None if attached is None or attached.refused else attached)
        except CierzoError:
            self._refuse(stream)
            raise

    def cancel(self, sink: Sink, stream_id: int) -> None:
        """End a stream, and forget what is attached to it; one that has just ended is no error, as the two messages
        may have crossed. Raises Overloaded if the connection does that too often."""
        self._attachments.take(sink, stream_id)
        if (stream := self.streams.of(sink).get(stream_id)) is not None:
            self._abort(stream, "cancelled")
            self._resets.count(sink)

    def fail(self, sink: Sink, stream_id: int, error: CierzoError, *, attaching: bool = False) -> None:
        """A message about `stream_id` was faulty: the stream, if there is one, ends with this error.

        `attaching`: it was part of a prompt, of which more may come. Raises Overloaded as `cancel` does.
        """
        stream = self.streams.of(sink).get(stream_id)
        sink.put(failure(stream_id, error))
        if stream is not None:
            self.streams.detach(stream)
            self._abort(stream, "cancelled")
            self._resets.count(sink)
        elif attaching:
            self._attachments.refuse(sink, stream_id)
        else:
            self._attachments.take(sink, stream_id)

    def drain(self, sink: Sink | None = None, stream_id: int = 0) -> None:
        """Accept nothing from now on; `sink` hears when the last stream has ended."""
        self._draining = True
        if sink is not None:
            self._drain_waiters.append((sink, stream_id))
        self._tell_drained()

    async def drained(self) -> None:
        """Wait until a drain is complete."""
        await self._drained.wait()

    async def close(self) -> None:
        """Stop what runs on the side."""
        for future in list(self._encoding.values()):
            future.cancel()

    # --- from the core's side --------------------------------------------------------------------------

    def deliver(self, stream: Stream, delta: TokenDelta) -> None:
        """Take new tokens, or the end, of a sample."""
        if stream.first_token_s is None and delta.token_ids:
            stream.first_token_s = self._clock() - stream.arrived
        sample = stream.samples[delta.sample]
        was_cut = sample.cut
        message = stream.take(sample, delta)
        if message is not None and stream.sink is not None:
            stream.sink.put(message)
        if delta.finish is not None:
            if stream.end(sample, delta.finish):
                self._finish(stream)
        elif sample.cut and not was_cut:
            self.core.abort(stream, "stop", sample)

    def end(self, stream: Stream, reason: FinishReason, message: str = "") -> None:
        """End a stream that the core will not end."""
        stream.end_all(reason, self._clock(), message)
        self.finish(stream)

    def finish(self, stream: Stream) -> None:
        """All samples of a stream have ended: say so, now."""
        sink = stream.sink
        self._finish(stream)
        if sink is not None:
            sink.flush()

    def fail_all(self, error: CierzoError) -> None:
        """There will be no core any more: every open stream fails with `error`."""
        for stream in self.streams:
            sink, stream_id = stream.sink, stream.stream_id
            self._close(stream)
            if sink is not None:
                sink.put(failure(stream_id, error))
                sink.flush()

    # --- inside ----------------------------------------------------------------------------------------

    def _admit(self, sink: Sink, stream_id: int, num_samples: int) -> None:
        config, streams = self._config, self.streams.of(sink)
        if stream_id in streams:
            raise InvalidRequest("this stream is already open", field="stream", limit="unique", value=stream_id)
        if self._draining:
            raise Draining("the server is draining", retry_after_s=config.retry_after_s)
        self.core.require()
        self._room("max_streams_per_connection", len(streams) + 1, config.max_streams_per_connection)
        self._room("max_open_samples", self.streams.num_samples + num_samples, config.max_open_samples)

    def _room(self, limit_name: str, value: int, limit: int) -> None:
        if value > limit:
            raise Overloaded(
                f"{limit_name} is {limit}",
                field=limit_name,
                limit=limit,
                value=value,
                retry_after_s=self._config.retry_after_s,
            )

    def _open(self, sink: Sink, message: Generate) -> Stream:
        request_id = self._next_request_id
        self._next_request_id += 1
        arrived = self._clock()
        stream = Stream(
            request_id=request_id,
            stream_id=message.stream,
            sink=sink,
            deltas=message.deltas,
            num_samples=message.sampling.n,
            num_tokens=0,
            arrived=arrived,
            deadline_at_s=arrived + (message.deadline_s or self._config.default_deadline_s),
        )
        self.streams.open(stream)
        return stream

    def _encode_aside(self, stream: Stream, body: bytes | bytearray, attached: Attached | None) -> None:
        """A long prompt is rendered and encoded by a process; meanwhile the stream can be cancelled."""
        assert stream.sink is not None
        features = sorted(stream.sink.features)
        job = Job(stream=stream.stream_id, features=features, has_attached=attached is not None)
        pieces = [] if attached is None else attached.pieces
        future = self._encoders.submit(job, body, pieces, stream.deadline_at_s)
        self._encoding[stream.request_id] = future
        future.add_done_callback(lambda done: self._encoded(stream, done))

    def _encoded(self, stream: Stream, future: asyncio.Future[Encoded]) -> None:
        """An answer for a stream that waits for it; a stream that ended meanwhile has cancelled it."""
        self._encoding.pop(stream.request_id, None)
        if future.cancelled() or stream not in self.streams:
            return
        try:
            encoded = future.result()
            self._settle(stream, encoded.message)
            self._start(stream, encoded)
            if stream.sink is not None:
                stream.sink.flush()
        except Late:
            self.end(stream, "deadline")
        except CierzoError as error:
            self._refuse_late(stream, error)
        except Exception as error:
            log.exception("request %d could not be started", stream.request_id)
            self._refuse_late(stream, CierzoError(f"internal error: {type(error).__name__}"))

    def _settle(self, stream: Stream, message: Generate) -> None:
        """Take over what a message says of its stream, which may have been opened without it."""
        num_samples = self.streams.num_samples + message.sampling.n - stream.num_samples
        self._room("max_open_samples", num_samples, self._config.max_open_samples)
        self.streams.resize(stream, message.sampling.n)
        stream.deltas = message.deltas
        stream.deadline_at_s = stream.arrived + (message.deadline_s or self._config.default_deadline_s)

    def _start(self, stream: Stream, encoded: Encoded) -> None:
        submit = pack_prompt(encoded.submit)
        if submit.sampling.seed is None:
            seed = self._random.getrandbits(SEED_BITS)
            submit = msgspec.structs.replace(submit, sampling=msgspec.structs.replace(submit.sampling, seed=seed))
        num_tokens = encoded.num_prompt_tokens + len(submit.output_token_ids)
        self._room("max_open_tokens", self.streams.num_tokens + num_tokens, self._config.max_open_tokens)
        detokenizers = [self._detokenizer(encoded) for _ in range(stream.num_samples)]
        stream.start(submit, encoded.num_prompt_tokens, detokenizers)
        self.streams.charge(stream, num_tokens)
        self.counters.accepted += 1
        self.core.submit(stream)

    def _detokenizer(self, encoded: Encoded) -> Detokenizer | None:
        """A new one, which has seen what a resumed request brings."""
        detokenizer = self._prompts.detokenizer(encoded.submit.sampling)
        if detokenizer is not None:
            detokenizer.go_on_after(len(encoded.submit.output_token_ids), encoded.tail)
        return detokenizer

    def _attachment_expired(self, sink: Sink, stream_id: int) -> None:
        error = InvalidRequest(
            "bytes were attached, and no generate came",
            field="attached",
            limit=f"{ATTACHED_S:g} s",
            value=stream_id,
        )
        sink.put(failure(stream_id, error))
        sink.flush()

    def _abort(self, stream: Stream, reason: FinishReason) -> None:
        """The core reports the end of what it has; without it, or before it heard of the stream, we end it here."""
        stream.aborted = reason
        if not self.core.abort(stream, reason):
            self.end(stream, reason)

    def _finish(self, stream: Stream) -> None:
        """The last sample has ended: put its final record, and forget the stream."""
        self.counters.finished += 1
        sink = stream.sink
        self._close(stream)
        if sink is not None:
            sink.put(stream.final(self._clock()))

    def _refuse(self, stream: Stream) -> None:
        if stream in self.streams:
            self.counters.refused += 1
            self._close(stream)

    def _refuse_late(self, stream: Stream, error: CierzoError) -> None:
        sink = stream.sink
        self._refuse(stream)
        if sink is not None:
            sink.put(failure(stream.stream_id, error))
            sink.flush()

    def _close(self, stream: Stream) -> None:
        """A stream ends, whatever the way."""
        if (future := self._encoding.pop(stream.request_id, None)) is not None:
            future.cancel()
        self.streams.close(stream)
        self.core.forget(stream)
        self._tell_drained()

    def _tell_drained(self) -> None:
        if not self._draining or len(self.streams):
            return
        self._drained.set()
        waiters, self._drain_waiters = self._drain_waiters, []
        for sink, stream_id in waiters:
            sink.put(Drained(stream=stream_id))
            sink.flush()
