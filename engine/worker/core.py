"""`EngineCore`: scheduler, cache manager, batch builder and runner, joined into one step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec

from cierzo.cache.manager import KVCacheManager
from cierzo.engine.config import EngineConfig
from cierzo.engine.environment import spin_briefly
from cierzo.engine.messages import Abort, CoreStats, Finish, Pixels, Submit, TokenDelta, Vocabulary
from cierzo.engine.worker.batch import Batch, BatchBuilder
from cierzo.engine.worker.experts import ExpertCounter
from cierzo.engine.worker.fake import FakeRunner
from cierzo.engine.worker.grammars import POLL_S, Makers
from cierzo.engine.worker.images import PixelStore
from cierzo.engine.worker.step_cost import StepTimes
from cierzo.kernels.fault import DeviceFault
from cierzo.scheduler.images import Image
from cierzo.scheduler.plan import StepPlan, StepResult
from cierzo.scheduler.request import NewRequest, QueueFull, Request
from cierzo.scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)


class Runner(Protocol):
    """Computes steps: `launch` queues one, `collect` waits for its result.

    One step more may be launched before a step's result is collected. Its PENDING tokens are those that the step
    before chooses. After `launch` or `collect` has raised an Exception, nothing of the step is remembered: the same
    sequences may be launched again, all of them or some.
    """

    @property
    def experts(self) -> ExpertCounter | None:
        """The counter of the experts that its steps choose; None where they are not counted."""

    def launch(self, plan: StepPlan, batch: Batch) -> None:
        """Start the step. `batch` may be overwritten once this has returned."""
        ...

    def collect(self) -> StepResult:
        """The result of the step launched first of those not collected."""
        ...

    def reset(self) -> None:
        """Forget what was launched and not collected, once the device is done with it."""
        ...

    def describe(self) -> str:
        """Describe what runs, as printed at start."""
        ...


class EngineCore:
    """The engine without sockets and text: requests in, token deltas out, one step at a time, one thread.

    Every sequence that `submit` takes ends in exactly one delta that carries a `Finish`.
    """

    def __init__(
        self, config: EngineConfig, runner: Runner | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Loads the model unless a `runner` is given. Raises CheckpointError, ConfigError."""
        limits = config.scheduler
        self._config = config
        self._clock = clock
        self._times = StepTimes(config)
        self._forget()
        self._builder = BatchBuilder(
            max_tokens=limits.budget_tokens,
            max_running=limits.max_running,
            max_blocks=self._cache.blocks_for(limits.max_model_len),
            block_tokens=config.cache.block_tokens,
        )
        self._runner = make_runner(config) if runner is None else runner
        self._makers = Makers()
        self._pixels = PixelStore()
        self.observe: Callable[[StepPlan], None] = _ignore  # called with each step's plan before it is launched
        self.released: Callable[[int], None] = _ignore  # called with each request whose grammar is made

    def requests(self) -> Iterator[Request]:
        """All live sequences, to be read."""
        return self._scheduler.requests()

    @property
    def num_finished(self) -> int:
        """Sequences that have ended so far."""
        return self._scheduler.num_finished

    def reset(self) -> None:
        """Forget every request, without a word, and the prefix cache; the model stays loaded.

        For a caller who was interrupted within a call: scheduler, cache and runner may then disagree.
        """
        self._runner.reset()
        self._makers.forget()
        self._forget()

    def _forget(self) -> None:
        self._cache = KVCacheManager(self._config.cache)
        self._scheduler = self._make_scheduler()
        self._refused: list[TokenDelta] = []
        self._flying: StepPlan | None = None  # launched, and not collected
        self._flying_since_s = self._free_at_s = 0.0  # when it was launched, and when the step before it had ended
        self._predicted_s = 0.0

    def _make_scheduler(self) -> Scheduler:
        return Scheduler(self._config.scheduler, self._cache, self._clock, self._times.cost)

    @property
    def predicted_s(self) -> float:
        """Predicted seconds of the step that is about to run or runs, of two in flight the longer; 0.0: unknown."""
        return self._predicted_s

    def vocabulary(self, vocabulary: Vocabulary) -> None:
        """Take the tokens that grammars are about: before the first request, as it takes half a second."""
        self._makers.use(vocabulary)

    @property
    def has_vocabulary(self) -> bool:
        """Whether it was told the tokens that grammars are about."""
        return self._makers.has_vocabulary

    def pixels(self, piece: Pixels) -> None:
        """Take some of the pixels of a request that comes next."""
        self._pixels.take(piece)

    def submit(self, submit: Submit) -> None:
        """Take a request, one sequence per sample. One with a grammar is held until that is made.

        A sample ends as failed at once if the queue is full, and for what validation should have caught: no seed,
        an empty prompt, one longer than max_model_len, pixels that are missing. Raises DuplicateRequest for one
        that is alive already.
        """
        prompt, output = tuple(submit.prompt_token_ids), tuple(submit.output_token_ids)
        banned = tuple(map(tuple, submit.banned_token_ids))
        sampling, first = submit.sampling, submit.first_sample
        making = self._makers.open(submit) if submit.grammar else None
        images: tuple[Image, ...] = ()
        pixel_error = ""
        try:
            images = self._pixels.images(submit) if submit.images else ()
        except ValueError as error:
            pixel_error = str(error)
        for sample in range(first, first + submit.sampling.n):
            new = NewRequest(
                request_id=submit.request_id,
                sample=sample,
                prompt_token_ids=prompt,
                output_token_ids=output,
                sampling=sampling,
                eos_token_ids=self._config.model.eos_token_ids,
                banned=banned,
                thinking=submit.thinking,
                priority=submit.priority,
                arrival_s=submit.arrival_s,
                deadline_at_s=submit.deadline_at_s,
                tenant=submit.tenant,
                weight=submit.weight,
                salt=submit.cache_salt,
                num_scored=submit.num_scored,
                constraint=None if making is None else making.constraints[sample - first],
                images=images,
            )
            if sampling.prompt_logprobs is not None:  # the first sample's are those of all
                sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
            try:
                if making is not None and not self.has_vocabulary:
                    raise ValueError("grammar: the core knows no vocabulary")
                if pixel_error:
                    raise ValueError(pixel_error)
                self._scheduler.add(new)
            except QueueFull as error:
                self._refused.append(_refusal(new, f"overloaded: {error}"))
            except ValueError as error:
                self._refused.append(_refusal(new, f"invalid: {error}"))
        if making is not None and self.has_vocabulary:
            self._makers.begin(making)

    def abort(self, abort: Abort) -> None:
        """End a request, or one sample of it, with `reason`. Nothing happens if it has ended already."""
        self._scheduler.abort(abort.request_id, abort.sample, abort.reason)

    def step(self) -> list[TokenDelta]:
        """Take a step, as configured: all that happened since the last call, in order.

        If the runner raises, the step is run again in halves, until each sequence that makes it raise is alone:
        that one ends as failed, the others get their tokens. MemoryError, KeyboardInterrupt and DeviceFault, after
        which no step could succeed, pass.
        """
        return self.step_overlapped() if self._config.overlap else self.step_plain()

    def step_plain(self) -> list[TokenDelta]:
        """Schedule, build, run, commit."""
        plan = self._schedule()
        self._run(plan)
        return self.take_deltas()

    def step_overlapped(self) -> list[TokenDelta]:
        """Schedule, build and launch one step while the one before runs; then commit that one.

        The same tokens as `step_plain` gives, each a call later. A step that fails is run again by itself, and so
        is one that was launched behind it.
        """
        plan = self._schedule()
        before, self._flying = self._flying, None
        since_s, launched_s = self._flying_since_s, self._clock()
        error = self._launch(plan) if plan.seqs else None
        if before is not None and (lost := self._collect(before, max(since_s, self._free_at_s))) is not None:
            self._runner.reset()
            self._run(self._scheduler.revise(before))
            error = error or lost
        self._free_at_s, self._flying_since_s = self._clock(), launched_s
        if error is not None:
            self._run(self._scheduler.revise(plan))
        elif plan.seqs:
            self._flying = plan
        return self.take_deltas()

    def await_grammars(self) -> None:
        """Wait until all grammars are made, and let those queue who have them; for a replay."""
        while self._makers.num_at_work:
            self._makers.wait(POLL_S)
            self._release()

    def _release(self) -> None:
        """Let those queue whose grammars were made. Where nobody else has work, wait for one a moment."""
        if self._flying is None and self._scheduler.is_held_up:
            self._makers.wait(POLL_S)
        for making in self._makers.take_made():
            self.released(making.request_id)
            for key, constraint in zip(making.keys, making.constraints, strict=True):
                self._scheduler.release(key, constraint)

    def take_deltas(self) -> list[TokenDelta]:
        """Return what happened since the last call, without a step."""
        deltas = self._scheduler.take_deltas()
        if self._refused:
            deltas += self._refused
            self._refused = []
        return deltas

    def has_work(self) -> bool:
        """Tell whether a sequence runs or waits, a step is in flight, or a refusal is still to be told."""
        return self._scheduler.has_work() or self._flying is not None or bool(self._refused)

    def stats(self) -> CoreStats:
        """Gauges and counters of scheduler and cache."""
        scheduler, cache = self._scheduler.stats(), self._cache.stats()
        return CoreStats(
            running=scheduler.running,
            waiting=scheduler.waiting,
            free_blocks=cache.free,
            cached_blocks=cache.cached,
            total_blocks=cache.total,
            steps=scheduler.steps,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            output_tokens=scheduler.output_tokens,
            preemptions=scheduler.preemptions,
            finished=scheduler.finished,
            computed_tokens=scheduler.computed_tokens,
            recomputed_tokens=scheduler.recomputed_tokens,
            sequence_steps=scheduler.sequence_steps,
            kv_block_s=scheduler.kv_block_s,
            waiting_tokens=scheduler.waiting_tokens,
            prefill_tokens_per_s=self._times.prefill_tokens_per_s,
            step_s=self._times.step_s,
            prompt_row_s=self._times.prompt_row_s,
            prompt_pair_s=self._times.prompt_pair_s,
            prefill_share=self._times.prefill_share,
            max_chunk_tokens=self._config.scheduler.max_chunk_tokens,
            experts=None if self._runner.experts is None else self._runner.experts.statistics(),
        )

    def describe_runner(self) -> str:
        """Describe what computes the steps, as printed at start."""
        return self._runner.describe()

    def check(self) -> None:
        """Assert the invariants of scheduler and cache; for tests and idle moments."""
        self._scheduler.check()

    def _schedule(self) -> StepPlan:
        """The next step's plan, which is told before anything of it is computed."""
        self._release()
        plan = self._scheduler.schedule()
        self._predicted_s = max(plan.predicted_s, self._flying.predicted_s if self._flying is not None else 0.0)
        self.observe(plan)
        return plan

    def _run(self, plan: StepPlan) -> None:
        """Launch, collect and commit a step; where that fails, its halves, down to single sequences."""
        if not plan.seqs:
            return
        since_s = self._clock()
        error = self._launch(plan) or self._collect(plan, since_s)
        if error is None:
            return
        if plan.begun:  # a tower may have failed that no row of this step needs: once more, without what it begins
            self._run(self._scheduler.revise(plan))
            return
        count, reason = len(plan.seqs), f"step {plan.step} failed: {type(error).__name__}: {error}"
        if count == 1:
            log.error("request %s ends: step %d failed", plan.seqs[0].key, plan.step, exc_info=error)
            self._scheduler.commit(plan, StepResult([[]], None, {0: reason}))
            return
        log.warning("%s; running its %d sequences again in halves", reason, count)
        for seqs in (plan.seqs[: count // 2], plan.seqs[count // 2 :]):
            self._run(StepPlan(plan.step, seqs, sum(len(seq.token_ids) for seq in seqs)))

    def _launch(self, plan: StepPlan) -> Exception | None:
        """Begin a step; why it could not begin, if it is the step's own fault."""
        try:
            self._runner.launch(plan, self._builder.build(plan))
        except (MemoryError, DeviceFault):
            raise
        except Exception as error:
            return error
        return None

    def _collect(self, plan: StepPlan, since_s: float) -> Exception | None:
        """Wait for a step that the device has had since `since_s`, and commit its result; why there is none, if it
        is the step's own fault."""
        try:
            result = self._runner.collect()
        except (MemoryError, DeviceFault):
            raise
        except Exception as error:
            return error
        work = None if result.prompt_logprobs else plan.work  # whose price knows nothing of these
        if self._times.took(work, self._clock() - since_s):
            assert self._times.cost is not None
            self._scheduler.reprice(self._times.cost)
        self._scheduler.commit(plan, result)
        return None


def make_runner(config: EngineConfig) -> Runner:
    """The runner that the configuration names; torch is imported for a model alone."""
    if config.runner == "fake":
        return FakeRunner(
            vocab_size=config.model.vocab_size,
            num_blocks=config.cache.num_blocks,
            block_tokens=config.cache.block_tokens,
            max_running=config.scheduler.max_running,
            reads="last",
        )
    if config.runner == "simulated":
        from cierzo.engine.worker.simulated import SimulatedRunner, WallClock

        return SimulatedRunner(config, WallClock())
    spin_briefly()
    from cierzo.engine.worker.runner import load_runner

    return load_runner(config)


def _ignore(_: object) -> None:
    """Observe nothing."""


def _refusal(new: NewRequest, message: str) -> TokenDelta:
    if new.constraint is not None:
        new.constraint.drop()
    finish = Finish(
        reason="failed",
        message=message,
        stop_token_id=None,
        prompt_tokens=len(new.prompt_token_ids),
        output_tokens=len(new.output_token_ids),
        cached_tokens=0,
        preemptions=0,
        queue_s=0.0,
        prefill_s=0.0,
        decode_s=0.0,
    )
    return TokenDelta(new.request_id, new.sample, [], None, finish)
