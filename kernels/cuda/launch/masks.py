"""Launcher of masks as bit sets (masks.cu), with the arguments of ops/sampling.py."""

from __future__ import annotations

from torch import Tensor

from cierzo.kernels.check import require
from cierzo.kernels.cuda.launch.kernel import Kernel, divide_up
from cierzo.kernels.cuda.launch.launcher import launch

_THREADS = 256
_TOKENS = 16  # of a row for each thread

_MASK_BITS = Kernel(
    "masks.cu",
    "mask_bits",
    {
        "logits": "*f32",
        **dict.fromkeys(("stride", "rows", "vocab"), "i64"),
        "at_rows": "*i64",
        "bits": "*i32",
        "words": "i64",
    },
)
KERNELS = (_MASK_BITS,)


def mask_bits(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """See ops/sampling.py. Rows outside the logits are left out without an error, as nothing waits here."""
    require("mask_bits", logits.stride(1) == 1, f"logits are edited in place, but have strides {logits.stride()}")
    launch(
        _MASK_BITS,
        grid=(divide_up(logits.shape[1], _THREADS * _TOKENS), rows.numel()),
        threads=_THREADS,
        logits=logits,
        stride=logits.stride(0),
        rows=logits.shape[0],
        vocab=logits.shape[1],
        at_rows=rows.contiguous(),
        bits=bits.contiguous(),
        words=bits.shape[1],
    )
