"""How far from the exact answer a kernel's may lie: bounds that follow from where it rounds, value by value.

Rounding to n significant bits, the leading one included, moves a value by at most 2^-n of itself. Sums are in fp32,
in any order: every product and every partial sum is rounded once, and no partial sum is larger than that of the
magnitudes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
SUM = UNIT[torch.float32]
EXP = 6 * SUM  # relative, of an exponential by a polynomial
SILU = EXP + 2 * SUM  # and a sum and a quotient
STEEPEST_SILU = 1.1
SMALLEST = 1e-35  # dot products of bf16 take what is below fp32's normal range for zero


class Near(NamedTuple):
    """Exact values, and how far from each a result may lie; fp64."""

    value: Tensor
    error: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest magnitude that a result may have."""
        return self.value.abs() + self.error


def exact(x: Tensor) -> Near:
    """Values that are given, and hence exact."""
    return Near(x.double(), torch.zeros(x.shape, dtype=torch.float64))


def rounded(x: Near, dtype: torch.dtype) -> Near:
    """Once, to the nearest."""
    return Near(x.value, x.error + UNIT[dtype] * x.largest)


def product(x: Near, weight: Tensor) -> Near:
    """x [T,k] with weights [n,k]: k products and their sum."""
    magnitudes = weight.double().abs().T
    roundings = (weight.shape[1] + 2) * SUM
    return Near(x.value @ weight.double().T, x.error @ magnitudes + roundings * (x.largest @ magnitudes))


def times(a: Near, b: Near) -> Near:
    """Value by value, rounded in fp32."""
    error = a.largest * b.largest - (a.value * b.value).abs()
    return Near(a.value * b.value, error + SUM * a.largest * b.largest)


def total(*terms: Near) -> Near:
    """A sum, one term after the other, in fp32."""
    largest = torch.stack([term.largest for term in terms]).sum(0)
    value, error = (sum(parts, torch.zeros_like(largest)) for parts in zip(*terms, strict=True))
    return Near(value, error + len(terms) * SUM * largest)


def silu(x: Near) -> Near:
    """x / (1 + exp(-x))."""
    value = torch.nn.functional.silu(x.value)
    return Near(value, STEEPEST_SILU * x.error + SILU * (value.abs() + STEEPEST_SILU * x.error))


def gated_mlp(x: Near, gate_up: Tensor, down: Tensor, dtype: torch.dtype, *, each: bool = False) -> Near:
    """down (silu(gate) * up), before the result is rounded. What lies between the two products is rounded to the
    activations' dtype once, or `each` operation's result is, as plain torch does it."""
    gate, up = (product(x, part) for part in gate_up.chunk(2))
    if each:
        gate, up = rounded(gate, dtype), rounded(up, dtype)
    factor = rounded(silu(gate), dtype) if each else silu(gate)
    return product(rounded(times(factor, up), dtype), down)


def assert_near(result: Tensor, expected: Near) -> None:
    """Every value within its own bound."""
    assert result.shape == expected.value.shape
    excess = (result.double() - expected.value).abs() / (expected.error + SMALLEST)
    assert not excess.numel() or float(excess.max()) <= 1, (
        f"{float(excess.max()):.3g} times as far as rounding goes"
    )
