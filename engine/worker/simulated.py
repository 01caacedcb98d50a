"""A runner for a card that is not here: it does everything but the arithmetic.

Scheduler, cache manager, block tables and batches are the real ones, at full scale. A step takes what the roofline
says of its work on that card, and its tokens are made up. A `Clock` says what it is to wait: a server waits for
real (`WallClock`), so that it answers as quickly as the card would; benchmarks let time jump instead.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from typing import Protocol

import msgspec
import numpy as np

from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.step_model import StepModel, StepTotals
from cierzo.engine.cost.work import Distinct, StepShape
from cierzo.engine.worker.batch import Batch, Segments
from cierzo.engine.worker.fake import made_up_logprobs
from cierzo.engine.worker.grammars import POLL_S, Constraint, follow_all
from cierzo.scheduler.plan import GrammarState, Scoring, StepPlan, StepResult, TokenLogprobs, packed_entry


class Clock(Protocol):
    """A clock that counts seconds from any moment, and that can be waited on."""

    def __call__(self) -> float:
        """Seconds by now."""
        ...

    def wait_until(self, then_s: float) -> None:
        """Return at `then_s`; at once if that has passed."""
        ...


class WallClock:
    """The machine's own clock."""

    def __call__(self) -> float:
        """Seconds by now."""
        return time.monotonic()

    def wait_until(self, then_s: float) -> None:
        """Sleep until `then_s`."""
        time.sleep(max(0.0, then_s - time.monotonic()))


class SimulatedRunner:
    """A `Runner` whose device works off one step after another, in the time that the step model gives.

    Of the sampling parameters it honours the numbers of logprobs, whose values mean nothing; and grammars.
    """

    def __init__(self, config: EngineConfig, clock: Clock, distinct: Distinct | None = None) -> None:
        assert config.card is not None
        self.model = StepModel(config, config.card, distinct)
        self.experts = None  # nothing is routed
        self.totals = StepTotals()
        self.token_ids = [0] * config.scheduler.max_running  # by slot: the one that its sequence always gets
        self._num_logprobs: list[int | None] = [None] * config.scheduler.max_running
        self._constraints: dict[int, Constraint] = {}  # by slot, of those with a grammar
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
                self._constraints.pop(seq.slot, None)
                if seq.admission.constraint is not None:
                    self._constraints[seq.slot] = seq.admission.constraint
                    seq.admission.constraint.admit(seq.admission.output_token_ids)
        shape = shape_of(batch)
        if (work := plan.work) is not None:
            shape = replace(shape, embeddings=work.embeddings, embedding_pairs=work.embedding_pairs)
        step = self.model.time(shape, float(len(plan.seqs)))
        self.totals.add(step)
        seconds = float(step.total_s)
        self._busy_until_s = max(self._clock(), self._busy_until_s) + seconds
        self._launched.append((self._result(plan), self._busy_until_s))

    def collect(self) -> StepResult:
        """Wait for the step launched first of those not collected."""
        result, ready_s = self._launched.popleft()
        self._clock.wait_until(ready_s)
        return result

    def reset(self) -> None:
        """Forget what was launched and not collected; the device works it off all the same."""
        self._launched.clear()

    def describe(self) -> str:
        """The device, as printed at start."""
        return (
            f"SIMULATION     {self.model.device.describe()}\n               no model is loaded, tokens are made up"
        )

    def _result(self, plan: StepPlan) -> StepResult:
        token_ids = [[self.token_ids[seq.slot]] if seq.samples else [] for seq in plan.seqs]
        failures, grammars = dict[int, str](), dict[int, GrammarState]()
        if self._constraints:
            for index, seq in enumerate(plan.seqs):
                constraint = self._constraints.get(seq.slot)
                if seq.samples and constraint is not None:
                    token_ids[index] = [first_permitted(constraint)]
                    grammars[index] = constraint.state
                    if constraint.error:
                        failures[index] = constraint.error
        logprobs: list[list[TokenLogprobs] | None] | None = None
        if any(self._num_logprobs[seq.slot] is not None for seq in plan.seqs):
            logprobs = [self._made_up(seq.slot) if seq.samples else None for seq in plan.seqs]
        scored = {index: self._score(seq.scoring) for index, seq in enumerate(plan.seqs) if seq.scoring is not None}
        return StepResult(token_ids, logprobs, failures, scored, grammars)

    def _score(self, scoring: Scoring) -> list[msgspec.Raw]:
        made_up = (made_up_logprobs(token, scoring.count, self._vocab_size) for token in scoring.token_ids)
        return [packed_entry(entry) for entry in made_up]

    def _made_up(self, slot: int) -> list[TokenLogprobs] | None:
        count = self._num_logprobs[slot]
        return None if count is None else [made_up_logprobs(self.token_ids[slot], count, self._vocab_size)]


def first_permitted(constraint: Constraint) -> int:
    """The first token that a grammar permits, which it is told. 0 where it permits none."""
    while not constraint.settle():
        constraint.makers.wait(POLL_S)
    if constraint.error or constraint.state == "ended":
        return 0
    token_id = int(np.unpackbits(constraint.mask.view(np.uint8), bitorder="little").argmax())
    follow_all([(constraint, token_id)])
    return token_id


def shape_of(batch: Batch) -> StepShape:
    """The shape of a batch's step: what its rows ask to be computed."""
    expanded, absorbed = _counts(batch.expanded), _counts(batch.absorbed)
    return StepShape(*expanded, *absorbed, float(len(batch.sample_rows)))


def _counts(segments: Segments) -> tuple[float, float, float]:
    """(rows, pairs of a row and a key it sees, context tokens read)."""
    lengths = np.diff(segments.query_starts).astype(np.float64)
    contexts = segments.context_lengths.astype(np.float64)
    pairs = lengths * contexts - lengths * (lengths - 1) / 2
    return float(lengths.sum()), float(pairs.sum()), float(contexts[lengths > 0].sum())
