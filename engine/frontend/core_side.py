"""The front end's dealings with its core: who is sent to it, what it owes them, and what follows its death.

Nothing here waits for the core. Deadlines are kept by timers of the front end's own, and so is the time that the
core has to answer an abort: a core that hangs, in one long step or for good, delays no end of a stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from cierzo.engine.errors import CierzoError, CoreFailed, CoreStalled, Overloaded
from cierzo.engine.frontend.admission import Admission
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.observe.tallies import Pace
from cierzo.engine.frontend.recovery import Recovery
from cierzo.engine.frontend.registry import Registry
from cierzo.engine.frontend.sample import NEVER_S, Sample
from cierzo.engine.frontend.stream import Stream
from cierzo.engine.messages import Abort, CoreCommand, CoreStats, FinishReason, StepOutput, TokenDelta

log = logging.getLogger(__name__)

# Seconds that the core has to answer an abort, by its reason; then the front end ends the stream itself. After a
# stop string the client has its text: that it also gets the core's account of it is worth a longer wait.
PATIENCE_S = {"deadline": 0.010, "stop": 1.0}
USUAL_PATIENCE_S = 0.080
SHORTEST_TIMER_S = 0.001


class Core(Protocol):
    """The part of a core link that the front end uses."""

    def send(self, command: CoreCommand) -> None:
        """Queue a command; only called while the core is up."""
        ...

    def forgive(self) -> None:
        """The death that was just told is part of a search: it counts for the hour's limit alone."""
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

    def settled(self, stream: Stream) -> None:
        """Learn that no core owes the cost of a stream that has ended."""
        ...


@dataclass(slots=True)
class _Withdrawn:
    """A run that the core was told to drop, until all its samples have been accounted for."""

    stream: Stream
    samples: int


class CoreSide:
    """Streams in the core's hands. `state` is loading, ready, stalled or failed."""

    def __init__(
        self, config: FrontendConfig, core: Core, streams: Registry, owner: Owner, clock: Callable[[], float]
    ) -> None:
        self.state = "loading"
        self.has_been_ready = False
        self.stats = CoreStats()
        self.past = CoreStats()  # counters of cores that died
        self.num_restarts = 0
        self.pace = Pace()
        self._config = config
        self._core = core
        self._streams = streams
        self._owner = owner
        self._clock = clock
        self._next_run_id = 0
        self._runs: dict[int, Stream] = {}  # what the core has, by its own ids
        self._fresh: set[int] = set()  # of these, those that have not shown life to `_recovery`
        self._withdrawn: dict[int, _Withdrawn] = {}
        self._timers: dict[Stream, asyncio.TimerHandle] = {}  # of deadlines
        self._recovery = Recovery[Stream]()
        self._admission = Admission()

    # --- from the front end ----------------------------------------------------------------------------

    def require(self) -> None:
        """Raise the CierzoError that says why no request can be taken now."""
        retry_after_s = self._config.retry_after_s
        if self.state == "failed":
            raise CoreFailed("the core process cannot be kept alive", retry_after_s=retry_after_s)
        if self.state == "stalled":
            raise CoreStalled("the core process shows no sign of life", retry_after_s=retry_after_s)
        if self.state != "ready":
            raise Overloaded("the core is loading the model", retry_after_s=retry_after_s)

    def require_in_time(self, stream: Stream, num_tokens: int, priority: int) -> None:
        """Raise DeadlineUnreachable if the first token of a new request is estimated to come too late."""
        now = self._clock()
        tenant = stream.tenant
        self._admission.require(num_tokens, priority, stream.deadline_at_s - now, now, tenant.name, tenant.weight)

    def opened(self, stream: Stream) -> None:
        """A stream was opened, or its deadline became known: it counts, whatever the stream waits for."""
        if (timer := self._timers.pop(stream, None)) is not None:
            timer.cancel()
        self._set_timer(stream, stream.deadline_at_s - self._clock())

    def submit(self, stream: Stream) -> None:
        """Give the core what is left of a stream, now or once there is a core that may have it."""
        stream.paused = False
        if self.state == "ready" and self._recovery.may_go(stream):
            self._send(stream)

    def abort(self, stream: Stream, reason: FinishReason, sample: Sample | None = None) -> bool:
        """Have the core end a stream, or one sample of it: whether it will end without the caller. Else the caller
        ends it."""
        if stream.sent_s is None or self.state not in ("ready", "stalled"):
            return False
        run_id = stream.run_id
        self._core.send(Abort(request_id=run_id, sample=None if sample is None else sample.index, reason=reason))
        patience_s = PATIENCE_S.get(reason, USUAL_PATIENCE_S)
        loop = asyncio.get_running_loop()
        loop.call_later(patience_s, self._unanswered, stream, run_id, reason, sample is None)
        return True

    def withdraw(self, stream: Stream) -> None:
        """Have the core forget a stream, until it is submitted again: it then goes on with the same tokens."""
        stream.paused = True
        if stream.sent_s is not None:
            if self.state in ("ready", "stalled"):
                self._core.send(Abort(request_id=stream.run_id))
                self._owe(stream, stream.running)
            self._end_run(stream)
        for sample in stream.samples:
            sample.last_s = NEVER_S  # a pause of its reader is no gap between tokens
        self._recovery.ended(stream)
        self._send_due()

    def forget(self, stream: Stream) -> None:
        """A stream has ended: what the core still says of it is dropped."""
        if (timer := self._timers.pop(stream, None)) is not None:
            timer.cancel()
        self._end_run(stream)
        self._recovery.ended(stream)
        self._send_due()

    # --- from the core ---------------------------------------------------------------------------------

    def ready(self) -> int:
        """A core is up; if it replaces one that died, it gets all that the old one had not finished: how many."""
        self.state = "ready"
        self.has_been_ready = True
        unsent = self._unsent()
        self._send_all(self._recovery.restart(unsent))
        self._send_due()
        return len(unsent)

    def stalled(self, is_stalled: bool) -> None:
        """The core has stopped showing signs of life, or shows them again."""
        if is_stalled and self.state == "ready":
            self.state = "stalled"
        elif not is_stalled and self.state == "stalled":
            self.state = "ready"
            self._send_all([stream for stream in self._unsent() if self._recovery.may_go(stream)])
            self._send_due()

    def lost(self, committed: bool) -> None:
        """The core is gone and a new one is on its way: end what needs no core to end.

        committed: it had made a step, so whatever killed it did not do so at once.
        """
        self.state = "loading"
        self.num_restarts += 1
        self.past, self.stats = added(self.past, self.stats), CoreStats()
        self._runs.clear()
        self._fresh.clear()
        self.settle()
        self._admission = Admission()
        found = self._recovery.died()
        if found is not None or self._recovery.searching:
            self._core.forgive()  # searches end
        now = self._clock()
        for stream in self._streams:
            stream.sent_s = None
            self._settle(stream, now)
        if found is not None and found in self._streams:
            log.error("request %d has killed its core each time: it ends", found.request_id)
            self._owner.end(found, "failed", "the core process died each time that it began this request")
        self._report(committed)

    def settle(self) -> None:
        """No core will tell more of what runs have cost."""
        withdrawn, self._withdrawn = self._withdrawn, {}
        for run in withdrawn.values():
            self._paid(run.stream)

    def failed(self, error: CierzoError) -> None:
        """There will be no core any more: every open stream fails with `error`."""
        self.state = "failed"
        self._owner.fail_all(error)

    def step(self, step: StepOutput) -> None:
        """Deliver a step: every delta to its stream."""
        now = self._clock()
        self.pace.step(now)
        if step.stats is not None:
            self.stats = step.stats
            self._admission.published(step.stats, now)
        alive = False
        for delta in step.deltas:
            stream = self._runs.get(delta.request_id)
            if stream is None:
                self._account(delta)
                continue
            if delta.request_id in self._fresh:
                alive |= self._shows_life(stream, delta, now)
            self._owner.deliver(stream, delta)
        if alive:
            self._send_due()

    # --- inside ----------------------------------------------------------------------------------------

    def _unsent(self) -> list[Stream]:
        """Streams that want a core and are not with one, in order of arrival."""
        streams = (stream for stream in self._streams if stream.submit is not None and stream.sent_s is None)
        return [stream for stream in streams if not stream.paused]

    def _send_due(self) -> None:
        """Send the suspects whose turn it is."""
        while self.state == "ready" and (due := self._recovery.due()):
            log.info("the core gets %d suspects: requests %s", len(due), [stream.request_id for stream in due])
            self._send_all(due)

    def _send_all(self, streams: Iterable[Stream]) -> None:
        for stream in streams:
            if stream in self._streams:
                self._send(stream)

    def _send(self, stream: Stream) -> None:
        """Give the core what is left of a stream, unless it ends before that."""
        now = self._clock()
        self._settle(stream, now)
        if stream not in self._streams:
            return
        self._end_run(stream)
        stream.run_id = self._next_run_id
        self._next_run_id += 1
        self._runs[stream.run_id] = stream
        self._fresh.add(stream.run_id)
        stream.sent_s = now - stream.arrived
        self._recovery.sent(stream, stream.running)
        submits = stream.submits(stream.run_id)
        num_tokens = stream.num_prompt_tokens + sum(len(submit.output_token_ids) for submit in submits)
        tenant = stream.tenant
        self._admission.sent(stream.run_id, num_tokens, submits[0].priority, now, tenant.name, tenant.weight)
        for submit in submits:
            self._core.send(submit)

    def _end_run(self, stream: Stream) -> None:
        """Let go of a stream's present run, if it has one."""
        if self._runs.pop(stream.run_id, None) is not None:
            self._fresh.discard(stream.run_id)
            self._admission.left(stream.run_id, self._clock())
        stream.run_id, stream.sent_s = -1, None

    def _settle(self, stream: Stream, now: float) -> None:
        """While no core has it: the ends that a core would have reported."""
        if stream.aborted is not None:
            self._owner.end(stream, stream.aborted)
        elif stream.deadline_at_s <= now:
            self._owner.end(stream, "deadline")
        elif stream.submit is not None and stream.end_cut(now):
            self._owner.finish(stream)

    def _shows_life(self, stream: Stream, delta: TokenDelta, now: float) -> bool:
        """First news of a run: whether it counts as alive from now on."""
        self._admission.left(delta.request_id, now, started=True)
        alive = self._recovery.made(stream, len(delta.token_ids), ended=delta.finish is not None)
        if alive:
            self._fresh.discard(delta.request_id)
        return alive

    def _account(self, delta: TokenDelta) -> None:
        """Late news of a withdrawn run: only what it cost matters."""
        run = self._withdrawn.get(delta.request_id)
        if run is None or delta.finish is None:
            return
        run.stream.spend(delta.sample, delta.finish)
        run.samples -= 1
        if run.samples == 0:
            del self._withdrawn[delta.request_id]
            self._paid(run.stream)

    def _owe(self, stream: Stream, samples: int) -> None:
        """Expect the core's account of a run that is not wanted any more."""
        self._withdrawn[stream.run_id] = _Withdrawn(stream, samples)
        stream.owed += 1

    def _paid(self, stream: Stream) -> None:
        stream.owed -= 1
        if stream.owed == 0 and stream.ended_at_s is not None:
            self._owner.settled(stream)

    def _set_timer(self, stream: Stream, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._timers[stream] = loop.call_later(max(seconds, SHORTEST_TIMER_S), self._deadline, stream)

    def _deadline(self, stream: Stream) -> None:
        """The deadline has come, unless the two clocks disagree: then soon."""
        left_s = stream.deadline_at_s - self._clock()
        if left_s > 0:
            self._set_timer(stream, left_s)
        elif not self.abort(stream, "deadline"):
            self._owner.end(stream, "deadline")

    def _unanswered(self, stream: Stream, run_id: int, reason: FinishReason, whole: bool) -> None:
        """The core has had the time to answer an abort."""
        if stream.run_id != run_id or stream not in self._streams:
            return
        if whole:
            self._owe(stream, stream.running)
            self._owner.end(stream, reason)
            return
        num_cut = sum(sample.cut and sample.finish is None for sample in stream.samples)
        if stream.end_cut(self._clock()):
            self._owe(stream, num_cut)
            self._owner.finish(stream)

    def _report(self, committed: bool) -> None:
        """Say how far the search is."""
        if self._recovery.searching:
            log.warning(
                "the core died %s a step: %d requests may be the reason, of which %d are tested next: %s",
                "after" if committed else "without",
                self._recovery.num_suspects,
                len(self._recovery.group),
                [stream.request_id for stream in self._recovery.group],
            )


COUNTERS = (
    *("steps", "prompt_tokens", "cached_tokens", "output_tokens", "preemptions", "finished"),
    *("computed_tokens", "recomputed_tokens", "sequence_steps", "kv_block_s"),
)


def added(past: CoreStats, stats: CoreStats) -> CoreStats:
    """The counters of both; no gauges."""
    return CoreStats(**{name: getattr(past, name) + getattr(stats, name) for name in COUNTERS})
