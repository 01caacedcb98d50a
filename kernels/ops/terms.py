"""Rows whose terms are not added up yet, so that the operation that reads them next does it, in the same launch.

A product over k whose parts have programs of their own, and the experts of a token, leave terms. Between them and
their sum is where several ranks add up what each has. Letters: T tokens, D hidden width, K experts per token,
P parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.registry import bound


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """Terms of rows [T,D], which are added in fp32, in order, and rounded to `dtype` once.

    weights None: values fp32 [P,T,D], parts of a product. weights fp32 [T,K]: values [T*K,D] or [T*K+T,D] of
    `dtype`: a token's experts side by side, each to be multiplied by its weight; then every token's shared expert,
    which is added last. `shape`, `dtype` and `device` are there so that a door can check terms like a tensor.
    """

    values: Tensor
    weights: Tensor | None
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """[T,D]."""
        rows = self.values.shape[1] if self.weights is None else self.weights.shape[0]
        return torch.Size((rows, self.values.shape[-1]))

    @property
    def device(self) -> torch.device:
        """Where the values lie."""
        return self.values.device

    @property
    def parts(self) -> int:
        """P; 0 for terms of experts."""
        return self.values.shape[0] if self.weights is None else 0

    @property
    def slots(self) -> int:
        """K; 0 for parts of a product."""
        return 0 if self.weights is None else self.weights.shape[1]

    @property
    def shared(self) -> bool:
        """Whether a shared expert is among the terms."""
        return self.weights is not None and len(self.values) > self.weights.numel()


Summands = Tensor | Terms  # rows, or the terms of rows


def summed(rows: Summands) -> Tensor:
    """The rows themselves."""
    return rows if isinstance(rows, Tensor) else sum_terms(rows)


def sum_terms(terms: Terms) -> Tensor:
    """Add terms up -> new [T,D]."""
    if terms.weights is None:
        check.dtype("sum_terms", torch.float32, values=terms.values)
    else:
        check.dtype("sum_terms", torch.float32, weights=terms.weights)
        check.dtype("sum_terms", terms.dtype, values=terms.values)
        pairs, tokens = terms.weights.numel(), terms.weights.shape[0]
        fits = len(terms.values) in (pairs, pairs + tokens)
        check.require("sum_terms", fits, f"{len(terms.values)} values, {pairs} slots of {tokens} tokens")
    return bound.sum_terms(terms)
