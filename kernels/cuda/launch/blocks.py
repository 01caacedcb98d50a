"""Launchers of the block copies (copy.cu), with the arguments of ops/blocks.py."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels.cuda.launch.kernel import Kernel, divide_up
from cierzo.kernels.cuda.launch.launcher import launch

_THREADS = 256
_VECTORS = 4  # vectors that a thread copies before a block is cut into more pieces
_MOST_PIECES = 64
_TYPES = {
    "source": "*bytes",
    "destination": "*bytes",
    "source_ids": "*i64",
    "destination_ids": "*i64",
    **dict.fromkeys(("id_stride", "sources", "destinations", "block_bytes"), "i64"),
}
_COPY = {width: Kernel("copy.cu", f"copy_blocks_{width}", _TYPES) for width in (16, 1)}
KERNELS = tuple(_COPY.values())


def copy_blocks(pages: Tensor, pairs: Tensor) -> None:
    """See ops/blocks.py. Pairs with a number that is not a block's are left out."""
    pairs = pairs.contiguous()
    _move(pages, pages, pairs.shape[0], pairs.flatten()[:1], pairs.flatten()[1:2], id_stride=2)


def gather_blocks(pages: Tensor, block_ids: Tensor, out: Tensor) -> None:
    """See ops/blocks.py. Numbers that are not a block's are left out."""
    _move(pages, out, block_ids.shape[0], block_ids.contiguous(), None)


def scatter_blocks(pages: Tensor, block_ids: Tensor, blocks: Tensor) -> None:
    """See ops/blocks.py. Numbers that are not a block's are left out."""
    _move(blocks, pages, block_ids.shape[0], None, block_ids.contiguous())


def _move(
    source: Tensor,
    destination: Tensor,
    count: int,
    source_ids: Tensor | None,
    destination_ids: Tensor | None,
    id_stride: int = 1,
) -> None:
    """Copy `count` blocks in one launch, 16 bytes at a time if all blocks start at multiples of 16 bytes."""
    if count == 0 or source.numel() == 0 or destination.numel() == 0:
        return
    block_bytes = source[0].numel() * source.element_size()
    places = block_bytes | source.data_ptr() | destination.data_ptr()
    width = 16 if places % 16 == 0 else 1
    pieces = min(_MOST_PIECES, divide_up(block_bytes, width * _THREADS * _VECTORS))
    launch(
        _COPY[width],
        grid=(count, pieces),
        threads=_THREADS,
        source=source.flatten().view(torch.uint8),
        destination=destination.flatten().view(torch.uint8),
        source_ids=source_ids,
        destination_ids=destination_ids,
        id_stride=id_stride,
        sources=source.shape[0],
        destinations=destination.shape[0],
        block_bytes=block_bytes,
    )
