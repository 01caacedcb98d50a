"""A runner for a card that is not here: it does everything but the arithmetic.

Scheduler, cache manager, block tables and batches are the real ones, at full scale. A step takes what the roofline
says of its work on that card, and its tokens are made up. Whoever waits is told by `Clock`: a server waits for real
(`WallClock`), so that it answers as quickly as the card would; a study lets time jump (`VirtualClock`).
"""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

import numpy as np

from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.step_model import FloatArray, StepModel, StepTotals, decode_steps
from cierzo.engine.cost.work import Distinct, StepShape
from cierzo.engine.worker.batch import Batch, Segments
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import made_up_logprobs
from cierzo.scheduler.plan import StepPlan, StepResult, TokenDelta, TokenLogprobs


class Clock(Protocol):
    """Seconds, from anywhere."""

    def __call__(self) -> float:
        """Now."""
        ...

    def wait_until(self, then_s: float) -> None:
        """Return at `then_s`; at once if that has passed."""
        ...


class WallClock:
    """Time as it passes."""

    def __call__(self) -> float:
        """Now."""
        return time.monotonic()

    def wait_until(self, then_s: float) -> None:
        """Sleep."""
        time.sleep(max(0.0, then_s - time.monotonic()))


class VirtualClock:
    """Time that passes only when somebody waits for it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """Now."""
        return self.now_s

    def wait_until(self, then_s: float) -> None:
        """Jump."""
        self.now_s = max(self.now_s, then_s)


class SimulatedRunner:
    """A `Runner`. Of the sampling parameters it honours the number of logprobs, whose values mean nothing."""

    def __init__(self, config: EngineConfig, clock: Clock, distinct: Distinct | None = None) -> None:
        assert config.card is not None
        self.model = StepModel(config, config.card, distinct)
        self.experts = None  # nothing is routed
        self.totals = StepTotals()
        self.token_ids = [0] * config.scheduler.max_running  # that a slot's sequence always gets
        self._num_logprobs: list[int | None] = [None] * config.scheduler.max_running
        self._vocab_size = config.model.vocab_size
        self._clock = clock
        self._busy_until_s = 0.0
        self._launched: deque[tuple[StepResult, float]] = deque()

    def launch(self, plan: StepPlan, batch: Batch) -> None:
        """Begin the step once those before it have ended."""
        for seq in plan.seqs:
            if seq.admission is not None:
                sampling = seq.admission.sampling
                ends = {*seq.admission.eos_token_ids, *sampling.stop_token_ids}
                self.token_ids[seq.slot] = next(token for token in range(len(ends) + 1) if token not in ends)
                self._num_logprobs[seq.slot] = sampling.logprobs
        seconds = float(self.model.add(self.totals, shape_of(batch), float(len(plan.seqs)))[0])
        self._busy_until_s = max(self._clock(), self._busy_until_s) + seconds
        self._launched.append((self._result(plan), self._busy_until_s))

    def collect(self) -> StepResult:
        """Wait for the step launched first of those not collected."""
        result, ready_s = self._launched.popleft()
        self._clock.wait_until(ready_s)
        return result

    def reset(self) -> None:
        """Forget what was launched and not collected; the device is done with it as late."""
        self._launched.clear()

    def describe(self) -> str:
        """What runs, as printed at start."""
        return (
            f"SIMULATION     {self.model.device.describe()}\n               no model is loaded, tokens are made up"
        )

    def _result(self, plan: StepPlan) -> StepResult:
        token_ids = [[self.token_ids[seq.slot]] if seq.samples else [] for seq in plan.seqs]
        logprobs: list[list[TokenLogprobs] | None] | None = None
        if any(self._num_logprobs[seq.slot] is not None for seq in plan.seqs):
            logprobs = [self._made_up(seq.slot) if seq.samples else None for seq in plan.seqs]
        return StepResult(token_ids, logprobs)

    def _made_up(self, slot: int) -> list[TokenLogprobs] | None:
        count = self._num_logprobs[slot]
        return None if count is None else [made_up_logprobs(self.token_ids[slot], count, self._vocab_size)]


def shape_of(batch: Batch) -> StepShape:
    """What a batch asks to be computed."""
    expanded, absorbed = _counts(batch.expanded), _counts(batch.absorbed)
    return StepShape(*expanded, *absorbed, float(len(batch.sample_rows)))


def _counts(segments: Segments) -> tuple[float, float, float]:
    """(rows, pairs of a row and a key it sees, context tokens read)."""
    lengths = np.diff(segments.query_starts).astype(np.float64)
    contexts = segments.context_lengths.astype(np.float64)
    pairs = lengths * contexts - lengths * (lengths - 1) / 2
    return float(lengths.sum()), float(pairs.sum()), float(contexts[lengths > 0].sum())


class VirtualCore(EngineCore):
    """An engine core in virtual time. Steps that are sure to be alike can be taken together, which changes nothing
    but what it costs: an hour of load passes in seconds."""

    def __init__(self, config: EngineConfig, clock: VirtualClock, distinct: Distinct | None = None) -> None:
        self.virtual_clock = clock
        self.simulated = SimulatedRunner(config, clock, distinct)
        super().__init__(config, self.simulated, clock)

    def steady_s(self, at_most: int) -> FloatArray:
        """Seconds of each coming step that is sure to be alike, up to `at_most` of them. Fewer than two: the next
        step is for `step_plain`."""
        steady = self._scheduler.steady()
        steps = min(steady.steps, at_most)
        shape, rows = decode_steps(steady.sequences, steady.context_tokens, steps)
        total = self.simulated.model.time(shape, rows).total_s
        return np.atleast_1d(total)

    def advance(self, steps: int) -> list[TokenDelta]:
        """Take the first `steps` of those that `steady_s` told, and let their time pass."""
        steady, simulated = self._scheduler.steady(), self.simulated
        shape, rows = decode_steps(steady.sequences, steady.context_tokens, steps)
        seconds = simulated.model.add(simulated.totals, shape, rows)
        for slot, block_ids in self._scheduler.advance(steps, simulated.token_ids):
            self._builder.extend_table(slot, block_ids)
        self.virtual_clock.wait_until(self.virtual_clock() + float(seconds.sum()))
        return self.take_deltas()
