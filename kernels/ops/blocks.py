"""Whole blocks of the cache, moved. Letters: B blocks, N blocks that are moved.

A block is pages[i]: all tokens of one layer's page, whatever its shape and dtype. Bytes are moved, never computed
with, so that unwritten memory may be copied too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.registry import bound


def copy_blocks(pages: Tensor, pairs: Tensor) -> None:
    """pages[pairs[:, 1]] = pages[pairs[:, 0]], in place.

    pages [B, ...] of any dtype, contiguous; pairs int64 [N,2] of (source, destination), in [0, B). Destinations are
    distinct, and none of them is a source: the copies have no order. N may be 0.
    """
    check.sizes("copy_blocks", pairs=(pairs, "N 2"))
    check.dtype("copy_blocks", torch.int64, pairs=pairs)
    check.require("copy_blocks", pages.dim() > 0 and pages.is_contiguous(), "pages must be contiguous")
    bound.copy_blocks(pages, pairs)


def gather_blocks(pages: Tensor, block_ids: Tensor, out: Tensor) -> None:
    """out[j] = pages[block_ids[j]]: blocks on their way out, to the host or another card.

    pages [B, ...], out [N, ...], of one dtype and contiguous; block_ids int64 [N] in [0, B), may repeat. On a GPU
    out may lie in pinned host memory: it is written when the stream gets there.
    """
    _check_move("gather_blocks", pages, block_ids, out=out)
    bound.gather_blocks(pages, block_ids, out)


def scatter_blocks(pages: Tensor, block_ids: Tensor, blocks: Tensor) -> None:
    """pages[block_ids[j]] = blocks[j], in place: what gather_blocks took, back again.

    pages [B, ...], blocks [N, ...], of one dtype and contiguous; block_ids int64 [N] in [0, B), distinct. On a GPU
    blocks may lie in pinned host memory, unchanged until the stream has read them.
    """
    _check_move("scatter_blocks", pages, block_ids, blocks=blocks)
    bound.scatter_blocks(pages, block_ids, blocks)


def _check_move(operation: str, pages: Tensor, block_ids: Tensor, **moved: Tensor) -> None:
    ((name, other),) = moved.items()
    check.sizes(operation, block_ids=(block_ids, "N"))
    check.dtype(operation, torch.int64, block_ids=block_ids)
    check.same_dtype(operation, pages=pages, **moved)
    shape = [block_ids.shape[0], *pages.shape[1:]]
    check.require(operation, list(other.shape) == shape, f"{name} must be {shape}, has shape {list(other.shape)}")
    contiguous = pages.is_contiguous() and other.is_contiguous()
    check.require(operation, contiguous, f"pages and {name} must be contiguous")
