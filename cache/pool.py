"""The cache's tensors. The only file of this folder that imports torch."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from cierzo.cache.layout import CacheLayout

# Of the pages. INT8 rows carry their scales, as bytes.
DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.uint8,
}

HUGE_PAGE_BYTES = 1 << 21
_MADV_HUGEPAGE = 14


@dataclass(frozen=True, slots=True)
class MlaPages:
    """Latents of one layer: [B, S, R+P], contiguous; the normed latent first, then the rotated rope key.

    At int8 uint8 [B, S, R+P+8] with both scales.
    """

    latents: Tensor


@dataclass(frozen=True, slots=True)
class GqaPages:
    """Keys (rotated) and values of one layer: [B, S, Hk, d] each, contiguous; at int8 uint8 [B, S, Hk, d+4]."""

    keys: Tensor
    values: Tensor


class KVPool:
    """All layers' pages, allocated once. Written by the model's forward pass, at the slots its inputs name.

    Unwritten memory holds anything: no operation may let it reach a result. So a CPU's pages cost memory only
    once they are used.
    """

    def __init__(self, layout: CacheLayout, num_blocks: int, device: torch.device | str) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.layers: list[MlaPages | GqaPages] = [
            self._pages(layout, num_blocks, torch.device(device)) for _ in range(layout.num_layers)
        ]

    @staticmethod
    def _pages(layout: CacheLayout, num_blocks: int, device: torch.device) -> MlaPages | GqaPages:
        dtype = DTYPES[layout.dtype]
        rows = (num_blocks, layout.block_tokens)
        if layout.kind == "mla":
            return MlaPages(_empty((*rows, layout.page_width), dtype, device))
        shape = (*rows, layout.num_kv_heads, layout.page_width)
        return GqaPages(_empty(shape, dtype, device), _empty(shape, dtype, device))


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; on Linux CPUs in huge pages, if the system grants them.

    Attention walks through blocks in any order. With memory pages of 4 KB it spends half of its time on looking up
    addresses, where memory is virtualised twice (measured: 15 GB/s against 28).
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and sys.platform == "linux":
        start = -(-tensor.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        length = (tensor.data_ptr() + tensor.nbytes - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if length > 0:  # a refusal costs speed alone
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return tensor
