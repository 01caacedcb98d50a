"""Sums of terms in plain torch."""

from __future__ import annotations

from torch import Tensor

from cierzo.kernels.ops.terms import Summands, Terms


def sum_terms(terms: Terms) -> Tensor:
    """See ops/terms.py."""
    if terms.weights is None:
        total = terms.values[0].clone()
        for part in terms.values[1:]:
            total += part
        return total.to(terms.dtype)
    weights, (tokens, slots) = terms.weights, terms.weights.shape
    by_slot = terms.values[: weights.numel()].view(tokens, slots, terms.shape[1]).float()
    total = by_slot[:, 0] * weights[:, :1]
    for slot in range(1, slots):
        total += by_slot[:, slot] * weights[:, slot : slot + 1]
    if terms.shared:
        total += terms.values[weights.numel() :]
    return total.to(terms.dtype)


def rows_of(rows: Summands) -> Tensor:
    """The rows themselves."""
    return rows if isinstance(rows, Tensor) else sum_terms(rows)
