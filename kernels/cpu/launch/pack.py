"""Packing of weights in C++."""

from __future__ import annotations

import ctypes

from torch import Tensor

from cierzo.kernels.cpu import abi, native

_NONE = 2**63 - 1


def pack(weight: Tensor, format: str, paired: bool, target: Tensor) -> int | None:
    """weight [E,n,k], any strides, -> target, as kernels/pack.py says.

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


def pack_nvfp4(codes: Tensor, scales: Tensor, whole: Tensor, paired: bool, target: Tensor) -> None:
    """codes uint8 [n, k/2], scales uint8 [n, k/16], whole float32 [n], contiguous, -> target, as nvfp4 packed."""
    n, k = codes.shape[0], 2 * codes.shape[1]
    args = abi.PackNvfp4Args(
        codes.data_ptr(), scales.data_ptr(), whole.data_ptr(), n, k, target.data_ptr(), int(paired)
    )
    native.call("pack_nvfp4", args)
