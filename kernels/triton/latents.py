"""Norms, rotations and cache entry between MLA's first product and its queries in one launch; then each head's
rotation and product in another.

    product [T, Q+R+P]   q latent | latent | rope key      parts of k are added while they are read (terms.py)
    norm_latents         q latent after its norm, in the dtype or in codes; [latent after its norm | rotated rope
                         key] goes into the pages
    query product        [T, H (nope+P)]                   parts again
    rotate_and_absorb    [q_nope W_UK | rotated q_rope], both times the query's scale

Norms, rotations and scales are rounded where the operations of their own round (norm.py, rope.py).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.cuda.launch.kernel import divide_up
from cierzo.kernels.formats.activations import Rows
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.terms import Summands
from cierzo.kernels.triton.activations import code_types, empty_rows, row_pointers, row_warps, store_row
from cierzo.kernels.triton.cache_write import stored
from cierzo.kernels.triton.chain import after_others, chained
from cierzo.kernels.triton.launch import POINTER, Configuration, kept, kernel, launch
from cierzo.kernels.triton.norm import normed
from cierzo.kernels.triton.paged import require_pages, tile_width
from cierzo.kernels.triton.rope import rotated, store_pairs
from cierzo.kernels.triton.terms import Layout, arguments, load_rows

TOKENS = 16  # of a program that absorbs: as few as the columns of an MMA can be
ABSORBING_WARPS = 4  # of such a program
OUTPUTS = 64  # of such a program: 128 programs for one token of 32 heads of 256 latents


@chained
def _norm_latents(
    x_ptr, shares_ptr, q_weight_ptr, kv_weight_ptr, cos_ptr, sin_ptr, pages_ptr, slots_ptr,
    out_ptr, static_ptr, codes_ptr, scales_ptr, eps, tokens,
    X_STRIDE: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
    Q: tl.constexpr, R: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr, CODES: tl.constexpr,
    STATIC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    after_others()
    latent_row(
        tl.program_id(0).to(tl.int64), tl.program_id(1) == 0,
        x_ptr, shares_ptr, q_weight_ptr, kv_weight_ptr, cos_ptr, sin_ptr, pages_ptr, slots_ptr,
        out_ptr, static_ptr, codes_ptr, scales_ptr, eps, tokens, X_STRIDE, PARTS, SLOTS, SHARED,
        Q, R, F, INTERLEAVED, CODES, STATIC, BLOCK_Q, BLOCK_R, BLOCK_F,
    )  # fmt: skip


@kernel
def latent_row(
    token, of_query,
    x_ptr, shares_ptr, q_weight_ptr, kv_weight_ptr, cos_ptr, sin_ptr, pages_ptr, slots_ptr,
    out_ptr, static_ptr, codes_ptr, scales_ptr, eps, tokens,
    X_STRIDE: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
    Q: tl.constexpr, R: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr, CODES: tl.constexpr,
    STATIC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The query's latent of a token, or what goes into the pages."""
    dtype: tl.constexpr = q_weight_ptr.dtype.element_ty
    if of_query:
        columns = tl.arange(0, BLOCK_Q)
        inside = columns < Q
        q = load_rows(x_ptr, shares_ptr, token, columns, inside, tokens, X_STRIDE, PARTS, SLOTS, SHARED, dtype)
        q = normed(q, q_weight_ptr, eps, columns, inside, Q)
        if CODES:
            store_row(q.to(tl.float32), static_ptr, codes_ptr, scales_ptr, token, columns, inside, Q, STATIC)
        else:
            tl.store(out_ptr + token * Q + columns, q, mask=inside)
    else:
        _cache_row(
            token, x_ptr, shares_ptr, kv_weight_ptr, cos_ptr, sin_ptr, pages_ptr, slots_ptr, eps, tokens,
            X_STRIDE, PARTS, SLOTS, SHARED, Q, R, F, INTERLEAVED, BLOCK_R, BLOCK_F,
        )  # fmt: skip


@kernel
def _cache_row(
    token, x_ptr, shares_ptr, kv_weight_ptr, cos_ptr, sin_ptr, pages_ptr, slots_ptr, eps, tokens,
    X_STRIDE: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
    Q: tl.constexpr, R: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """A token's latent and rotated key, into the pages."""
    dtype: tl.constexpr = kv_weight_ptr.dtype.element_ty
    cached: tl.constexpr = pages_ptr.dtype.element_ty
    page = pages_ptr + tl.load(slots_ptr + token) * (R + 2 * F)
    columns = tl.arange(0, BLOCK_R)
    inside = columns < R
    kv = load_rows(x_ptr, shares_ptr, token, Q + columns, inside, tokens, X_STRIDE, PARTS, SLOTS, SHARED, dtype)
    kv = normed(kv, kv_weight_ptr, eps, columns, inside, R)
    tl.store(page + columns, stored(kv, cached), mask=inside)
    one = tl.arange(0, 1)[:, None]  # a single head
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK_F)[None, :] + one
        both = load_rows(
            x_ptr, shares_ptr, token, Q + R + columns, columns < 2 * F, tokens,
            X_STRIDE, PARTS, SLOTS, SHARED, dtype,
        )  # fmt: skip
        first, second = tl.split(tl.reshape(both, (1, BLOCK_F, 2)))
    else:
        columns = tl.arange(0, BLOCK_F)[None, :] + one
        first = load_rows(
            x_ptr, shares_ptr, token, Q + R + columns, columns < F, tokens, X_STRIDE, PARTS, SLOTS, SHARED, dtype
        )
        second = load_rows(
            x_ptr, shares_ptr, token, Q + R + F + columns, columns < F, tokens,
            X_STRIDE, PARTS, SLOTS, SHARED, dtype,
        )  # fmt: skip
    first, second = rotated(first, second, cos_ptr, sin_ptr, token, F, BLOCK_F, dtype)
    first, second = stored(first, cached), stored(second, cached)
    store_pairs(page + R + one, one == 0, first, second, F, 1, BLOCK_F, INTERLEAVED)


def norm_latents(
    x: Summands,
    query_norm: Tensor,
    kv_norm: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    pages: Tensor,
    slots: Tensor,
    quantised: bool,
    scale: Tensor | None,
) -> Rows:
    """See ops/attention.py."""
    require_pages("norm_latents", pages=pages)
    width = query_norm.shape[0]
    codes = empty_rows(query_norm, x.shape[0], width) if quantised else None
    out = query_norm.new_empty(x.shape[0], width) if codes is None else codes
    pointers = (POINTER[x.dtype], POINTER[pages.dtype])
    sizes = (width, kv_norm.shape[0], cos.shape[1])
    static = codes is not None and scale is not None
    configuration = latents_configuration(pointers, Layout.of(x), sizes, interleaved, quantised, static)
    written = {"out_ptr": out} if codes is None else row_pointers(codes, scale)
    launch(
        configuration,
        (x.shape[0], 2),
        q_weight_ptr=query_norm,
        kv_weight_ptr=kv_norm,
        cos_ptr=cos.contiguous(),
        sin_ptr=sin.contiguous(),
        pages_ptr=pages,
        slots_ptr=slots,
        eps=eps,
        **written,
        **arguments(x),
    )
    return out


@chained
def _rotate_and_absorb(
    x_ptr, shares_ptr, weight_ptr, cos_ptr, sin_ptr, scale_ptr, out_ptr, tokens, count, first_row,
    X_STRIDE: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
    H: tl.constexpr, NOPE: tl.constexpr, R: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr,
    SCALED: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    after_others()
    absorb_tile(
        tl.program_id(0), tl.program_id(1), tl.program_id(2),
        x_ptr, shares_ptr, weight_ptr, cos_ptr, sin_ptr, scale_ptr, out_ptr, tokens, count, first_row,
        X_STRIDE, PARTS, SLOTS, SHARED, H, NOPE, R, F, INTERLEAVED, SCALED, TOKENS, BLOCK_N, BLOCK_K, BLOCK_F,
    )  # fmt: skip


@kernel
def absorb_tile(
    tile, head, part,
    x_ptr, shares_ptr, weight_ptr, cos_ptr, sin_ptr, scale_ptr, out_ptr, tokens, count, first_row,
    X_STRIDE: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
    H: tl.constexpr, NOPE: tl.constexpr, R: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr,
    SCALED: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one head. BLOCK_N of its R outputs are W_UK of the head times q_nope; that of the
    first of them, part 0, also rotates q_rope. first_row: of the tables, that of the first token."""
    token = (tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    there = token < count
    live = there[:, None]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    start = head * (NOPE + 2 * F)
    inner = tl.arange(0, BLOCK_K)
    q = load_rows(
        x_ptr, shares_ptr, token[:, None], (start + inner)[None, :], live & (inner < NOPE)[None, :], tokens,
        X_STRIDE, PARTS, SLOTS, SHARED, dtype,
    )  # fmt: skip
    if SCALED:
        scale = tl.load(scale_ptr + first_row + token, mask=there, other=0.0)[:, None]
        q = q * scale
    outputs = part * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = head * R + tl.minimum(outputs, R - 1)
    weight = tl.load(weight_ptr + rows[:, None] * NOPE + inner[None, :], mask=(inner < NOPE)[None, :], other=0.0)
    total = tl.trans(tl.dot(weight, tl.trans(q.to(dtype)), input_precision="ieee"))
    out = out_ptr + (token * H + head)[:, None] * (R + 2 * F)
    tl.store(out + outputs[None, :], total.to(dtype), mask=live & (outputs < R)[None, :])
    if part == 0:
        pairs = tl.arange(0, BLOCK_F)
        angle = (first_row + token)[:, None] * F + pairs[None, :]
        turned = live & (pairs < F)[None, :]
        cos = tl.load(cos_ptr + angle, mask=turned, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=turned, other=0.0)
        if INTERLEAVED:
            columns = tl.arange(0, 2 * BLOCK_F)[None, :]
            both = load_rows(
                x_ptr, shares_ptr, token[:, None], start + NOPE + columns, live & (columns < 2 * F), tokens,
                X_STRIDE, PARTS, SLOTS, SHARED, dtype,
            )  # fmt: skip
            first, second = tl.split(tl.reshape(both, (TOKENS, BLOCK_F, 2)))
        else:
            columns = start + NOPE + pairs[None, :]
            first = load_rows(
                x_ptr, shares_ptr, token[:, None], columns, turned, tokens,
                X_STRIDE, PARTS, SLOTS, SHARED, dtype,
            )  # fmt: skip
            second = load_rows(
                x_ptr, shares_ptr, token[:, None], columns + F, turned, tokens,
                X_STRIDE, PARTS, SLOTS, SHARED, dtype,
            )  # fmt: skip
        one, other = (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)
        if SCALED:
            one, other = (one.to(tl.float32) * scale).to(dtype), (other.to(tl.float32) * scale).to(dtype)
        store_pairs(out + R, live, one, other, F, TOKENS, BLOCK_F, INTERLEAVED)


def rotate_and_absorb(
    q: Summands, w_uk_t: Matrix, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None
) -> Tensor:
    """See ops/attention.py."""
    if not isinstance(w_uk_t, Tensor):
        check.require("rotate_and_absorb", False, "w_uk_t is packed; on a GPU it must be a tensor")
        raise AssertionError
    heads, rank, nope = w_uk_t.shape
    rows, pairs = q.shape[0], cos.shape[1]
    out = w_uk_t.new_empty(rows, heads, rank + 2 * pairs)
    configuration = absorb_configuration(
        POINTER[w_uk_t.dtype], Layout.of(q), (heads, nope, rank, pairs), interleaved, scale is not None
    )
    launch(
        configuration,
        (divide_up(rows, TOKENS), heads, divide_up(rank, configuration.constants["BLOCK_N"])),
        weight_ptr=w_uk_t.contiguous(),
        cos_ptr=cos.contiguous(),
        sin_ptr=sin.contiguous(),
        out_ptr=out,
        count=rows,
        first_row=cos.shape[0] - rows,
        **({} if scale is None else {"scale_ptr": scale.contiguous()}),
        **arguments(q),
    )
    return out


@kept
def latents_configuration(
    pointers: tuple[str, str],
    layout: Layout,
    sizes: tuple[int, int, int],
    interleaved: bool,
    codes: bool = False,
    static: bool = False,
) -> Configuration:
    """pointers: to norms' weights and to pages, such as "*bf16". sizes: Q, R, and P / 2."""
    width, rank, pairs = sizes
    types = {**layout.types, **dict.fromkeys(("q_weight_ptr", "kv_weight_ptr"), pointers[0])}
    types |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "pages_ptr": pointers[1], "slots_ptr": "*i64"}
    types |= code_types(static) if codes else {"out_ptr": pointers[0]}
    missing = sorted({"out_ptr", "static_ptr", "codes_ptr", "scales_ptr"} - types.keys())
    constants: dict[str, Any] = {**layout.constants, **dict.fromkeys(missing), "Q": width, "R": rank, "F": pairs}
    constants |= {"INTERLEAVED": interleaved, "CODES": codes, "STATIC": static}
    constants |= {f"BLOCK_{name}": triton.next_power_of_2(size) for name, size in zip("QRF", sizes, strict=True)}
    return Configuration(_norm_latents, {**types, "eps": "fp32"}, constants, num_warps=row_warps(width))


@kept
def absorb_configuration(
    pointer: str, layout: Layout, sizes: tuple[int, int, int, int], interleaved: bool, scaled: bool
) -> Configuration:
    """pointer: to weights and results, such as "*bf16". sizes: heads, nope, R, and P / 2."""
    heads, nope, rank, pairs = sizes
    types = {**layout.types, **dict.fromkeys(("weight_ptr", "out_ptr"), pointer)}
    types |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", **({"scale_ptr": "*fp32"} if scaled else {})}
    constants: dict[str, Any] = {**layout.constants, "H": heads, "NOPE": nope, "R": rank, "F": pairs}
    constants |= {} if scaled else {"scale_ptr": None}
    constants |= {"INTERLEAVED": interleaved, "SCALED": scaled, "TOKENS": TOKENS}
    constants |= {"BLOCK_N": min(OUTPUTS, tile_width(rank)), "BLOCK_K": tile_width(nope)}
    constants |= {"BLOCK_F": triton.next_power_of_2(pairs)}
    types |= {"count": "i32", "first_row": "i32"}
    return Configuration(_rotate_and_absorb, types, constants, num_warps=ABSORBING_WARPS)
