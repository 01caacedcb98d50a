"""Rotary position embedding in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels.cpu import abi, native


def rope_tables(positions: Tensor, inv_freq: Tensor, magnitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """See ops/rope.py."""
    positions, inv_freq = positions.contiguous(), inv_freq.contiguous()
    shape = (positions.shape[0], inv_freq.shape[0])
    cos, sin = torch.empty(shape, dtype=torch.float32), torch.empty(shape, dtype=torch.float32)
    args = abi.RopeTablesArgs(
        positions.data_ptr(),
        shape[0],
        inv_freq.data_ptr(),
        shape[1],
        cos.data_ptr(),
        sin.data_ptr(),
        magnitude,
    )
    native.call("rope_tables", args)
    return cos, sin


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None) -> None:
    """See ops/rope.py."""
    cos, sin = cos.contiguous(), sin.contiguous()
    factors = None if scale is None else scale.contiguous()
    args = abi.RopeArgs(
        x.data_ptr(),
        *x.shape,
        2 * cos.shape[1],
        x.stride(0),
        x.stride(1),
        cos.data_ptr(),
        sin.data_ptr(),
        None if factors is None else factors.data_ptr(),
        interleaved,
        abi.DTYPES[x.dtype],
    )
    native.call("rope", args)
