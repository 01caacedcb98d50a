"""Prices of steps for the scheduler: a device's, fitted to what the step model predicts, and a machine's own,
learned from the steps that it takes; and how long steps took of late."""

from __future__ import annotations

import itertools

import numpy as np

from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.step_model import StepModel, at_least_0
from cierzo.engine.cost.work import StepShape
from cierzo.engine.model.config import MlaConfig, ModelConfig
from cierzo.scheduler.cost import CostLearner, StepCost, StepWork

# Steps that a price is fitted to: sequences that decode, each one's context; rows of a chunk, its start.
DECODES, CONTEXTS = (0, 1, 4, 16, 32, 64, 256), (256, 4096, 65_536)
CHUNKS, STARTS = (0, 16, 128, 512, 1024, 2048, 4096, 8192), (0, 4096, 32_768, 131_072, 1 << 18)
MOST_CONTEXT = 1 << 20  # of all that decode
RECENT = 0.9  # what a step still counts for in an average after the next one


def context_pairs(model: ModelConfig) -> float:
    """Pairs of a row and a key that take as long as a token of context that is multiplied out for a chunk
    (engine/cost/operations.py: mla_prefill)."""
    attention = model.attention
    if not isinstance(attention, MlaConfig):
        return 0.0
    widths = attention.qk_nope_head_dim + attention.v_head_dim
    return attention.kv_lora_rank * widths / (widths + attention.qk_rope_head_dim)


def fitted_cost(config: EngineConfig, model: StepModel) -> StepCost:
    """The price that is nearest to the model's in relative terms, over steps of many shapes."""
    most, most_running = config.scheduler.max_model_len, config.scheduler.max_running
    contexts, chunks = ({min(one, most): None for one in some} for some in (CONTEXTS, CHUNKS))
    shapes = [
        (decodes, decodes * each, rows, start)
        for decodes, each, rows, start in itertools.product(DECODES, contexts, chunks, STARTS)
        if decodes + rows and decodes <= most_running and start + rows <= most
        if decodes * each <= MOST_CONTEXT and (rows or not start) and (decodes or each == min(contexts))
    ]
    decodes, context, rows, start = np.array(shapes, dtype=np.float64).T
    pairs, attended, sequences = rows * (start + (rows + 1) / 2), (start + rows) * (rows > 0), decodes + (rows > 0)
    step = StepShape(rows, pairs, attended, decodes, context, context, sequences)
    seconds = model.time(step, sequences).total_s
    times = context_pairs(config.model)
    features = [np.ones_like(rows), rows > 0, sequences, context, rows, pairs + times * attended]
    base, prompt, sequence, decode_context, row, pair = at_least_0(np.stack(features, 1) / seconds[:, None])
    embedding, embedding_pair = model.image_prices
    text = base, prompt, sequence, decode_context, row, pair, times
    return StepCost(*text, embedding_s=embedding, embedding_pair_s=embedding_pair)


def predicted_cost(config: EngineConfig) -> StepCost | None:
    """The price on a device whose steps are predicted: the one that is simulated."""
    return None if config.card is None else fitted_cost(config, StepModel(config, config.card))


class StepTimes:
    """Times of the steps that were taken: averages of late, and the price that the scheduler cuts chunks by."""

    def __init__(self, config: EngineConfig) -> None:
        self._context_pairs = context_pairs(config.model)
        predicted = predicted_cost(config)
        self._learner = CostLearner(self._context_pairs, config.scheduler.max_step_s) if predicted is None else None
        self.cost = predicted if self._learner is None else self._learner.cost
        self.step_s = 0.0
        self._prompt_tokens = self._prompt_pairs = self._prompt_steps_s = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens a second of the steps that computed some; 0 before the first one."""
        return self._prompt_tokens / self._prompt_steps_s if self._prompt_steps_s else 0.0

    @property
    def prompt_row_s(self) -> float:
        """Predicted seconds of a prompt's token, without its pairs; 0 while there is no price."""
        return 0.0 if self.cost is None else self.cost.row_s + self._context_pairs * self.cost.pair_s

    @property
    def prompt_pair_s(self) -> float:
        """Predicted seconds of a pair of a prompt's token and one before it; 0 while there is no price."""
        return 0.0 if self.cost is None else self.cost.pair_s

    @property
    def prefill_share(self) -> float:
        """Predicted seconds of prompts' work a second of the steps that did some; 0 before the first one."""
        if self.cost is None or not self._prompt_steps_s:
            return 0.0
        work_s = self._prompt_tokens * self.cost.row_s + self._prompt_pairs * self.cost.pair_s
        return work_s / self._prompt_steps_s

    def took(self, work: StepWork | None, seconds: float) -> bool:
        """Take in how long a step took, and its work if it was priced; whether the price has changed."""
        self.step_s = seconds if not self.step_s else RECENT * self.step_s + (1 - RECENT) * seconds
        if work is None:
            return False
        if work.rows:
            self._prompt_tokens = RECENT * self._prompt_tokens + work.rows
            pairs = work.pairs + self._context_pairs * work.context
            self._prompt_pairs = RECENT * self._prompt_pairs + pairs
            self._prompt_steps_s = RECENT * self._prompt_steps_s + seconds
        if self._learner is None or not self._learner.observe(work, seconds):
            return False
        self.cost = self._learner.cost
        return True
