"""The front end's dealings with its core: who is sent to it, when it dies, and what becomes of the streams then."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

from cierzo.engine.errors import CierzoError, CoreFailed, Overloaded
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.registry import Registry
from cierzo.engine.frontend.sample import Sample
from cierzo.engine.frontend.stream import Sink, Stream
from cierzo.engine.messages import Abort, CoreCommand, CoreStats, FinishReason, StepOutput, TokenDelta

MAX_DEATHS = 2  # of cores, in a row, that had a request of which no other sign was seen


class Core(Protocol):
    """The part of a core link that the front end uses."""

    def send(self, command: CoreCommand) -> None:
        """Queue a command; only called while the core is up."""
        ...


class Owner(Protocol):
    """Who is told what the core says of a stream: the `Frontend`."""

    def deliver(self, stream: Stream, delta: TokenDelta) -> None:
        """Take new tokens, or the end, of a sample."""
        ...

    def end(self, stream: Stream, reason: FinishReason, message: str = "") -> None:
        """End a stream that the core will not end."""
        ...

    def finish(self, stream: Stream) -> None:
        """All samples of a stream have ended."""
        ...

    def fail_all(self, error: CierzoError) -> None:
        """There will be no core any more."""
        ...


class CoreSide:
    """Streams in the core's hands. `state` is loading, ready, stalled or failed."""

    def __init__(
        self, config: FrontendConfig, core: Core, streams: Registry, owner: Owner, clock: Callable[[], float]
    ) -> None:
        self.state = "loading"
        self.stats = CoreStats()
        self.num_restarts = 0
        self._config = config
        self._core = core
        self._streams = streams
        self._owner = owner
        self._clock = clock
        self._next_run_id = 0
        self._runs: dict[int, Stream] = {}  # what the core has, by its own ids
        self._to_resume: deque[Stream] = deque()
        self._on_trial: Stream | None = None

    # --- from the front end ----------------------------------------------------------------------------

    def require(self) -> None:
        """Raise the CierzoError that says why no request can be taken now."""
        if self.state == "failed":
            raise CoreFailed("the core process cannot be kept alive", retry_after_s=self._config.retry_after_s)
        if self.state != "ready":
            raise Overloaded("the core is loading the model", retry_after_s=self._config.retry_after_s)

    def submit(self, stream: Stream) -> None:
        """Give the core what is left of a stream, now or once there is a core that may have it."""
        if self._on_trial is not None:
            self._to_resume.append(stream)
        elif self.state == "ready":
            self._send(stream)

    def abort(self, stream: Stream, reason: FinishReason, sample: Sample | None = None) -> bool:
        """Have the core end a stream, or one sample of it: whether it will say so. Else the caller ends it."""
        if stream.sent_s is None or self.state != "ready":
            return False
        self._core.send(
            Abort(request_id=stream.run_id, sample=None if sample is None else sample.index, reason=reason)
        )
        return True

    def withdraw(self, stream: Stream) -> None:
        """Have the core forget a stream, which `submit` makes go on later with the same tokens."""
        if stream.sent_s is not None and self.state == "ready":
            self._core.send(Abort(request_id=stream.run_id))
        self._runs.pop(stream.run_id, None)
        stream.sent_s = None
        if stream is self._on_trial:
            self._resume_next()

    def forget(self, stream: Stream) -> None:
        """A stream has ended: what the core still says of it is dropped."""
        self._runs.pop(stream.run_id, None)

    # --- from the core ---------------------------------------------------------------------------------

    def ready(self) -> None:
        """A core is up; if it replaces one that died, it gets all that the old one had not finished."""
        self.state = "ready"
        self._to_resume.extend(s for s in self._streams if s.submit is not None and not s.paused)
        self._resume_next()

    def lost(self) -> None:
        """The core is gone and a new one is on its way: end what needs no core to end."""
        self.state = "loading"
        self.num_restarts += 1
        suspect, self._on_trial = self._on_trial, None
        self._to_resume.clear()
        self._runs.clear()
        now, loop = self._clock(), asyncio.get_running_loop()
        for stream in self._streams:
            stream.deaths += stream.sent_s is not None
            stream.sent_s = None
            self._settle(stream, now)
            if stream in self._streams:
                loop.call_later(stream.deadline_at_s - now, self._deadline_without_core, stream)
        if suspect is not None and suspect.deaths >= MAX_DEATHS and suspect in self._streams:
            self._owner.end(suspect, "failed", "the core process died each time that it began this request")

    def failed(self, error: CierzoError) -> None:
        """There will be no core any more: every open stream fails with `error`."""
        self.state = "failed"
        self._owner.fail_all(error)

    def step(self, step: StepOutput) -> None:
        """Deliver one step: every delta to its stream, then one write per connection."""
        if step.stats is not None:
            self.stats = step.stats
        touched: dict[Sink, None] = {}
        for delta in step.deltas:
            stream = self._runs.get(delta.request_id)
            if stream is not None:
                if stream.sink is not None:
                    touched[stream.sink] = None
                if stream is self._on_trial:
                    self._resume_next()
                self._owner.deliver(stream, delta)
        for sink in touched:
            sink.flush()

    # --- inside ----------------------------------------------------------------------------------------

    def _send(self, stream: Stream) -> None:
        """Give the core what is left of a stream, unless it ends before that."""
        now = self._clock()
        self._settle(stream, now)
        if stream in self._streams:
            self._runs.pop(stream.run_id, None)
            stream.run_id = self._next_run_id
            self._next_run_id += 1
            self._runs[stream.run_id] = stream
            stream.sent_s = now - stream.arrived
            for submit in stream.submits(stream.run_id):
                self._core.send(submit)

    def _resume_next(self) -> None:
        """After a death the new core gets the streams one by one, each once the one before has shown life.

        If it dies of a stream again, it dies while that one is on trial: then that one ends, and the others go on.
        """
        self._on_trial = None
        while self._to_resume and self._on_trial is None:
            stream = self._to_resume.popleft()
            if stream in self._streams and not stream.paused:
                self._send(stream)
                self._on_trial = stream if stream.sent_s is not None else None

    def _settle(self, stream: Stream, now: float) -> None:
        """While no core has it: the ends that a core would have reported."""
        if stream.aborted is not None:
            self._owner.end(stream, stream.aborted)
        elif stream.deadline_at_s <= now:
            self._owner.end(stream, "deadline")
        elif stream.submit is not None and stream.end_cut(now):
            self._owner.finish(stream)

    def _deadline_without_core(self, stream: Stream) -> None:
        if stream in self._streams and stream.sent_s is None:
            self._owner.end(stream, "deadline")
