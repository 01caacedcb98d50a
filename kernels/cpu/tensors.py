"""How tensors and weights are handed to C."""

from __future__ import annotations

from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.cpu import abi
from cierzo.kernels.formats.pack import as_packed
from cierzo.kernels.formats.packed import Matrix, PackedMatrix


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


def packed_for(operation: str, matrix: Matrix, paired: bool = False) -> PackedMatrix:
    """matrix as the kernels read it; a plain tensor is packed, for this call alone. Raises ArgumentError."""
    if not isinstance(matrix, PackedMatrix):
        return as_packed(matrix, paired)
    if matrix.paired != paired:
        wanted = "paired (gate beside up)" if paired else "in plain order"
        check.require(operation, False, f"packed weights {list(matrix.shape)} must be {wanted}")
    return matrix
