"""The front end's heart: open streams between many connections and one core.

Single-threaded, on the event loop. A step of the core comes in as one message and leaves as one write per
connection. `rpc.Connection` is the only `Sink`, `core_link.CoreLink` the only `Core`; tests bring their own.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cierzo.engine.errors import CierzoError, CoreFailed, Draining, InvalidRequest, Overloaded
from cierzo.engine.frontend import validate
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.detok import Detokenizer
from cierzo.engine.frontend.prompt import PromptEncoder
from cierzo.engine.frontend.stream import Sink, Stream
from cierzo.engine.messages import (
    Abort,
    CoreCommand,
    CoreStats,
    Drained,
    Failure,
    FinishReason,
    Generate,
    ModelInfo,
    StepOutput,
    Submit,
    TokenDelta,
)

log = logging.getLogger(__name__)

MAX_DEATHS = 2  # of cores, in a row, that had a request of which no other sign was seen
SEED_BITS = 53  # a seed that was drawn here survives clients whose numbers are doubles


class Core(Protocol):
    """The part of a core link that the front end uses."""

    def send(self, command: CoreCommand) -> None:
        """Queue a command; only called while the core is up."""
        ...


@dataclass(slots=True)
class Counters:
    """Since the start of the front end."""

    accepted: int = 0
    refused: int = 0
    finished: int = 0
    core_restarts: int = 0


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.counters = Counters()
        self.core_stats = CoreStats()
        self.state = "loading"
        self._config = config
        self._prompts = prompts
        self._core = core
        self._clock = clock
        self._started = clock()
        self._random = random.SystemRandom()
        self._next_request_id = 0
        self._streams: dict[int, Stream] = {}  # by request id; an orphan's sink is None
        self._sinks: dict[Sink, dict[int, Stream]] = {}  # by the client's stream id
        self._open_samples = 0
        self._open_tokens = 0
        self._to_resume: deque[Stream] = deque()
        self._on_trial: Stream | None = None
        self._encoding: set[asyncio.Task[None]] = set()
        self._draining = False
        self._drain_waiters: list[tuple[Sink, int]] = []
        self._drained = asyncio.Event()

    # --- what is going on ------------------------------------------------------------------------------

    @property
    def num_connections(self) -> int:
        """Connections that said Hello."""
        return len(self._sinks)

    @property
    def num_streams(self) -> int:
        """Requests that the core, or this side, still works on."""
        return len(self._streams)

    @property
    def health(self) -> str:
        """loading, ready, draining or failed."""
        return "draining" if self._draining and self.state != "failed" else self.state

    @property
    def uptime_s(self) -> float:
        """Seconds since this object was made."""
        return self._clock() - self._started

    # --- from the connections --------------------------------------------------------------------------

    def connect(self, sink: Sink) -> None:
        """A connection finished its handshake."""
        self._sinks[sink] = {}

    def disconnect(self, sink: Sink) -> None:
        """A connection is gone: nobody waits for its streams."""
        for stream in self._sinks.pop(sink, {}).values():
            stream.sink = None
            self._abort(stream, "cancelled")
        self._drain_waiters = [waiter for waiter in self._drain_waiters if waiter[0] is not sink]

    def generate(self, sink: Sink, message: Generate) -> None:
        """Accept a request, or raise the CierzoError that says why not."""
        try:
            self._admit(sink, message)
        except CierzoError:
            self.counters.refused += 1
            raise
        stream = self._open(sink, message)
        if self._prompts.num_chars(message) > self._config.thread_encode_chars:
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
        if (stream := self._sinks[sink].get(stream_id)) is not None:
            self._abort(stream, "cancelled")

    def fail(self, sink: Sink, stream_id: int, error: CierzoError) -> None:
        """A message about `stream_id` was faulty: the stream, if there is one, ends with this error."""
        if (stream := self._sinks.get(sink, {}).get(stream_id)) is not None:
            self._detach(stream)
            self._abort(stream, "cancelled")
        sink.put(failure(stream_id, error))

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
        tasks = list(self._encoding)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- from the core ---------------------------------------------------------------------------------

    def core_ready(self) -> None:
        """A core is up; if it replaces one that died, it gets all that the old one had not finished."""
        self.state = "ready"
        self._to_resume.extend(stream for stream in self._streams.values() if stream.submit is not None)
        self._resume_next()

    def core_lost(self) -> None:
        """The core is gone and a new one is on its way: end what needs no core to end."""
        self.state = "loading"
        self.counters.core_restarts += 1
        suspect, self._on_trial = self._on_trial, None
        self._to_resume.clear()
        now, loop = self._clock(), asyncio.get_running_loop()
        for stream in list(self._streams.values()):
            stream.deaths += stream.sent_s is not None
            stream.sent_s = None
            self._settle(stream, now)
            remaining_s = stream.remaining_s(now)
            if remaining_s is not None and stream.request_id in self._streams:
                loop.call_later(remaining_s, self._deadline_without_core, stream.request_id)
        if suspect is not None and suspect.deaths >= MAX_DEATHS and suspect.request_id in self._streams:
            self._end_here(suspect, "failed", "the core process died each time that it began this request")

    def core_failed(self, error: CierzoError) -> None:
        """There will be no core any more: every open stream fails with `error`."""
        self.state = "failed"
        for stream in list(self._streams.values()):
            sink, stream_id = stream.sink, stream.stream_id
            self._close(stream)
            if sink is not None:
                sink.put(failure(stream_id, error))
                sink.flush()

    def core_step(self, step: StepOutput) -> None:
        """Deliver one step: every delta to its stream, then one write per connection."""
        if step.stats is not None:
            self.core_stats = step.stats
        touched: dict[Sink, None] = {}
        for delta in step.deltas:
            stream = self._streams.get(delta.request_id)
            if stream is not None:
                if stream.sink is not None:
                    touched[stream.sink] = None
                self._deliver(stream, delta)
        for sink in touched:
            sink.flush()

    # --- inside ----------------------------------------------------------------------------------------

    def _admit(self, sink: Sink, message: Generate) -> None:
        config, streams = self._config, self._sinks[sink]
        if message.stream in streams:
            raise InvalidRequest(
                "this stream is already open", field="stream", limit="unique", value=message.stream
            )
        if self._draining:
            raise Draining("the server is draining", retry_after_s=config.retry_after_s)
        self._require_core()
        validate.fields(message, config, self.model, self._prompts.special_ids)
        self._room("max_streams_per_connection", len(streams) + 1, config.max_streams_per_connection)
        self._room("max_open_samples", self._open_samples + message.sampling.n, config.max_open_samples)

    def _require_core(self) -> None:
        if self.state == "failed":
            raise CoreFailed("the core process cannot be kept alive", retry_after_s=self._config.retry_after_s)
        if self.state != "ready":
            raise Overloaded("the core is loading the model", retry_after_s=self._config.retry_after_s)

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
        stream = Stream(
            request_id=request_id,
            stream_id=message.stream,
            sink=sink,
            deltas=message.deltas,
            num_samples=message.sampling.n,
            num_tokens=0,
            arrived=self._clock(),
        )
        self._streams[request_id] = self._sinks[sink][message.stream] = stream
        self._open_samples += stream.num_samples
        return stream

    async def _encode_aside(self, stream: Stream, message: Generate) -> None:
        """A long prompt is rendered and encoded in a thread; meanwhile the stream can be cancelled."""
        try:
            token_ids = await asyncio.to_thread(self._prompts.encode, message)
            if stream.request_id in self._streams:
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
        self._room("max_open_tokens", self._open_tokens + num_tokens, self._config.max_open_tokens)
        stream.start(submit, [self._detokenizer(submit) for _ in range(stream.num_samples)])
        stream.num_tokens = num_tokens
        self._open_tokens += num_tokens
        self.counters.accepted += 1
        if self._on_trial is not None:
            self._to_resume.append(stream)
        elif self.state == "ready":
            self._send(stream)

    def _send(self, stream: Stream) -> None:
        """Give the core what is left of a stream, unless it ends before that."""
        now = self._clock()
        self._settle(stream, now)
        if stream.request_id in self._streams:
            stream.sent_s = now - stream.arrived
            for submit in stream.submits(now):
                self._core.send(submit)

    def _resume_next(self) -> None:
        """After a death the new core gets the streams one by one, each once the one before has shown life.

        If it dies of a stream again, it dies while that one is on trial: then that one ends, and the others go on.
        """
        self._on_trial = None
        while self._to_resume and self._on_trial is None:
            stream = self._to_resume.popleft()
            if stream.request_id in self._streams:
                self._send(stream)
                self._on_trial = stream if stream.sent_s is not None else None

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

    def _deliver(self, stream: Stream, delta: TokenDelta) -> None:
        if stream is self._on_trial:
            self._resume_next()
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
            self._core.send(Abort(request_id=stream.request_id, sample=sample.index, reason="stop"))

    def _abort(self, stream: Stream, reason: FinishReason) -> None:
        """The core reports the end of what it has; without it, or before it heard of the stream, we end it here."""
        stream.aborted = reason
        if stream.sent_s is not None and self.state == "ready":
            self._core.send(Abort(request_id=stream.request_id, reason=reason))
        else:
            self._end_here(stream, reason)

    def _settle(self, stream: Stream, now: float) -> None:
        """While no core has it: the ends that a core would have reported."""
        remaining_s = stream.remaining_s(now)
        if stream.aborted is not None:
            self._end_here(stream, stream.aborted)
        elif remaining_s is not None and remaining_s <= 0:
            self._end_here(stream, "deadline")
        elif stream.submit is not None and stream.end_cut(now):
            self._finish(stream, flush=True)

    def _deadline_without_core(self, request_id: int) -> None:
        stream = self._streams.get(request_id)
        if stream is not None and stream.sent_s is None:
            self._end_here(stream, "deadline")

    def _end_here(self, stream: Stream, reason: FinishReason, message: str = "") -> None:
        stream.end_all(reason, self._clock(), message)
        self._finish(stream, flush=True)

    def _finish(self, stream: Stream, *, flush: bool = False) -> None:
        """The last sample has ended: say so, and forget the stream."""
        self.counters.finished += 1
        sink = stream.sink
        self._close(stream)
        if sink is not None:
            sink.put(stream.final(self._clock()))
            if flush:
                sink.flush()

    def _refuse(self, stream: Stream) -> None:
        if stream.request_id in self._streams:
            self.counters.refused += 1
            self._close(stream)

    def _refuse_late(self, stream: Stream, error: CierzoError) -> None:
        sink = stream.sink
        self._refuse(stream)
        if sink is not None:
            sink.put(failure(stream.stream_id, error))
            sink.flush()

    def _close(self, stream: Stream) -> None:
        """The single place where a stream leaves the tables."""
        del self._streams[stream.request_id]
        self._open_samples -= stream.num_samples
        self._open_tokens -= stream.num_tokens
        self._detach(stream)
        self._tell_drained()

    def _detach(self, stream: Stream) -> None:
        if stream.sink is not None:
            del self._sinks[stream.sink][stream.stream_id]
            stream.sink = None

    def _tell_drained(self) -> None:
        if not self._draining or self._streams:
            return
        self._drained.set()
        waiters, self._drain_waiters = self._drain_waiters, []
        for sink, stream_id in waiters:
            sink.put(Drained(stream=stream_id))
            sink.flush()
