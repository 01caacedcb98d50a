"""Packing of weights in C++."""

from __future__ import annotations

import ctypes

from torch import Tensor

from cierzo.kernels.cpu import abi, native

_NONE = 2**63 - 1


def pack(weight: Tensor, format: str, paired: bool, target: Tensor) -> int | None:
    """weight [E,n,k], any strides, -> target, as formats/pack.py says.

    Returns the place in weight.flatten() of the first value that the format cannot hold, or None.
    """
    experts, n, k = weight.shape
    refused = ctypes.c_int64(_NONE)
    args = abi.PackArgs(
        weight.data_ptr(),
        experts,
        n,
        k,
        *weight.stride(),
        target.data_ptr(),
        target.numel() // experts,
        ctypes.addressof(refused),
        abi.FORMATS[format],
        int(paired),
        abi.DTYPES[weight.dtype],
    )
    native.call("pack", args)
    return None if refused.value == _NONE else refused.value
