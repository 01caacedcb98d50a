"""The cache's tensors. The only file of this folder that imports torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cierzo.cache.layout import CacheLayout

# Of the pages. INT8 rows carry their scales, as bytes.
DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.uint8}


@dataclass(frozen=True, slots=True)
class MlaPages:
    """One layer of latents: [B, S, R+P], contiguous; the normed latent first, then the rotated rope key.

    At int8 uint8 [B, S, R+P+8] with both scales.
    """

    latents: Tensor


@dataclass(frozen=True, slots=True)
class GqaPages:
    """One layer of keys (rotated) and values: [B, S, Hk, d] each, contiguous; at int8 uint8 [B, S, Hk, d+4]."""

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
            return MlaPages(torch.empty(*rows, layout.page_width, dtype=dtype, device=device))
        heads = (layout.num_kv_heads, layout.page_width)
        keys, values = (torch.empty(*rows, *heads, dtype=dtype, device=device) for _ in range(2))
        return GqaPages(keys, values)
