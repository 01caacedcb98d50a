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

from cierzo.engine.errors import CierzoError, Draining, Interrupted, InvalidRequest, SlowReader
from cierzo.engine.frontend import validate
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.core_side import Core, CoreSide
from cierzo.engine.frontend.detok import Detokenizer
from cierzo.engine.frontend.drain import Drain
from cierzo.engine.frontend.keeper import Keeper
from cierzo.engine.frontend.outlet import Outlets
from cierzo.engine.frontend.prompt import PromptEncoder
from cierzo.engine.frontend.readers import Readers
from cierzo.engine.frontend.registry import Registry, require_room
from cierzo.engine.frontend.sample import require_bounded
from cierzo.engine.frontend.stream import Sink, Stream, failure
from cierzo.engine.messages import (
    Credit,
    FinishReason,
    Generate,
    ModelInfo,
    Resume,
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


def interruption(stream: Stream) -> Interrupted:
    """The error for a stream that the server's end cuts short; it tells the seed, which a resumed request needs."""
    seed = None if stream.submit is None else stream.submit.sampling.seed
    return Interrupted(
        "the server stops; the same request goes on elsewhere, with this seed and the tokens that came",
        field="seed",
        value=seed,
    )


class Frontend:
    """Owns the streams; every accepted one ends in exactly one Final or Failure, for whoever reads it then."""

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
        self.outlets = Outlets(config, self.streams, self.core, self, prompts.detokenizer, clock)
        self.keeper = Keeper(config, clock, self._abandon)
        self._readers = Readers(config, self.streams, self.keeper, self.outlets, prompts.detokenizer)
        self._config = config
        self._prompts = prompts
        self._clock = clock
        self._started = clock()
        self._random = random.SystemRandom()
        self._next_request_id = 0
        self._encoding: set[asyncio.Task[None]] = set()
        self._drain = Drain(config, lambda: len(self.streams) + self.streams.num_read, self.interrupt)

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
        """A connection is gone: its streams go on if they can be resumed, else nobody waits for them."""
        for stream in self.streams.disconnect(sink):
            if stream in self.streams:
                if stream.name and (stream.submit is not None or stream.key is not None):
                    self.keeper.orphaned(stream)
                else:
                    self._abort(stream, "cancelled")
            self.outlets.detach(stream, sink)
        self.outlets.left(sink)
        self._drain.leave(sink)
        self._drain.check()

    def writable(self, sink: Sink) -> None:
        """A connection that was paused takes output again."""
        self.outlets.writable(sink)

    def generate(self, sink: Sink, message: Generate) -> None:
        """Accept a request, or join the one that its idempotency key names, or raise the CierzoError that says why
        not."""
        try:
            self._readers.place(sink, message.stream)
            if (stream := self.keeper.find_key(message)) is not None:
                self._readers.join(sink, message, stream)
                return
            self._admit(message)
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

    def resume(self, sink: Sink, message: Resume) -> None:
        """Give a request to another reader, who has some of it. Raises the CierzoError that says why not."""
        self._readers.resume(sink, message)

    def credit(self, sink: Sink, message: Credit) -> None:
        """A reader has consumed deltas. For a stream that has just ended nothing happens."""
        if message.bytes < 1:
            raise InvalidRequest("credit of less than 1", field="bytes", limit="at least 1", value=message.bytes)
        if (stream := self.streams.of(sink).get(message.stream)) is not None:
            self.outlets.grant(stream, message.bytes)

    def cancel(self, sink: Sink, stream_id: int) -> None:
        """End a stream; one that has just ended is no error, as the two messages may have crossed."""
        if (stream := self.streams.of(sink).get(stream_id)) is not None:
            self._cancel(stream)

    def cancel_request(self, request_id: str) -> None:
        """End a request, whoever reads it. Raises NotFound."""
        self._cancel(self.keeper.find(request_id))

    def fail(self, sink: Sink, stream_id: int, error: CierzoError) -> None:
        """A message about `stream_id` was faulty: the stream, if there is one, ends with this error."""
        if (stream := self.streams.of(sink).get(stream_id)) is not None:
            self.streams.detach(stream)
            if stream in self.streams:
                self._abort(stream, "cancelled")
            self.outlets.detach(stream, sink)
        sink.put(failure(stream_id, error))
        self._drain.check()

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
        self.outlets.hurry(Interrupted("the server stops, and does not wait for its slow readers"))

    async def close(self) -> None:
        """Stop what runs on the side."""
        self.outlets.close()
        self.keeper.close()
        self._drain.close()
        tasks = list(self._encoding)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- from the core's side --------------------------------------------------------------------------

    def deliver(self, stream: Stream, delta: TokenDelta) -> None:
        """Take new tokens, or the end, of a sample."""
        if stream.first_token_s is None and delta.token_ids:
            self.streams.began(stream, self._clock() - stream.arrived)
        sample = stream.samples[delta.sample]
        was_cut = sample.cut
        if not was_cut:
            self.outlets.add(stream, sample, delta)
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

    # --- from the outlets ------------------------------------------------------------------------------

    def give_up(self, stream: Stream, error: SlowReader) -> None:
        """The reader of a stream is too slow: it hears so at once, and the request ends if it still runs."""
        sink = stream.sink
        assert sink is not None
        sink.put(failure(stream.stream_id, error))
        self.streams.detach(stream)
        if stream in self.streams:
            self._fail(stream, error)
        self.outlets.detach(stream, sink)
        sink.flush()
        self._drain.check()

    def delivered(self) -> None:
        """A reader has got the last message of its stream."""
        self._drain.check()

    # --- inside ----------------------------------------------------------------------------------------

    def _admit(self, message: Generate) -> None:
        config = self._config
        if self._drain.refusing:
            raise Draining("the server is draining", retry_after_s=config.retry_after_s)
        self.core.require()
        validate.fields(message, config, self.model, self._prompts.special_ids)
        self._room("max_open_samples", self.streams.num_samples + message.sampling.n, config.max_open_samples)

    def _room(self, limit_name: str, value: int, limit: int) -> None:
        require_room(limit_name, value, limit, self._config.retry_after_s)

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
        if "resume" in sink.features:
            self.keeper.enter(stream)
            self.keeper.claim(stream, message)
        self.streams.open(stream)
        self.core.opened(stream)
        return stream

    async def _encode_aside(self, stream: Stream, message: Generate) -> None:
        """A long prompt is rendered and encoded in a thread; meanwhile the stream can be cancelled."""
        try:
            token_ids = await asyncio.to_thread(self._prompts.encode, message)
            if stream in self.streams:
                self._start(stream, message, token_ids)
                if stream.sink is not None:
                    stream.sink.flush()
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
        if not stream.deltas:
            require_bounded(submit, self._config.max_answer_bytes)
        stream.start(submit, [self._detokenizer(submit) for _ in range(stream.num_samples)])
        self.streams.charge(stream, num_tokens)
        self.counters.accepted += 1
        if stream.sink is not None:
            self.outlets.attach(stream)
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

    def _cancel(self, stream: Stream) -> None:
        """End a stream; output that its reader has not been sent by now is not sent any more."""
        self.outlets.skip(stream)
        if stream in self.streams:
            self._abort(stream, "cancelled")

    def _abandon(self, stream: Stream) -> None:
        """Nobody came in time to resume it."""
        self._abort(stream, "cancelled")

    def _abort(self, stream: Stream, reason: FinishReason) -> None:
        """The core reports the end of what it has; without it, or before it heard of the stream, we end it here."""
        stream.aborted = reason
        if not self.core.abort(stream, reason):
            self.end(stream, reason)

    def _finish(self, stream: Stream) -> None:
        """The last sample has ended."""
        self.counters.finished += 1
        self._close(stream)

    def _fail(self, stream: Stream, error: CierzoError) -> None:
        """End a stream with an error, in the core too."""
        sink = stream.sink
        self.core.withdraw(stream)
        stream.paused = False
        self._close(stream, error)
        if sink is not None:
            sink.flush()

    def _refuse(self, stream: Stream) -> None:
        if stream in self.streams:
            self.counters.refused += 1
            self.streams.close(stream)
            self.streams.detach(stream)
            self.keeper.refused(stream)
            self.core.forget(stream)
            self._drain.check()

    def _refuse_late(self, stream: Stream, error: CierzoError) -> None:
        sink = stream.sink
        self._refuse(stream)
        if sink is not None:
            sink.put(failure(stream.stream_id, error))
            sink.flush()

    def _close(self, stream: Stream, error: CierzoError | None = None) -> None:
        """Nothing of a stream is computed any more, whatever the reason: its reader gets what is left and why."""
        stream.close(self._clock(), error)
        self.streams.close(stream)
        self.core.forget(stream)
        self.keeper.ended(stream)
        self.outlets.ended(stream)
        self._drain.check()
