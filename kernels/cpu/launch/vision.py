"""Attention of an image's patches, and GELU, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels.cpu import abi, native
from cierzo.kernels.cpu.tensors import rows


def image_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """See ops/vision.py."""
    out = torch.empty(q.shape, dtype=q.dtype)
    args = abi.ImageAttentionArgs(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        *q.shape,
        q.stride(0),
        keys.stride(0),
        values.stride(0),
        out.data_ptr(),
        scale,
        abi.DTYPES[q.dtype],
    )
    native.call("image_attention", args)
    return out


def gelu(x: Tensor) -> Tensor:
    """See ops/vision.py."""
    x = rows(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    native.call("gelu", abi.GeluArgs(x.data_ptr(), *x.shape, x.stride(0), out.data_ptr(), abi.DTYPES[x.dtype]))
    return out
