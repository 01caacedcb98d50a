"""Blocks of the cache, moved by plain torch. `ops/blocks.py` says what each operation promises."""

from __future__ import annotations

from torch import Tensor


def copy_blocks(pages: Tensor, pairs: Tensor) -> None:
    """See ops/blocks.py."""
    pages[pairs[:, 1]] = pages[pairs[:, 0]]


def gather_blocks(pages: Tensor, block_ids: Tensor, out: Tensor) -> None:
    """See ops/blocks.py."""
    out.copy_(pages[block_ids])


def scatter_blocks(pages: Tensor, block_ids: Tensor, blocks: Tensor) -> None:
    """See ops/blocks.py."""
    pages[block_ids] = blocks.to(pages.device)
