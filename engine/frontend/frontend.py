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

from cierzo.engine.errors import CierzoError, Draining, Interrupted, InvalidRequest, Overloaded
from cierzo.engine.frontend import validate
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.core_side import Core, CoreSide
from cierzo.engine.frontend.detok import Detokenizer
from cierzo.engine.frontend.drain import Drain
from cierzo.engine.frontend.prompt import PromptEncoder
from cierzo.engine.frontend.registry import Registry
from cierzo.engine.frontend.stream import Sink, Stream
from cierzo.engine.messages import (
    Failure,
    FinishReason,
    Generate,
    ModelInfo,
    Submit,
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


def interruption(stream: Stream) -> Interrupted:
    """The error for a stream that the server's end cuts short; it tells the seed, which a resumed request needs."""
    seed = None if stream.submit is None else stream.submit.sampling.seed
    return Interrupted(
        "the server stops; the same request goes on elsewhere, with this seed and the tokens that came",
        field="seed",
        value=seed,
    )


class Frontend:
    """Owns the streams; every accepted one ends in exactly one Final or Failure, unless its connection is gone."""

    def __init__(
        self,
        config: FrontendConfig,
        model: ModelInfo,
        prompts: PromptEncoder,
        core: Core,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.counters = Counters()
        self.streams = Registry()
        self.core = CoreSide(config, core, self.streams, self, clock)
        self._config = config
        self._prompts = prompts
        self._clock = clock
        self._started = clock()
        self._random = random.SystemRandom()
        self._next_request_id = 0
        self._encoding: set[asyncio.Task[None]] = set()
        self._drain = Drain(config, lambda: len(self.streams), self.interrupt)

    # --- what is going on ------------------------------------------------------------------------------

    @property
    def health(self) -> str:
        """loading, ready, stalled, draining or failed."""
        return "draining" if self._drain.active and self.core.state != "failed" else self.core.state

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
        self._drain.leave(sink)

    def generate(self, sink: Sink, message: Generate) -> None:
        """Accept a request, or raise the CierzoError that says why not."""
        try:
            self._admit(sink, message)
        except CierzoError:
            self.counters.refused += 1
            raise
        stream = self._open(sink, message)
        if self._prompts.num_chars(message) > self._config.inline_chars:
            task = asyncio.get_running_loop().create_task(self._encode_aside(stream, message))
            self._encoding.add(task)
            task.add_done_callback(self._encoding.discard)
            return
        try:
            self._start(stream, message, self._prompts.encode(message))
        except CierzoError:
            self._refuse(stream)
            raise

    def cancel(self, sink: Sink, stream_id: int) -> None:
        """End a stream; one that has just ended is no error, as the two messages may have crossed."""
        if (stream := self.streams.of(sink).get(stream_id)) is not None:
            self._abort(stream, "cancelled")

    def fail(self, sink: Sink, stream_id: int, error: CierzoError) -> None:
        """A message about `stream_id` was faulty: the stream, if there is one, ends with this error."""
        if (stream := self.streams.of(sink).get(stream_id)) is not None:
            self.streams.detach(stream)
            self._abort(stream, "cancelled")
        sink.put(failure(stream_id, error))

    def drain(self, sink: Sink | None = None, stream_id: int = 0) -> None:
        """Say that the server is draining, then accept nothing, then end what is left; `sink` hears when nothing
        is open any more."""
        if sink is not None:
            self._drain.wait_for(sink, stream_id)
        self._drain.begin()
        self._drain.check()

    def undo_drain(self) -> None:
        """Accept requests again; who waits for the end of the drain hears that it will not come."""
        for sink, stream_id in self._drain.undo():
            sink.put(failure(stream_id, Draining("the drain was undone before it was complete")))
            sink.flush()

    async def drained(self) -> None:
        """Wait until a drain is complete."""
        await self._drain.wait()

    def interrupt(self) -> None:
        """End every open stream with an error that says how to go on elsewhere."""
        for stream in self.streams:
            self._fail(stream, interruption(stream))

    async def close(self) -> None:
        """Stop what runs on the side."""
        self._drain.close()
        tasks = list(self._encoding)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

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
            self._fail(stream, error)

    # --- inside ----------------------------------------------------------------------------------------

    def _admit(self, sink: Sink, message: Generate) -> None:
        config, streams = self._config, self.streams.of(sink)
        if message.stream in streams:
            raise InvalidRequest(
                "this stream is already open", field="stream", limit="unique", value=message.stream
            )
        if self._drain.refusing:
            raise Draining("the server is draining", retry_after_s=config.retry_after_s)
        self.core.require()
        validate.fields(message, config, self.model, self._prompts.special_ids)
        self._room("max_streams_per_connection", len(streams) + 1, config.max_streams_per_connection)
        self._room("max_open_samples", self.streams.num_samples + message.sampling.n, config.max_open_samples)

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
        self.core.opened(stream)
        return stream

    async def _encode_aside(self, stream: Stream, message: Generate) -> None:
        """A long prompt is rendered and encoded in a thread; meanwhile the stream can be cancelled."""
        try:
            token_ids = await asyncio.to_thread(self._prompts.encode, message)
            if stream in self.streams:
                self._start(stream, message, token_ids)
        except CierzoError as error:
            self._refuse_late(stream, error)
        except Exception as error:
            log.exception("request %d could not be encoded", stream.request_id)
            self._refuse_late(stream, CierzoError(f"internal error: {type(error).__name__}"))

    def _start(self, stream: Stream, message: Generate, token_ids: list[int]) -> None:
        seed = message.sampling.seed
        if seed is None:
            seed = self._random.getrandbits(SEED_BITS)
        special_ids = self._prompts.special_ids
        submit = validate.request(message, token_ids, stream.request_id, seed, self.model, special_ids)
        num_tokens = len(token_ids) + len(message.output_token_ids)
        self.core.require_in_time(stream, submit)
        self._room("max_open_tokens", self.streams.num_tokens + num_tokens, self._config.max_open_tokens)
        stream.start(submit, [self._detokenizer(submit) for _ in range(stream.num_samples)])
        self.streams.charge(stream, num_tokens)
        self.counters.accepted += 1
        self.core.submit(stream)

    def _detokenizer(self, submit: Submit) -> Detokenizer | None:
        """A new one, which has seen what a resumed request brings."""
        detokenizer = self._prompts.detokenizer(submit.sampling)
        if detokenizer is None:
            return None
        detokenizer.push(submit.output_token_ids)
        if detokenizer.stop is not None:
            raise InvalidRequest(
                "the generation has already ended: it holds a stop string",
                field="output_token_ids",
                value=detokenizer.stop,
            )
        return detokenizer

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
            sink.put(stream.final(self._clock(), with_cost="accounting" in sink.features))

    def _fail(self, stream: Stream, error: CierzoError) -> None:
        """End a stream with an error, in the core too."""
        sink, stream_id = stream.sink, stream.stream_id
        self.core.withdraw(stream)
        self._close(stream)
        if sink is not None:
            sink.put(failure(stream_id, error))
            sink.flush()

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
        self.streams.close(stream)
        self.core.forget(stream)
        self._drain.check()
