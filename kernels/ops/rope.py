"""Rotary position embedding: frequencies, tables by position, rotation. Letters: T tokens, H heads, P rope dims.

The frequency formulas run once, when a model is built; tables once per step, for all layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.registry import bound


def default_inv_freq(dim: int, theta: float, factor: float = 1.0) -> Tensor:
    """theta^(-2i/dim) for i < dim/2 -> fp32 [dim/2], computed in fp64 (Su et al. 2021, arXiv 2104.09864).

    factor: each is divided by it (linear scaling: Chen et al. 2023, arXiv 2306.15595).
    """
    return (_powers(dim, theta) / factor).float()


def llama3_inv_freq(
    dim: int, theta: float, factor: float, original_positions: int, low: float, high: float
) -> Tensor:
    """Llama 3.1's blend of frequencies -> fp32 [dim/2], computed in fp64.

    Pairs that turn at least `high` times within the original context keep their frequency, those that turn at most
    `low` times get it divided by `factor`, those between are blended by how often they turn (YaRN's by index).
    Source: Meta's llama-models, and transformers' `_compute_llama3_parameters`.
    """
    kept = _powers(dim, theta)
    turns = original_positions * kept / (2 * math.pi)
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return (kept * ramp + kept / factor * (1 - ramp)).float()


def yarn_inv_freq(
    dim: int, theta: float, factor: float, original_positions: int, beta_fast: float, beta_slow: float
) -> Tensor:
    """YaRN's blend of frequencies -> fp32 [dim/2], computed in fp64.

    Pairs that turn more than beta_fast times within the original context keep their frequency, those that turn
    less than beta_slow times get it divided by `factor`, those between are blended by a linear ramp over the
    pair index. Source: Peng et al. 2023, arXiv 2309.00071, with the rounding of the ramp's ends of its authors'
    code, as in transformers and vLLM.
    """

    def pair_turning(rotations: float) -> float:
        return dim * math.log(original_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(beta_fast)), 0)
    high = min(math.ceil(pair_turning(beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    kept = _powers(dim, theta)
    return (kept * (1 - ramp) + kept / factor * ramp).float()


def rope_tables(positions: Tensor, inv_freq: Tensor, magnitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, times `magnitude` -> two fp32 [T,P/2].

    positions int64 [T], absolute; inv_freq fp32 [P/2]. The angle is an fp32 product, as in transformers.
    """
    check.sizes("rope_tables", positions=(positions, "T"), inv_freq=(inv_freq, "F"))
    check.dtype("rope_tables", torch.float32, inv_freq=inv_freq)
    check.dtype("rope_tables", torch.int64, positions=positions)
    return bound.rope_tables(positions, inv_freq, magnitude)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None = None) -> None:
    """Rotate the last P values of each head of x [T,H,W] IN PLACE; then multiply its heads by `scale`, if any.

    cos, sin fp32 [T,P/2], P <= W. The rotation is computed in fp32 and rounded once to x's dtype, bf16 or fp32:
    (a, b) -> (a cos - b sin, b cos + a sin). A pair is (x[2i], x[2i+1]) of the P values if `interleaved`, else
    (x[i], x[i+P/2]); both members stay where they were, so cached keys and queries of one model always agree.
    scale fp32 [T] (Llama-4's factor on the query) multiplies all W values; the product is rounded once more.
    Rows and heads of x may be strided, the values of a head are contiguous.
    """
    names = check.sizes("apply_rope", x=(x, "T H W"), cos=(cos, "T F"), sin=(sin, "T F"))
    check.require("apply_rope", names["W"] >= 2 * names["F"], f"x {list(x.shape)}, cos {list(cos.shape)}")
    check.require("apply_rope", x.stride(2) == 1, f"the values of a head must be contiguous, strides {x.stride()}")
    check.dtype("apply_rope", torch.float32, cos=cos, sin=sin)
    if scale is not None:
        check.sizes("apply_rope", x=(x, "T H W"), scale=(scale, "T"))
        check.dtype("apply_rope", torch.float32, scale=scale)
    bound.apply_rope(x, cos, sin, interleaved, scale)


def _powers(dim: int, theta: float) -> Tensor:
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
