"""Counts which experts the tokens of real steps choose. numpy alone: the runner brings the ids from the device.

Letters: L MoE layers, T tokens in the step, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cierzo.engine.expert_statistics import ExpertStatistics, Phase, StepBucket, bucket_index
from cierzo.engine.model.config import ModelConfig

PHASES: tuple[Phase, Phase] = ("decode", "prefill")
BUCKETS = 32  # steps of up to 2^31 tokens
# Between two steps numpy's code and the counts are out of the CPU's caches, and cost ten times what they cost for
# the second of several steps: so several are counted together, few enough that nobody sees the pause.
MOST_WAITING_STEPS = 64
MOST_WAITING_TOKENS = 1024


class ExpertCounter:
    """Sums over all steps since its making, in a few hundred kilobytes, however many steps there are."""

    def __init__(self, layers: list[int], num_experts: int, top_k: int) -> None:
        """layers: which of the model's layers are MoE."""
        self.layers = layers
        self.num_experts = num_experts
        self.top_k = top_k
        self._expert_tokens = np.zeros((len(layers), num_experts), np.int64)
        self._steps = np.zeros((len(PHASES), BUCKETS), np.int64)
        self._tokens = np.zeros((len(PHASES), BUCKETS), np.int64)
        self._distinct = np.zeros((len(PHASES), BUCKETS, len(layers)), np.int64)
        self._waiting: list[tuple[NDArray[np.int64], Phase]] = []
        self._waiting_tokens = 0
        # ids of layer l are moved to l E .. l E + E - 1, so that one pass counts all layers
        self._first = (np.arange(len(layers)) * num_experts)[:, None, None]

    @classmethod
    def of(cls, model: ModelConfig) -> ExpertCounter:
        """Make the counter of a model with experts."""
        assert model.moe is not None, f"{model.architecture} has no experts"
        layers = list(range(model.moe.first_dense_layers, model.num_layers))
        return cls(layers, model.moe.num_experts, model.moe.experts_per_token)

    def add(self, expert_ids: NDArray[np.int64], phase: Phase) -> None:
        """A step's int64 [L,T,K], T > 0, each in [0, E); it is kept for a while, and must not change."""
        self._waiting.append((expert_ids, phase))
        self._waiting_tokens += expert_ids.shape[1]
        if len(self._waiting) >= MOST_WAITING_STEPS or self._waiting_tokens >= MOST_WAITING_TOKENS:
            self._count_waiting()

    def _count_waiting(self) -> None:
        for expert_ids, phase in self._waiting:
            self._count(expert_ids, phase)
        self._waiting.clear()
        self._waiting_tokens = 0

    def _count(self, expert_ids: NDArray[np.int64], phase: Phase) -> None:
        tokens = expert_ids.shape[1]
        counts = np.bincount((expert_ids + self._first).ravel(), minlength=self._expert_tokens.size)
        counts = counts.reshape(self._expert_tokens.shape)
        at = PHASES.index(phase), bucket_index(tokens)
        self._expert_tokens += counts
        self._steps[at] += 1
        self._tokens[at] += tokens
        self._distinct[at] += np.count_nonzero(counts, axis=1)

    def statistics(self) -> ExpertStatistics:
        """All that was counted."""
        self._count_waiting()
        return ExpertStatistics(
            layers=self.layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            expert_tokens=self._expert_tokens.tolist(),
            decode=self._buckets(0),
            prefill=self._buckets(1),
        )

    def _buckets(self, phase: int) -> list[StepBucket]:
        used: list[Any] = np.flatnonzero(self._steps[phase]).tolist()
        return [
            StepBucket(
                most_tokens=1 << index,
                steps=int(self._steps[phase, index]),
                tokens=int(self._tokens[phase, index]),
                distinct=self._distinct[phase, index].tolist(),
            )
            for index in used
        ]
