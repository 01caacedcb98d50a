"""Dense products in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cierzo.kernels.formats.activations import QuantisedRows, Rows, quantise_rows, takes_fp8
from cierzo.kernels.formats.definition import as_tensor
from cierzo.kernels.formats.device import DeviceMatrix, dequantise
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.terms import Summands

PAIRED_ROW_WIDTH = 1280


def linear(x: Rows, weight: Matrix) -> Tensor:
    """See ops/linear.py."""
    if isinstance(weight, DeviceMatrix) and takes_fp8(weight):
        return _linear_fp8(x, weight).to(x.dtype)
    assert isinstance(x, Tensor), "rows in fp8 meet matrices that take them"
    weight = as_tensor(weight)
    if x.shape[0] == 1 and x.dtype is torch.bfloat16 and x.shape[1] >= PAIRED_ROW_WIDTH and not x.is_cuda:
        # torch 2.13 on the CPU reads bf16 weights 6 to 14 % faster for two rows than for one, from this width on
        return functional.linear(x.expand(2, -1), weight)[:1]
    return functional.linear(x, weight)


def linear_terms(x: Rows, weight: Matrix) -> Summands:
    """See ops/linear.py."""
    return linear(x, weight)


def _linear_fp8(x: Rows, weight: DeviceMatrix) -> Tensor:
    """fp32 sums of products of codes, which fp32 holds exactly, times the scales."""
    rows = x if isinstance(x, QuantisedRows) else quantise_rows(x, weight.activation_scales)
    return functional.linear(rows.codes.float(), dequantise(weight)) * rows.scales[:, None]


def lm_head(hidden: Tensor, weight: Matrix) -> Tensor:
    """See ops/linear.py."""
    return linear(hidden, weight).float()


def gated_mlp(x: Rows, gate_up: Matrix, down: Matrix) -> Tensor:
    """See ops/linear.py."""
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    return linear(functional.silu(gate).mul_(up), down)
