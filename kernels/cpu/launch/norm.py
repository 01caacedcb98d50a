"""RMS normalisation in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels.cpu import abi, native
from cierzo.kernels.cpu.tensors import rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops/norm.py."""
    return _norm(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ops/norm.py."""
    return _norm(x, residual, weight, eps)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    x, weight = rows(x), weight.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    args = abi.NormArgs(
        x.data_ptr(),
        x.shape[0],
        x.shape[1],
        x.stride(0),
        None if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        weight.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        eps,
        abi.DTYPES[x.dtype],
    )
    native.call("norm", args)
    return out
