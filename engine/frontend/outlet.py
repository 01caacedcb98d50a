"""From the streams' logs to their readers: deltas at once while a reader keeps up, else merged when it wants more.

Nothing is queued as messages. What a reader has not got is behind its cursor in the log (`Sample`). A stream whose
reader lets more than `max_pending_bytes` wait is paused: the core forgets it until the reader has taken half. A
reader who takes nothing for `slow_reader_s` while something waits is given up; one who is slow is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Protocol, cast

import msgspec

from cierzo.engine.errors import CierzoError, SlowReader
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.delta_cost import delta_cost, logprobs_cost, parts_cost, text_cost
from cierzo.engine.frontend.expiry import Expiry
from cierzo.engine.frontend.failures import failure
from cierzo.engine.frontend.frames import Buffer
from cierzo.engine.frontend.heap import Heap
from cierzo.engine.frontend.registry import Registry
from cierzo.engine.frontend.sample import Sample
from cierzo.engine.frontend.stream import NewReader, Sink, Stream
from cierzo.engine.frontend.whole import Pieces, build, cut, is_long
from cierzo.engine.messages import ACCEPTANCE, Accepted, Delta, TokenDelta, TokenLogprobs

DELTA_HEAP = 4  # a delta with log-probabilities takes so many times its cost where its reader is in this process
CHUNK_TOKENS = 4096  # merged into one delta at most; of those with log-probabilities, fewer
CHUNK_LOGPROBS = 128
CHUNK_PARTS = 1024
BOUND_TOKENS = 32  # of a sample, after which `max_answer_bytes` is looked at again
LOGPROBS_TOKENS = 16  # a token with log-probabilities is as much work as so many without
PARTS_TOKENS = 4  # as much as one that is read for parts may be
TURN_TOKENS = 8192  # sent to readers that were behind in one turn of the loop, which they share


class Pauser(Protocol):
    """The part of `CoreSide` that is used to pause a stream."""

    def withdraw(self, stream: Stream) -> None:
        """Have the core forget a stream that is to go on later."""
        ...

    def submit(self, stream: Stream) -> None:
        """Give the core what is left of a stream."""
        ...


class Owner(Protocol):
    """Who is told what becomes of readers: the `Frontend`."""

    def give_up(self, stream: Stream, error: SlowReader) -> None:
        """End a stream whose reader is too slow."""
        ...

    def delivered(self) -> None:
        """A reader has got the last message of its stream."""
        ...


class Outlets:
    """Sends to each stream's reader what its log holds, and in the end its last message."""

    def __init__(
        self,
        config: FrontendConfig,
        streams: Registry,
        core: Pauser,
        owner: Owner,
        new_reader: NewReader,
        heap: Heap,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._streams = streams
        self._core = core
        self._owner = owner
        self._heap = heap
        self._new_reader = new_reader
        self._slow: Expiry[Stream] = Expiry(config.slow_reader_s, clock, self._slow_reader)
        self._stuck: Expiry[Sink] = Expiry(config.slow_reader_s, clock, self._drop)  # within a long last message
        self._taken: dict[Stream | Sink, int] = {}  # what its connection had taken, of all that are watched
        self._building: dict[Stream, Pieces] = {}  # long last messages
        self._frames: dict[Sink, Stream] = {}  # whose long last message is being sent
        self._waiting: dict[Sink, dict[Stream, None]] = {}  # for their connection
        self._ready: dict[Stream, None] = {}  # they are behind, and may send
        self._turn: asyncio.Handle | None = None

    # --- readers ---------------------------------------------------------------------------------------

    def attach(self, stream: Stream) -> None:
        """A stream was accepted, or has a new reader: it gets what is behind the cursor."""
        sink = stream.sink
        assert sink is not None
        in_process = ACCEPTANCE in sink.features
        if in_process or stream.name:
            sink.put(self._accepted(stream, stream.num_prompt_tokens if in_process else 0))
        stream.skips = False
        stream.credit = self._config.stream_credit_bytes if "credit" in sink.features else None
        if stream.credit is not None and in_process:
            stream.credit //= DELTA_HEAP
        is_behind = stream.unsent
        stream.pending_bytes = stream.unsent_bytes if is_behind else 0
        stream.pending_limit = self._config.max_pending_bytes + stream.pending_bytes
        stream.flows = stream.deltas and not is_behind
        stream.begin_reading()
        if stream.ended_at_s is not None or is_behind:
            self._heap.measure(stream)  # it may have been given back when the reader before had all of it
            self._behind(stream)
            self._make_ready(stream)

    def detach(self, stream: Stream, sink: Sink) -> None:
        """The reader of a stream is gone, whatever the way; one that was paused for it goes on."""
        stream.flows = False
        stream.pending_bytes = 0
        self._unwatch(stream)
        self._building.pop(stream, None)
        self._ready.pop(stream, None)
        self._waiting.get(sink, {}).pop(stream, None)
        if stream.paused and stream.ended_at_s is None:
            stream.paused = False
            self._core.submit(stream)
        if stream.ended_at_s is not None:
            self._heap.release(stream)

    def left(self, sink: Sink) -> None:
        """A connection is gone; its streams have been detached."""
        self._stuck.discard(sink)
        self._taken.pop(sink, None)
        self._waiting.pop(sink, None)
        self._frame_is_gone(sink)

    @property
    def num_sending(self) -> int:
        """Long last messages that are being sent."""
        return len(self._stuck)

    def grant(self, stream: Stream, num_bytes: int) -> None:
        """The reader has consumed deltas of so much cost."""
        if stream.credit is None:
            return
        stream.credit += num_bytes
        self._took(stream)
        if stream.has_logprobs:
            stream.consume(num_bytes, self._config.stream_credit_bytes - stream.credit)
        if stream.credit > 0 and not stream.flows and stream.deltas:
            if stream.unsent:
                self._make_ready(stream)
            else:
                stream.flows = stream.ended_at_s is None and not stream.skips

    def writable(self, sink: Sink) -> None:
        """A connection takes output again."""
        for stream in self._waiting.pop(sink, {}):
            self._make_ready(stream)

    # --- output ----------------------------------------------------------------------------------------

    def add(self, stream: Stream, sample: Sample, delta: TokenDelta) -> None:
        """Take new output: to a reader at once that has all that was before and may get more, else to the log."""
        sink = stream.sink
        if not stream.flows or sink is None or sink.is_paused:
            self._log(stream, sample, delta)
            return
        token_ids, text, logprobs, parts = sample.take(delta)
        if not token_ids and not text and not parts:
            return
        sink.put(
            Delta(
                stream=stream.stream_id,
                sample=sample.index,
                token_ids=token_ids,
                text=text,
                logprobs=logprobs,
                parts=parts,
            )
        )
        if stream.credit is not None:
            stream.credit -= text_cost(len(token_ids), text)
            if delta.logprobs:
                stream.credit -= logprobs_cost(delta.logprobs[: len(token_ids)])
            if parts:
                stream.credit -= parts_cost(parts)
            stream.flows = stream.credit > 0
        if len(sample.token_ids) % BOUND_TOKENS < len(token_ids):
            sample.remember()
            self._bound(stream)

    def add_scores(self, stream: Stream, entries: list[msgspec.Raw]) -> None:
        """Take log-probabilities of the prompt. The reader gets them in turns, as a step may bring thousands; the
        core waits for one who still lacks many of the steps before."""
        assert stream.prompt is not None
        num_bytes, is_late = stream.prompt.extend(entries), stream.pending_bytes * 2 > stream.pending_limit
        self._bound(stream)
        if self._left_unsent(stream, num_bytes):
            self._make_ready(stream)
            if is_late and not stream.paused:
                self._pause(stream)

    def ended(self, stream: Stream) -> None:
        """Nothing more will come: the reader gets the last message, after what it has not got. A whole answer waits
        for its turn, as many may end in a step."""
        stream.flows = False
        if stream.sink is None:
            self._heap.release(stream)
        elif not stream.deltas or not self._advance(stream, CHUNK_TOKENS)[1]:
            self._behind(stream)
            self._make_ready(stream)

    def skip(self, stream: Stream) -> None:
        """Send no more of what has not been sent."""
        stream.skips = True
        if stream.ended_at_s is not None:
            self._make_ready(stream)

    def hurry(self, error: Callable[[Stream], CierzoError]) -> int:
        """Wait for readers no longer: each stream that has ended gives its last message now, or `error` if that is
        long, or its reader has not got all that comes before, or takes nothing. Gives the number of those that had
        ended well, and do not now."""
        num_cut = 0
        for stream in self._streams.with_readers():
            sink = stream.sink
            if sink is not None and stream.ended_at_s is not None:
                if stream.unsent or sink.is_paused or is_long(stream):
                    num_cut += stream.error is None
                    sink.put(failure(stream.stream_id, error(stream)))
                else:
                    sink.put(stream.last(self._new_reader))
                self._streams.detach(stream)
                self.detach(stream, sink)
        self._stuck.clear()
        self._owner.delivered()
        return num_cut

    def drop(self, stream: Stream) -> None:
        """End the connection that is in the middle of the last message of this stream."""
        for sink, sent in [*self._frames.items()]:
            if sent is stream:
                sink.drop()

    def close(self) -> None:
        """Stop all timers."""
        self._slow.close()
        self._stuck.close()
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None

    # --- inside ----------------------------------------------------------------------------------------

    def _accepted(self, stream: Stream, prompt_tokens: int) -> Accepted:
        return Accepted(
            stream=stream.stream_id,
            request_id=stream.name,
            seed=stream.sampling.seed or 0,
            queue_position=self._streams.position(stream),
            deadline_s=round(stream.deadline_at_s - stream.arrived, 6),
            prompt_tokens=prompt_tokens,
        )

    def _log(self, stream: Stream, sample: Sample, delta: TokenDelta) -> None:
        num_bytes = sample.append(delta)
        if len(sample.token_ids) % BOUND_TOKENS < len(delta.token_ids):
            sample.remember()
            self._bound(stream)
        is_running = self._left_unsent(stream, num_bytes) and delta.finish is None
        if is_running and stream.pending_bytes > stream.pending_limit and not stream.paused:
            self._pause(stream)

    def _left_unsent(self, stream: Stream, num_bytes: int) -> bool:
        """Note that so many bytes more of a stream are in its log alone: False if no reader waits for them."""
        if stream.sink is None or not stream.deltas:
            return False
        stream.flows = False
        self._behind(stream)
        stream.pending_bytes += num_bytes
        return True

    def _pause(self, stream: Stream) -> None:
        """Have the core work on something else until the reader has taken what waits."""
        stream.paused = True
        stream.keep_for_reader(self._config.stream_credit_bytes)
        self._core.withdraw(stream)

    def _bound(self, stream: Stream) -> None:
        """Look at what a stream takes; now and then, as that costs as much as a delta. One that can be resumed is
        kept within `max_answer_bytes`: its oldest log-probabilities go."""
        self._heap.measure(stream)
        if stream.name and stream.num_bytes > self._config.max_answer_bytes:
            stream.forget(1 / 4, sent_only=stream.sink is not None)

    def _behind(self, stream: Stream) -> None:
        """Have the reader watched, and remember what it waits for."""
        sink = stream.sink
        assert sink is not None
        if stream not in self._slow:
            self._slow.add(stream)
            self._taken[stream] = sink.num_taken
        if sink.is_paused:
            self._waiting.setdefault(sink, {})[stream] = None

    def _took(self, stream: Stream) -> None:
        """The reader has taken something: its time begins again, if it is watched."""
        if stream in self._slow:
            self._slow.add(stream)

    def _moved(self, watched: Stream | Sink, sink: Sink) -> bool:
        """Whether the peer of a full connection has taken bytes since the last look, if slower than it was sent."""
        before = self._taken.get(watched)
        self._taken[watched] = sink.num_taken
        return sink.is_paused and self._taken[watched] != before

    def _make_ready(self, stream: Stream) -> None:
        if stream.sink is None:
            return
        self._ready[stream] = None
        if self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._take_turn)

    def _take_turn(self) -> None:
        """Serve the readers that are behind, a chunk each, until the turn is over; then the loop has its own."""
        self._turn = None
        tokens_left = TURN_TOKENS
        ready, self._ready = self._ready, {}
        while ready and tokens_left > 0:
            stream = next(iter(ready))
            del ready[stream]
            if (sink := stream.sink) is None:
                continue
            num_tokens, is_done = self._advance(stream, min(CHUNK_TOKENS, tokens_left))
            tokens_left -= 1 + num_tokens * _weight(stream)
            if not is_done and _may_send(stream) and not sink.is_paused:
                self._ready[stream] = None
        self._ready = {**ready, **self._ready}
        if self._ready and self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._take_turn)

    def _advance(self, stream: Stream, most: int) -> tuple[int, bool]:
        """Send up to `most` tokens: how many it were, and whether the reader has all there is, the end included."""
        sink, num_tokens = stream.sink, 0
        assert sink is not None
        if sink.is_paused:
            self._waiting.setdefault(sink, {})[stream] = None
            return 0, False
        if stream.has_logprobs:
            most = min(most, CHUNK_LOGPROBS)
        elif stream.apart:
            most = min(most, CHUNK_PARTS)
        if stream.has_scores and stream.unsent and _may_send(stream):
            num_tokens = self._send_scores(stream, most)
        for sample in stream.samples:
            while stream.unsent and sample.unsent and num_tokens < most and _may_send(stream):
                num_tokens += self._send(stream, sample, most - num_tokens)
        is_done = not stream.unsent
        if is_done and stream.ended_at_s is not None:
            if is_long(stream):
                return self._build(stream, sink)
            num_tokens += 0 if stream.deltas else sum(len(sample.token_ids) for sample in stream.samples)
            sink.put(stream.last(self._new_reader))
            self._last_is_put(stream)
        else:
            self._progress(stream, is_done)
        return num_tokens, is_done

    def _build(self, stream: Stream, sink: Sink) -> tuple[int, bool]:
        """Build more of a long last message, and put it when it is complete; as `_advance`."""
        if stream not in self._building:
            self._building[stream] = build(stream, self._new_reader)
        try:
            return next(self._building[stream]), False
        except StopIteration as done:
            del self._building[stream]
            self._stuck.add(sink)
            self._taken[sink] = sink.num_taken
            self._frames[sink] = stream
            self._last_is_put(stream)
            sink.put_frame(self._sending(sink, done.value))
            return 0, True

    def _sending(self, sink: Sink, parts: list[Buffer]) -> Iterator[Buffer]:
        """Give the pieces of a last message as the reader takes them, for as long as it does."""
        for piece in cut(parts):
            if sink in self._stuck:
                self._stuck.add(sink)
            yield piece
        self._stuck.discard(sink)
        self._taken.pop(sink, None)
        self._frame_is_gone(sink)
        self._owner.delivered()

    def _last_is_put(self, stream: Stream) -> None:
        self._streams.detach(stream)
        self._unwatch(stream)
        if stream not in self._frames.values():
            self._heap.release(stream)
        self._owner.delivered()

    def _frame_is_gone(self, sink: Sink) -> None:
        if (stream := self._frames.pop(sink, None)) is not None and stream.sink is None:
            self._heap.release(stream)

    def _drop(self, sink: Sink) -> None:
        """The reader takes no more of a message that is half sent: it can be told nothing."""
        if self._moved(sink, sink):
            self._stuck.add(sink)
        else:
            sink.drop()

    def _send(self, stream: Stream, sample: Sample, most: int) -> int:
        """Put one delta with up to `most` tokens that the reader has not got."""
        taken = sample.read(most)
        if taken is None:
            return 0
        token_ids, text, logprobs, parts = taken
        delta = Delta(
            stream=stream.stream_id,
            sample=sample.index,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            parts=parts,
        )
        if stream.credit is not None:
            stream.credit -= delta_cost(delta)
        assert stream.sink is not None
        stream.sink.put(delta)
        self._took(stream)
        return len(token_ids)

    def _send_scores(self, stream: Stream, most: int) -> int:
        """Put a delta with up to `most` log-probabilities of the prompt that the reader has not got."""
        log, sink = stream.prompt, stream.sink
        assert log is not None
        assert sink is not None
        count, packed = log.send(most)
        sink.put(Delta(stream=stream.stream_id, prompt_logprobs=cast(list[TokenLogprobs], packed)))
        if stream.credit is not None:
            stream.credit -= text_cost(0, "") + count * log.cost
        self._took(stream)
        return count

    def _progress(self, stream: Stream, is_done: bool) -> None:
        """The reader was sent what it may have: if it is all there is, or half, its stream goes on."""
        stream.pending_bytes = stream.unsent_bytes
        goes_on = stream.paused and stream.ended_at_s is None and stream.pending_bytes * 2 < stream.pending_limit
        if goes_on:
            stream.paused = False
        if is_done:
            stream.flows = stream.deltas and not stream.skips and _may_send(stream)
            self._unwatch(stream)
        if goes_on:
            self._core.submit(stream)  # the last thing here: it may end the stream

    def _unwatch(self, stream: Stream) -> None:
        self._slow.discard(stream)
        self._taken.pop(stream, None)

    def _slow_reader(self, stream: Stream) -> None:
        config, sink = self._config, stream.sink
        assert sink is not None
        if _may_send(stream) and self._moved(stream, sink):
            self._slow.add(stream)
            return
        what = f"{stream.pending_bytes} bytes wait"
        bound = f", more than max_pending_bytes, {config.max_pending_bytes}" if stream.paused else ""
        self._owner.give_up(
            stream,
            SlowReader(
                f"output was left unread for slow_reader_s, {config.slow_reader_s:g} s: {what}{bound}",
                field="slow_reader_s",
                limit=config.slow_reader_s,
                value=stream.pending_bytes,
            ),
        )


def _weight(stream: Stream) -> int:
    """Work that a token of a stream is, in tokens of text alone."""
    return LOGPROBS_TOKENS if stream.has_logprobs else PARTS_TOKENS if stream.apart else 1


def _may_send(stream: Stream) -> bool:
    return stream.credit is None or stream.credit > 0
