"""Dense products in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels.cpu import abi, native
from cierzo.kernels.cpu.tensors import packed_for, rows
from cierzo.kernels.formats.packed import Matrix


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """See ops/linear.py."""
    return _linear("linear", x, weight, x.dtype)


def lm_head(hidden: Tensor, weight: Matrix) -> Tensor:
    """See ops/linear.py."""
    return _linear("lm_head", hidden, weight, torch.float32)


def _linear(operation: str, x: Tensor, weight: Matrix, out_dtype: torch.dtype) -> Tensor:
    x, packed = rows(x), packed_for(operation, weight)
    count, outputs = x.shape[0], packed.shape[0]
    out = torch.empty((count, outputs), dtype=out_dtype)
    args = abi.LinearArgs(
        x.data_ptr(),
        count,
        x.stride(0),
        packed.address,
        out.data_ptr(),
        outputs,
        abi.DTYPES[x.dtype],
        abi.DTYPES[out_dtype],
    )
    native.call("linear", args)
    return out


def gated_mlp(x: Tensor, gate_up: Matrix, down: Matrix) -> Tensor:
    """See ops/linear.py."""
    x = rows(x)
    packed_gate_up, packed_down = packed_for("gated_mlp", gate_up, paired=True), packed_for("gated_mlp", down)
    count, outputs = x.shape[0], packed_down.shape[0]
    out = torch.empty((count, outputs), dtype=x.dtype)
    args = abi.GatedMlpArgs(
        x.data_ptr(),
        count,
        x.stride(0),
        packed_gate_up.address,
        packed_down.address,
        out.data_ptr(),
        outputs,
        abi.DTYPES[x.dtype],
    )
    native.call("gated_mlp", args)
    return out
