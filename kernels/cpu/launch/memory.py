"""Reading memory in C++."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.cpu import abi, native


def read_memory(values: Tensor) -> float:
    """The sum of a contiguous float32 tensor, read once from memory by all threads. No operation of a step."""
    check.dtype("read_memory", torch.float32, values=values)
    check.require("read_memory", values.is_contiguous(), "values must be contiguous")
    total = ctypes.c_double()
    args = abi.ReadMemoryArgs(values.data_ptr(), values.numel(), ctypes.addressof(total))
    native.call("read_memory", args)
    return total.value
