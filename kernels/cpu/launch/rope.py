"""Rotary position embedding in C++."""

from __future__ import annotations

from torch import Tensor

from cierzo.kernels.cpu import abi, native


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
