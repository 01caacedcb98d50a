"""Blocks in CUDA C++, on the CPU: every byte of the named blocks, and no other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cierzo.kernels.ops import blocks

SHAPES = [(16, 320), (16, 8, 3), (5,), (64, 328), (1, 1)]
DTYPES = [torch.bfloat16, torch.uint8, torch.float32]


@pytest.fixture(autouse=True)
def _bound(backend) -> None:
    """On the CPU's stand-in for a GPU."""


def random_pages(num_blocks: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bytes, NaNs of every kind among them."""
    random = torch.Generator().manual_seed(num_blocks)
    size = (num_blocks, *shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, size, generator=random, dtype=torch.uint8).view(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_copied_within_the_pages(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pages = random_pages(9, shape, dtype)
    expected = pages.clone()
    pairs = torch.tensor([[3, 0], [3, 8], [5, 1]])
    for source, destination in pairs.tolist():
        expected[destination] = expected[source]
    blocks.copy_blocks(pages, pairs)
    assert same(pages, expected)
    blocks.copy_blocks(pages, pairs[:0])
    assert same(pages, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_go_out_and_come_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pages, ids = random_pages(9, shape, dtype), torch.tensor([7, 2, 2, 0])
    outside = torch.zeros(6, *shape, dtype=dtype)
    blocks.gather_blocks(pages, ids, outside[1:5])
    assert same(outside[1:5], pages[ids])
    assert not outside[0].view(torch.uint8).any()
    assert not outside[5].view(torch.uint8).any()
    other = random_pages(11, shape, dtype)
    expected = other.clone()
    distinct = torch.tensor([10, 4, 5, 1])
    expected[distinct] = pages[ids]
    blocks.scatter_blocks(other, distinct, outside[1:5])
    assert same(other, expected)


def test_blocks_that_do_not_exist_are_left_out() -> None:
    pages = random_pages(4, (16, 4), torch.float32)
    before = pages.clone()
    blocks.copy_blocks(pages, torch.tensor([[0, 4], [4, 0], [-1, 1], [2, 2**40]]))
    assert same(pages, before)


def test_a_large_block_takes_several_pieces(backend) -> None:
    pages = random_pages(3, (64, 1024), torch.bfloat16)
    blocks.copy_blocks(pages, torch.tensor([[0, 2]]))
    assert same(pages[2], pages[0])
    assert backend.launches == ["copy_blocks_16"]
