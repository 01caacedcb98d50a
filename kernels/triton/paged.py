"""What the kernels over pages have in common: which pages they read, and the rows of a tile of tokens."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.triton.launch import kernel

LOG2_E = 1.4426950408889634  # softmax by exp2: the factor goes into the scale
SUPPORTED = (torch.bfloat16, torch.float32, torch.float8_e4m3fn)

# The sizes that each file's `configurations` are about: Small 4 and Small 3, and the
# attention of gpt-oss, whole and in tensor-parallel shards.
BLOCK_TOKENS = 32  # the cache's default
PAGES = {"bf16": "*bf16", "fp8": "*fp8e4nv"}
SMALL4_HEADS = (32, 16, 8, 4)
RANK, ROPE, NOPE, VALUE = 256, 64, 64, 128
SMALL3_HEADS = ((32, 8), (16, 4), (8, 2), (4, 1))
SMALL3_WIDTH = 128
GPT_OSS_HEADS = ((64, 8), (32, 4), (16, 2), (8, 1))
GPT_OSS_WIDTH, GPT_OSS_WINDOW = 64, 128


def require_pages(operation: str, **pages: Tensor) -> None:
    """Raise ArgumentError for pages of a dtype that no kernel reads, and for those that are not contiguous."""
    for name, tensor in pages.items():
        known = ", ".join(str(dtype) for dtype in SUPPORTED)
        check.require(
            operation, tensor.dtype in SUPPORTED, f"{name} has dtype {tensor.dtype}; on a GPU pages are {known}"
        )
        check.require(operation, tensor.is_contiguous(), f"{name} {list(tensor.shape)} must be contiguous")


def tile_width(width: int) -> int:
    """Columns of a tile that holds `width` of them: a power of two that a product takes."""
    return max(16, 1 << (width - 1).bit_length())


def value_bits(pointer: str) -> int:
    """Of what a pointer such as "*bf16" points to."""
    return {"*fp8e4nv": 8, "*bf16": 16, "*fp16": 16, "*fp32": 32}[pointer]


@kernel
def page_rows(table_ptr, positions, live, S: tl.constexpr):
    """Tokens of one sequence -> their rows in the pages, int64; row 0 for those that are not `live`.

    table_ptr: the sequence's own row of the block tables. Nothing is read for a token that is not live.
    """
    blocks = tl.load(table_ptr + positions // S, mask=live, other=0).to(tl.int64)
    return tl.where(live, blocks * S + positions % S, 0)


@kernel
def load_tile(pointer, rows, live, columns, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, columns] of a matrix of rows STRIDE apart; what is not live, or past WIDTH columns, is 0."""
    inside = live[:, None]
    if WIDTH < BLOCK:
        inside = inside & (columns < WIDTH)[None, :]
    return tl.load(pointer + rows[:, None] * STRIDE + columns[None, :], mask=inside, other=0.0)


@kernel
def sink_of(sinks_ptr, head):
    """The logit of a query head's sink, as a power of two: what scores are when they meet exp2."""
    return tl.load(sinks_ptr + head) * 1.4426950408889634  # LOG2_E
