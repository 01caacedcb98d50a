"""Blocks of the cache, moved: the plain-torch reference, and what the doors refuse."""

from __future__ import annotations

import pytest
import torch

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.ops import blocks
from cierzo.kernels.registry import bind


@pytest.fixture(autouse=True)
def _bound() -> None:
    bind(KernelsConfig(), "cpu")


def test_blocks_are_moved() -> None:
    pages = torch.arange(24.0).view(6, 2, 2)
    before = pages.clone()
    blocks.copy_blocks(pages, torch.tensor([[0, 5], [1, 4]]))
    assert torch.equal(pages, before[[0, 1, 2, 3, 1, 0]])
    out = torch.zeros(3, 2, 2)
    blocks.gather_blocks(pages, torch.tensor([2, 2, 3]), out)
    assert torch.equal(out, before[[2, 2, 3]])
    blocks.scatter_blocks(pages, torch.tensor([1, 0]), out[1:])
    assert torch.equal(pages, before[[3, 2, 2, 3, 1, 0]])
    blocks.copy_blocks(pages, torch.zeros(0, 2, dtype=torch.int64))


def test_misuse_is_refused() -> None:
    pages, ids = torch.zeros(4, 2, 2), torch.tensor([1, 2])
    with pytest.raises(ArgumentError, match=r"copy_blocks: pairs must have 2 axes \[N 2\]"):
        blocks.copy_blocks(pages, ids)
    with pytest.raises(ArgumentError, match="copy_blocks: pairs must have dtype"):
        blocks.copy_blocks(pages, torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ArgumentError, match="copy_blocks: pages must be contiguous"):
        blocks.copy_blocks(pages.transpose(0, 1), torch.tensor([[0, 1]]))
    with pytest.raises(ArgumentError, match=r"gather_blocks: out must be \[2, 2, 2\], has shape \[3, 2, 2\]"):
        blocks.gather_blocks(pages, ids, torch.zeros(3, 2, 2))
    with pytest.raises(ArgumentError, match=r"scatter_blocks: blocks has dtype torch\.int64"):
        blocks.scatter_blocks(pages, ids, torch.zeros(2, 2, 2, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="scatter_blocks: pages and blocks must be contiguous"):
        blocks.scatter_blocks(pages, ids, torch.zeros(2, 2, 2).transpose(1, 2))
