"""What one step hands to a model: rows of tokens, and where their contexts lie."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cierzo.kernels.ops.attention import PagedQueries


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """T rows: first the prompt tokens (expanded form), then the generated ones (absorbed form).

    token_ids, positions, cache_slots: int64 [T]; cache_slots[i] = block * S + offset is where row i's cache entry
    is written before anything reads it. num_expanded: rows of the first kind. expanded, absorbed: the segments of
    each kind, their rows counted from its first one. expert_ids: contiguous int64 [MoE layers,T,K], written by the
    model: the experts that each of these layers chose for each row; None: nobody asks.
    """

    token_ids: Tensor
    positions: Tensor
    cache_slots: Tensor
    num_expanded: int
    expanded: PagedQueries
    absorbed: PagedQueries
    expert_ids: Tensor | None = None

    @property
    def longest_context(self) -> int:
        """Tokens in the longest context of the step; 0 without any."""
        return max((*self.expanded.contexts, *self.absorbed.contexts), default=0)
