"""The front end's heart: open streams between many connections and one core.

Single-threaded, on the event loop. A step of the core comes in as one message and leaves in one write per
connection. `rpc.Connection` is the only `Sink`, `core_link.CoreLink` the only `Core`; tests bring their own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from cierzo.engine.errors import CierzoError, Interrupted, InvalidRequest
from cierzo.engine.frontend.arrivals import Arrivals, Counters
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.core_side import Core, CoreSide
from cierzo.engine.frontend.drain import Drain
from cierzo.engine.frontend.encoders import Encoder
from cierzo.engine.frontend.failures import failure
from cierzo.engine.frontend.frames import Buffer
from cierzo.engine.frontend.heap import Heap
from cierzo.engine.frontend.keeper import Keeper
from cierzo.engine.frontend.limits import CancelLimiter
from cierzo.engine.frontend.observe.observer import Observer
from cierzo.engine.frontend.outlet import Outlets
from cierzo.engine.frontend.readers import Readers
from cierzo.engine.frontend.registry import Registry
from cierzo.engine.frontend.stream import Sink, Stream, reader_of
from cierzo.engine.frontend.tenancy import Tenancy
from cierzo.engine.frontend.words import Words
from cierzo.engine.messages import Credit, FinishReason, Generate, ModelInfo, Resume, TokenDelta
from cierzo.engine.text.prompt import PromptEncoder

log = logging.getLogger(__name__)


def interruption(stream: Stream) -> Interrupted:
    """The error for a stream that the server's end cuts short; it tells the seed, which a resumed request needs."""
    if stream.sampling.seed is None:
        return Interrupted("the server stops; it had not begun the request, which can be sent elsewhere")
    return Interrupted(
        "the server stops; the same request goes on elsewhere, with this seed and the tokens that came",
        field="seed",
        value=stream.sampling.seed,
    )


class Probes(NamedTuple):
    """The model has been loaded once; the server need not be restarted; it takes requests; and what an operator
    should know ahead."""

    startup: bool
    live: bool
    ready: bool
    notes: list[str]


class Frontend:
    """Owns the streams; every accepted one ends in exactly one Final or Failure, for whoever reads it then."""

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
        self.budget = encoders.budget
        self.counters = Counters()
        self.observer = Observer(config)
        self.notes: list[Callable[[], str | None]] = []  # of what an operator should know ahead
        self.tenancy = Tenancy(config, clock, encoders.budget.pool)
        self.streams = Registry(self.tenancy)
        self.core = CoreSide(config, core, self.streams, self, clock)
        self._pace = self.core.pace
        self.keeper = Keeper(config, self.tenancy, clock, self._abandon)
        self.heap = Heap(config, self.tenancy, self.keeper, self._overflow)
        new_reader = reader_of(prompts)
        self.outlets = Outlets(config, self.streams, self.core, self, new_reader, self.heap, clock)
        self._readers = Readers(config, self.streams, self.keeper, self.outlets, new_reader)
        self._arrivals = Arrivals(
            *(config, model, prompts, encoders, self.tenancy, self.streams, self.core),
            *(self.keeper, self._readers, self.outlets, self.heap, self, clock),
        )
        self.grammars = self._arrivals.grammars
        self.words = Words(config, model, prompts, encoders, self.tenancy, self.streams, clock)
        self._cancels = CancelLimiter(config, clock)
        self._clock = clock
        self._started = clock()
        self._drain = Drain(config, self)
        if self.observer.usage is not None:
            self.notes.append(self.observer.usage.why_not)

    # --- what is going on ------------------------------------------------------------------------------

    @property
    def health(self) -> str:
        """loading, ready, stalled, draining or failed."""
        return "draining" if self._drain.active and self.core.state != "failed" else self.core.state

    @property
    def uptime_s(self) -> float:
        """Seconds since this object was made."""
        return self._clock() - self._started

    @property
    def probes(self) -> Probes:
        """Answers to an orchestrator."""
        health = self.health
        return Probes(
            startup=self.core.has_been_ready,
            live=health != "failed",
            ready=health == "ready",
            notes=[told for note in self.notes if (told := note()) is not None],
        )

    # --- from the connections --------------------------------------------------------------------------

    def connect(self, sink: Sink) -> None:
        """A connection finished its handshake. Raises Overloaded if its tenant can have no other."""
        self.tenancy.require("max_connections", sink.access.tenant, 1)
        self.tenancy.add("max_connections", sink.access.tenant, 1)
        self.streams.connect(sink)

    def disconnect(self, sink: Sink) -> None:
        """A connection is gone: its streams go on if they can be resumed, else nobody waits for them."""
        if self.streams.has(sink):
            self.tenancy.add("max_connections", sink.access.tenant, -1)
        for stream in self.streams.disconnect(sink):
            if stream in self.streams:
                if stream.name and (stream.submit is not None or stream.key is not None):
                    self.keeper.orphaned(stream)
                else:
                    self._abort(stream, "cancelled")
            self.outlets.detach(stream, sink)
        self._arrivals.disconnect(sink)
        self.words.disconnect(sink)
        self.outlets.left(sink)
        self._drain.leave(sink)
        self._drain.check()

    def writable(self, sink: Sink) -> None:
        """A connection that was paused takes output again."""
        self.words.writable(sink)
        self.outlets.writable(sink)

    def attach(self, sink: Sink, stream_id: int, data: Buffer, image: int | None = None) -> None:
        """Append bytes to what the next `generate` of this stream says they are. Raises CierzoError."""
        self._arrivals.attach(sink, stream_id, data, image)

    def generate(self, sink: Sink, message: Generate) -> None:
        """Accept a request, or join the one that its idempotency key names, or raise the CierzoError that says why
        not."""
        self._arrivals.generate(sink, message)

    def generate_large(self, sink: Sink, stream_id: int, body: bytearray, deadline_s: float | None) -> None:
        """Accept a request that is too long to be decoded here, or raise the CierzoError that says why not."""
        self._arrivals.generate_large(sink, stream_id, body, deadline_s)

    def resume(self, sink: Sink, message: Resume) -> None:
        """Give a request to another reader, who has some of it. Raises the CierzoError that says why not."""
        self._readers.resume(sink, message)

    def credit(self, sink: Sink, message: Credit) -> None:
        """A reader has consumed deltas. For a stream that has just ended nothing happens."""
        stream = self.streams.of(sink).get(message.stream)
        if stream is None:
            return
        if message.bytes < 1:
            raise InvalidRequest("credit of less than 1", field="bytes", limit="at least 1", value=message.bytes)
        self.outlets.grant(stream, message.bytes)

    def cancel(self, sink: Sink, stream_id: int) -> None:
        """End a stream, and forget what is attached to it; one that has just ended is no error, as the two messages
        may have crossed. Raises Overloaded if the connection does that too often."""
        self._arrivals.forget_attached(sink, stream_id)
        if (stream := self.streams.of(sink).get(stream_id)) is not None:
            self._cancel(stream)
            self._cancels.count(sink)

    def cancel_request(self, sink: Sink, request_id: str) -> None:
        """End a request, whoever reads it. Raises NotFound; and Overloaded as `cancel` does."""
        self._cancel(self.keeper.find(request_id, sink.access.tenant))
        self._cancels.count(sink)

    def fail(self, sink: Sink, stream_id: int, error: CierzoError, *, attaching: bool = False) -> None:
        """A message about `stream_id` was faulty: the stream, if there is one, ends with this error.

        `attaching`: it was part of a prompt, of which more may come. Raises Overloaded as `cancel` does.
        """
        stream = self.streams.of(sink).get(stream_id)
        sink.put(failure(stream_id, error))
        if stream is not None:
            self.streams.detach(stream)
            if stream in self.streams:
                self._abort(stream, "cancelled")
            self.outlets.detach(stream, sink)
            self._drain.check()
        if attaching:
            self._arrivals.refuse_attached(sink, stream_id)
        else:
            self._arrivals.forget_attached(sink, stream_id)
        if stream is not None:
            self._cancels.count(sink)

    def drain(self, sink: Sink | None = None, stream_id: int = 0, *, for_good: bool = False) -> None:
        """Say that the server is draining, then accept nothing, then end what is left; `sink` hears when nothing
        is open any more. for_good: it cannot be undone. Raises InvalidRequest for the id of an open stream, and
        Overloaded for one question too many."""
        if sink is not None:
            streams = self.streams.of(sink)
            if stream_id in streams:
                raise InvalidRequest("this stream is already open", field="stream", limit="unique", value=stream_id)
            self._drain.wait_for(sink, stream_id, len(streams))
        self._drain.begin(for_good=for_good)
        self._drain.check()

    def undo_drain(self) -> None:
        """Accept requests again; who waits for the end of the drain hears that it will not come. Raises Draining
        if the server is to stop."""
        self._drain.undo()

    async def drained(self) -> None:
        """Wait until a drain is complete."""
        await self._drain.wait()

    def interrupt(self) -> None:
        """End every open stream with an error that says how to go on elsewhere."""
        num_interrupted = len(self.streams)
        for stream in self.streams:
            self._fail(stream, interruption(stream))
        self._drain.interrupted()
        num_interrupted += self.outlets.hurry(interruption)
        if num_interrupted:
            log.info("interrupted %d requests", num_interrupted)

    async def close(self) -> None:
        """Stop what runs on the side."""
        self._drain.close()
        self.heap.close()
        self.outlets.close()
        self.keeper.close()
        self._arrivals.close()
        self.words.close()
        self.core.settle()
        self.observer.close()

    # --- from the drain --------------------------------------------------------------------------------

    @property
    def num_open(self) -> int:
        """Streams that run or have a reader, and last messages on their way."""
        return len(self.streams) + self.streams.num_read + self.outlets.num_sending

    @property
    def num_left(self) -> int:
        """Count the requests that run or have a reader, or whose last message is on its way."""
        orphans = sum(stream.sink is None for stream in self.streams)
        return orphans + self.streams.num_read + self.outlets.num_sending

    @property
    def num_unsent(self) -> int:
        """Connections with messages that are not on their way yet."""
        return self.streams.num_unsent

    # --- from the arrivals -----------------------------------------------------------------------------

    @property
    def is_refusing(self) -> bool:
        """Whether a drain has ended admission."""
        return self._drain.refusing

    def left(self, stream: Stream) -> None:
        """A stream was refused: nothing of it is left."""
        self._drain.check()

    def refused(self, error: CierzoError, sink: Sink, message: Generate | None = None) -> None:
        """A request was refused before a stream was opened for it; `message`: as far as it could be read."""
        self.counters.refused += 1
        self.observer.refused(
            error,
            tenant=sink.access.tenant.name,
            peer=sink.peer,
            caller_id="" if message is None else message.caller_id,
            traceparent="" if message is None else message.traceparent,
        )

    def refused_late(self, error: CierzoError, stream: Stream) -> None:
        """A request was refused for what its prompt turned out to be."""
        self.counters.refused += 1
        self.observer.refused(
            error,
            tenant=stream.tenant.name,
            peer=stream.peer,
            request_id=stream.name or str(stream.request_id),
            caller_id=stream.caller_id,
            traceparent=stream.traceparent,
            total_s=self._clock() - stream.arrived,
        )

    # --- from the core's side --------------------------------------------------------------------------

    def deliver(self, stream: Stream, delta: TokenDelta) -> None:
        """Take new tokens, or the end, of a sample."""
        if stream.book.is_rated:
            stream.book.level -= len(delta.token_ids)
        sample = stream.samples[delta.sample]
        if delta.token_ids:
            pace = self._pace
            if sample.last_s == pace.before_s:
                pace.num_shared += 1
            else:
                pace.apart(sample)
                if stream.first_token_s is None:
                    self._began(stream)
            sample.last_s = pace.now_s
        elif delta.prompt_logprobs:  # which come without tokens, and before the end
            self.outlets.add_scores(stream, delta.prompt_logprobs)
            return
        was_cut = sample.cut
        if not was_cut:
            self.outlets.add(stream, sample, delta)
        if delta.finish is not None:
            if stream.end(sample, delta.finish):
                self.finish(stream)
        elif sample.cut and not was_cut:
            self.core.abort(stream, "stop", sample)

    def settled(self, stream: Stream) -> None:
        """No core owes the cost of a stream that has ended."""
        self.observer.ended(stream)

    def end(self, stream: Stream, reason: FinishReason, message: str = "") -> None:
        """End a stream that the core will not end."""
        stream.end_all(reason, self._clock(), message)
        self.finish(stream)

    def finish(self, stream: Stream) -> None:
        """All samples of a stream have ended."""
        self.counters.finished += 1
        self._close(stream)

    def fail_all(self, error: CierzoError) -> None:
        """There will be no core any more: every open stream fails with `error`."""
        for stream in self.streams:
            self._fail(stream, error)

    # --- from the outlets ------------------------------------------------------------------------------

    def give_up(self, stream: Stream, error: CierzoError) -> None:
        """The reader of a stream costs too much: it hears so at once, and the request ends if it still runs."""
        sink = stream.sink
        assert sink is not None
        sink.put(failure(stream.stream_id, error))
        self.streams.detach(stream)
        if stream in self.streams:
            self.core.withdraw(stream)
            stream.paused = False
            self._close(stream, error)
        self.outlets.detach(stream, sink)
        self._drain.check()

    def delivered(self) -> None:
        """A reader has got the last message of its stream."""
        self._drain.check()

    # --- inside ----------------------------------------------------------------------------------------

    def _began(self, stream: Stream) -> None:
        """The first token of a stream has come."""
        first_token_s = self._clock() - stream.arrived
        self.streams.began(stream, first_token_s)
        self.observer.first_token(stream, first_token_s)

    def _cancel(self, stream: Stream) -> None:
        """End a stream; output that its reader has not been sent by now is not sent any more."""
        self.outlets.skip(stream)
        if stream in self.streams:
            self._abort(stream, "cancelled")

    def _overflow(self, stream: Stream, error: CierzoError) -> None:
        """The heap is full: a stream ends, and its answer goes."""
        stream.drop_answer()
        if stream.sink is not None:
            stream.error = error  # also if it has ended, and its reader has not got all
            self.give_up(stream, error)
        elif stream in self.streams:
            self._fail(stream, error)
        else:
            self.outlets.drop(stream)

    def _abandon(self, stream: Stream) -> None:
        """Nobody came in time to resume it."""
        self._abort(stream, "cancelled")

    def _abort(self, stream: Stream, reason: FinishReason) -> None:
        """The core reports the end of what it has; without it, or before it heard of the stream, we end it here."""
        stream.aborted = reason
        if not self.core.abort(stream, reason):
            self.end(stream, reason)

    def _fail(self, stream: Stream, error: CierzoError) -> None:
        """End a stream with an error, in the core too."""
        self.core.withdraw(stream)
        stream.paused = False
        self._close(stream, error)

    def _close(self, stream: Stream, error: CierzoError | None = None) -> None:
        """Nothing of a stream is computed any more, whatever the reason: its reader gets what is left and why."""
        stream.close(self._clock(), error)
        if not stream.owed:
            self.observer.ended(stream)
        self._arrivals.ended(stream)
        self.streams.close(stream)
        self.core.forget(stream)
        self.keeper.ended(stream)
        self.outlets.ended(stream)
        self.heap.fit()
        self._drain.check()
