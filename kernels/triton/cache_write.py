"""Writes of latents, keys and values into pages, with the norm and the rotation that come before.

Pages have the dtype of the rows, or float8_e4m3fn: values are then rounded once more, to nearest, and clamped to
448. Norms and rotations have the bits of the operations of their own (norm.py, rope.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.cuda.launch.kernel import divide_up
from cierzo.kernels.triton.launch import POINTER, Configuration, kept, kernel, launch
from cierzo.kernels.triton.norm import normed
from cierzo.kernels.triton.paged import require_pages
from cierzo.kernels.triton.rope import rotated_pairs, store_pairs


@kernel
def stored(values, dtype: tl.constexpr):
    """Values in the dtype of the pages, through fp32, from which Triton converts to 8 bits."""
    return values.to(tl.float32).to(dtype)


@kernel
def _write_rows(
    pages_ptr, slots_ptr, rows_ptr, rows_token, rows_head, OFFSET: tl.constexpr, PAGE_TOKEN: tl.constexpr,
    PAGE_HEAD: tl.constexpr, HEADS: tl.constexpr, W: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    heads = tl.arange(0, BLOCK_H)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (heads < HEADS) & (columns < W)
    values = tl.load(
        rows_ptr + token * rows_token + heads * rows_head.to(tl.int64) + columns, mask=inside, other=0.0
    )
    page = pages_ptr + slot * PAGE_TOKEN + heads * PAGE_HEAD + OFFSET + columns
    tl.store(page, stored(values, pages_ptr.dtype.element_ty), mask=inside)


@kernel
def _write_normed_latents(
    pages_ptr, slots_ptr, kv_ptr, weight_ptr, cos_ptr, sin_ptr, eps,
    KV_STRIDE: tl.constexpr, R: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    page = pages_ptr + tl.load(slots_ptr + token) * (R + 2 * F)
    row = kv_ptr + token * KV_STRIDE
    dtype = pages_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK_R)
    inside = columns < R
    latent = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    latent = normed(latent, weight_ptr, eps, columns, inside, R)
    tl.store(page + columns, stored(latent, dtype), mask=inside)
    one = tl.arange(0, 1)[:, None]  # a single head
    first, second = rotated_pairs(row + R + one, one == 0, cos_ptr, sin_ptr, token, F, 1, BLOCK_F, INTERLEAVED)
    first, second = stored(first, dtype), stored(second, dtype)
    store_pairs(page + R + one, one == 0, first, second, F, 1, BLOCK_F, INTERLEAVED)


@kernel
def _rotate_and_write(
    k_pages_ptr, v_pages_ptr, slots_ptr, qkv_ptr, cos_ptr, sin_ptr,
    QKV_STRIDE: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Rotate HEADS of a token's query and key heads; the program of a key head also writes its values."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    width: tl.constexpr = 2 * F
    source = qkv_ptr + token * QKV_STRIDE + heads * width
    live = heads < HQ + HK
    first, second = rotated_pairs(source, live, cos_ptr, sin_ptr, token, F, HEADS, BLOCK_F, INTERLEAVED)
    store_pairs(source, heads < HQ, first, second, F, HEADS, BLOCK_F, INTERLEAVED)
    is_key = (heads >= HQ) & (heads < HQ + HK)
    page = (slot * HK + (heads - HQ)) * width
    first, second = stored(first, k_pages_ptr.dtype.element_ty), stored(second, k_pages_ptr.dtype.element_ty)
    store_pairs(k_pages_ptr + page, is_key, first, second, F, HEADS, BLOCK_F, INTERLEAVED)
    columns = tl.arange(0, BLOCK_W)[None, :]
    inside = is_key & (columns < width)
    values = tl.load(source + HK * width + columns, mask=inside, other=0.0)
    tl.store(v_pages_ptr + page + columns, stored(values, v_pages_ptr.dtype.element_ty), mask=inside)


def write_latents(pages: Tensor, slots: Tensor, latents: Tensor, rope_keys: Tensor) -> None:
    """See ops/attention.py."""
    require_pages("write_latents", pages=pages)
    rank = latents.shape[1]
    for offset, rows in ((0, latents), (rank, rope_keys)):
        _write(pages, slots, rows[:, None], offset)


def write_keys_values(k_pages: Tensor, v_pages: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """See ops/attention.py."""
    require_pages("write_keys_values", k_pages=k_pages, v_pages=v_pages)
    for pages, rows in ((k_pages, keys), (v_pages, values)):
        _write(pages, slots, rows, 0)


def _write(pages: Tensor, slots: Tensor, rows: Tensor, offset: int) -> None:
    tokens, heads, width = rows.shape
    check.require("write", rows.stride(2) == 1, f"the values of a row must be contiguous, strides {rows.stride()}")
    page_width = pages.shape[-1]
    page_token = pages.numel() // max(1, pages.shape[0] * pages.shape[1])
    launch(
        write_configuration(
            POINTER[rows.dtype], POINTER[pages.dtype], heads, width, offset, (page_token, page_width)
        ),
        (tokens,),
        pages_ptr=pages,
        slots_ptr=slots,
        rows_ptr=rows,
        rows_token=rows.stride(0),
        rows_head=rows.stride(1),
    )


def write_normed_latents(
    pages: Tensor,
    slots: Tensor,
    kv: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
) -> None:
    """See ops/attention.py."""
    require_pages("write_normed_latents", pages=pages)
    check.require("write_normed_latents", kv.stride(1) == 1, f"kv must have contiguous rows, strides {kv.stride()}")
    launch(
        normed_configuration(
            POINTER[kv.dtype], POINTER[pages.dtype], norm_weight.shape[0], cos.shape[1], kv.stride(0), interleaved
        ),
        (kv.shape[0],),
        pages_ptr=pages,
        slots_ptr=slots,
        kv_ptr=kv,
        weight_ptr=norm_weight,
        cos_ptr=cos.contiguous(),
        sin_ptr=sin.contiguous(),
        eps=eps,
    )


def rotate_and_write_keys_values(
    k_pages: Tensor, v_pages: Tensor, slots: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> None:
    """See ops/attention.py."""
    require_pages("rotate_and_write_keys_values", k_pages=k_pages, v_pages=v_pages)
    shared, pairs = k_pages.shape[2], cos.shape[1]
    heads = qkv.shape[1] // (2 * pairs) - 2 * shared
    configuration = rotate_configuration(
        POINTER[qkv.dtype], POINTER[k_pages.dtype], (heads, shared), pairs, qkv.stride(0), interleaved
    )
    launch(
        configuration,
        (qkv.shape[0], divide_up(heads + shared, configuration.constants["HEADS"])),
        k_pages_ptr=k_pages,
        v_pages_ptr=v_pages,
        slots_ptr=slots,
        qkv_ptr=qkv,
        cos_ptr=cos.contiguous(),
        sin_ptr=sin.contiguous(),
    )


@kept
def write_configuration(
    pointer: str, pages: str, heads: int, width: int, offset: int, page_strides: tuple[int, int]
) -> Configuration:
    """pointer, pages: to rows and to pages, such as "*bf16". page_strides: of a token and a head, in values."""
    types = {"pages_ptr": pages, "slots_ptr": "*i64", "rows_ptr": pointer}
    constants = {
        "OFFSET": offset,
        "PAGE_TOKEN": page_strides[0],
        "PAGE_HEAD": page_strides[1],
        "HEADS": heads,
        "W": width,
        "BLOCK_H": triton.next_power_of_2(heads),
        "BLOCK": triton.next_power_of_2(width),
    }
    return Configuration(_write_rows, types | {"rows_token": "i32", "rows_head": "i32"}, constants, num_warps=1)


@kept
def normed_configuration(
    pointer: str, pages: str, rank: int, pairs: int, stride: int, interleaved: bool
) -> Configuration:
    """stride: of kv's rows, in values. One warp adds up a latent's squares, as in the kernel of norm.py."""
    types = {"pages_ptr": pages, "slots_ptr": "*i64"} | dict.fromkeys(("kv_ptr", "weight_ptr"), pointer)
    types |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "eps": "fp32"}
    constants = {
        "KV_STRIDE": stride,
        "R": rank,
        "F": pairs,
        "INTERLEAVED": interleaved,
        "BLOCK_R": triton.next_power_of_2(rank),
        "BLOCK_F": triton.next_power_of_2(pairs),
    }
    return Configuration(_write_normed_latents, types, constants, num_warps=1)


@kept
def rotate_configuration(
    pointer: str, pages: str, heads: tuple[int, int], pairs: int, stride: int, interleaved: bool
) -> Configuration:
    """heads: of queries, of keys. stride: of qkv's rows, in values."""
    types = {"k_pages_ptr": pages, "v_pages_ptr": pages, "slots_ptr": "*i64", "qkv_ptr": pointer}
    block = triton.next_power_of_2(pairs)
    constants = {
        "QKV_STRIDE": stride,
        "HQ": heads[0],
        "HK": heads[1],
        "F": pairs,
        "INTERLEAVED": interleaved,
        "HEADS": 8,
        "BLOCK_F": block,
        "BLOCK_W": 2 * block,
    }
    return Configuration(
        _rotate_and_write, types | {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}, constants, num_warps=2
    )
