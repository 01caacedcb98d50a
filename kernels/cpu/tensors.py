"""Tensors and weights as they are handed to C."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.cpu import abi
from cierzo.kernels.cpu.launch import pack
from cierzo.kernels.formats.device import DeviceMatrix
from cierzo.kernels.formats.packed import PLAIN_FORMATS, Matrix, PackedMatrix, PackError, new_packed


class NativeMatrix:
    """A packed matrix and the C struct that describes it, which calls are handed by its `address`."""

    __slots__ = ("_struct", "address", "packed")

    def __init__(self, packed: PackedMatrix) -> None:
        *experts, n, k = packed.shape
        count = experts[0] if experts else 1
        format, each = abi.FORMATS[packed.format], packed.num_bytes // count
        self.packed = packed
        self._struct = abi.Matrix(packed.data.data_ptr(), count, n, k, each, format, int(packed.paired))
        self.address = ctypes.addressof(self._struct)

    @property
    def format(self) -> str:
        """The number format of the weights."""
        return self.packed.format

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, k) or (E, n, k)."""
        return self.packed.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations that the matrix is multiplied with."""
        return self.packed.dtype


def rows(x: Tensor) -> Tensor:
    """x with its last axis contiguous, as the kernels take it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def kv_format(pages: Tensor) -> int:
    """abi.h's number of the pages' format. Raises ArgumentError for one that no C++ kernel reads."""
    known = ", ".join(str(dtype) for dtype in abi.KV_FORMATS)
    check.require(
        "attention", pages.dtype in abi.KV_FORMATS, f"pages have dtype {pages.dtype}; on a CPU they are {known}"
    )
    return abi.KV_FORMATS[pages.dtype]


def as_packed(matrix: Matrix, paired: bool = False) -> NativeMatrix:
    """A door's argument as the kernels read it: a plain tensor is packed, exactly, in its own dtype."""
    if isinstance(matrix, PackedMatrix):
        return NativeMatrix(matrix)
    if isinstance(matrix, DeviceMatrix):
        raise PackError(f"a matrix of format {matrix.format} is for a GPU: the CPU kernels have another order")
    format = PLAIN_FORMATS.get(matrix.dtype, str(matrix.dtype))
    packed = new_packed(matrix, format, matrix.dtype, paired)
    pack.pack(matrix if matrix.dim() == 3 else matrix[None], format, paired, packed.data)
    return NativeMatrix(packed)


def packed_for(operation: str, matrix: Matrix, paired: bool = False) -> NativeMatrix:
    """matrix as the kernels read it; a plain tensor is packed, for this call alone. Raises ArgumentError."""
    if isinstance(matrix, PackedMatrix) and matrix.paired != paired:
        wanted = "paired (gate beside up)" if paired else "in plain order"
        check.require(operation, False, f"packed weights {list(matrix.shape)} must be {wanted}")
    return as_packed(matrix, paired)
