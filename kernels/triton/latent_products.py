"""MLA's two products with what follows them, each in one launch of stages (stages.py): few tokens, whose
products are cut along k into parts with programs of their own (linear.py).

    latents_of          norm; parts of the first product; norms of both latents, cache entries (latents.py)
    absorbed_queries    parts of the queries' product; each head's rotation and absorption (latents.py)

The programs of a stage are those of its own launch, with as many warps, and so are the bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.cuda.launch.kernel import divide_up
from cierzo.kernels.formats.activations import Rows, static_scales, takes_fp8
from cierzo.kernels.formats.device import E4M3
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.terms import Summands
from cierzo.kernels.triton.activations import empty_rows, row_warps
from cierzo.kernels.triton.chain import after_others, chained
from cierzo.kernels.triton.heuristics import Parts, Tile, decided, narrow, reading, tile
from cierzo.kernels.triton.latents import (
    ABSORBING_WARPS,
    absorb_configuration,
    absorb_tile,
    latent_row,
    latents_configuration,
    norm_latents,
    rotate_and_absorb,
)
from cierzo.kernels.triton.launch import POINTER, Configuration, kept, launch
from cierzo.kernels.triton.linear import linear_configuration, linear_terms, linear_tile, multiprocessors
from cierzo.kernels.triton.norm import (
    Codes,
    add_and_norm_row,
    add_rms_norm,
    add_rms_norm_fp8,
    norm_configuration,
    norm_warps,
    rms_norm,
    rms_norm_fp8,
)
from cierzo.kernels.triton.paged import require_pages
from cierzo.kernels.triton.product import Weights, pointers, row_stride
from cierzo.kernels.triton.stages import end_of_first, end_of_second, next_place, tickets, wait_for_firsts
from cierzo.kernels.triton.terms import Layout, arguments, form, layout


@dataclass(frozen=True, slots=True)
class Cut:
    """A product that is cut into parts with programs of their own. x: type and stride of its rows."""

    weights: Weights
    tile: Tile
    parts: Parts
    x: tuple[str, int]

    def programs(self, tokens: int) -> int:
        """Programs of a product of so many tokens."""
        tiles = divide_up(tokens, self.tile.block_t) * divide_up(self.weights.rows, self.tile.block_n)
        return tiles * self.parts.count

    @property
    def layout(self) -> Layout:
        """The parts as terms."""
        return Layout("*fp32", self.weights.rows, self.parts.count, 0, False)

    def shape(self, tokens: int) -> tuple[int, int, int]:
        """Shape of the parts [P,T,N]."""
        return self.parts.count, tokens, self.weights.rows

    def configuration(self, kernel: Any, second: Configuration, names: Mapping[str, str]) -> Configuration:
        """The configuration of `kernel`, whose stages are this product and `second`, which reads its parts; names:
        those of the second's arguments that are others in `kernel`."""
        stride = (self.weights.rows, 0)
        first = linear_configuration(
            (self.x[0], "*fp32"), self.weights, self.tile, (self.x[1], 0), stride, cut=self.parts
        )
        types, constants = dict(first.types), dict(first.constants)
        types["parts_ptr"] = types.pop("out_ptr")
        types.pop("static_ptr", None)
        for name, kind in second.types.items():
            if name not in ("x_ptr", "tokens", "count"):
                types[names.get(name, name)] = kind
        for name, value in second.constants.items():
            if name not in ("X_STRIDE", "PARTS", "SLOTS", "SHARED", "shares_ptr"):
                constants[names.get(name, name)] = value
        wanted = inspect.signature(kernel.fn).parameters
        constants = {name: value for name, value in constants.items() if name in wanted and name not in types}
        types["tickets_ptr"] = "*i32"
        warps, stages = self.tile.num_warps, self.tile.num_stages
        return Configuration(kernel, types, constants, num_warps=warps, num_stages=stages)


@chained
def _absorbed_queries(
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, row_scales_ptr, parts_ptr,
    weight_ptr, cos_ptr, sin_ptr, scale_ptr, out_ptr, tickets_ptr, tokens, first_row,
    X_STRIDE: tl.constexpr, PARTS: tl.constexpr, PART_K: tl.constexpr,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS_ON_M: tl.constexpr,
    H: tl.constexpr, NOPE: tl.constexpr, R: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr,
    SCALED: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INNER: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    after_others()
    place = next_place(tickets_ptr)
    tiles = tl.cdiv(ROWS, BLOCK_N) * tl.cdiv(tokens, BLOCK_T)
    firsts = tiles * PARTS
    if place < firsts:
        linear_tile(
            place % tiles, place.to(tl.int64) * 0, place // tiles,
            x_ptr, x_scales_ptr, codes_ptr, scales_ptr, row_scales_ptr, parts_ptr, None, None, tokens,
            X_STRIDE, 0, ROWS, 0, 0, 1, False, PARTS, PART_K, True,
            FORMAT, ROWS, K, ROW_STRIDE, EXPERT_STRIDE, SCALE_N, SCALE_K, BLOCK_N, BLOCK_T, BLOCK_K, TOKENS_ON_M,
            False,
        )  # fmt: skip
        end_of_first(tickets_ptr)
    else:
        wait_for_firsts(tickets_ptr, firsts)
        down = tl.cdiv(tokens, TOKENS)
        place -= firsts
        absorb_tile(
            place % down, place // down % H, place // down // H,
            parts_ptr, None, weight_ptr, cos_ptr, sin_ptr, scale_ptr, out_ptr, tokens, tokens, first_row,
            ROWS, PARTS, 0, False, H, NOPE, R, F, INTERLEAVED, SCALED, TOKENS, OUTPUTS, INNER, BLOCK_F,
        )  # fmt: skip
        end_of_second(tickets_ptr, tl.num_programs(0) - firsts)


@chained
def _latents_of(
    terms_ptr, shares_ptr, residual_ptr, norm_ptr, norm_static_ptr,
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, row_scales_ptr, parts_ptr,
    q_weight_ptr, kv_weight_ptr, cos_ptr, sin_ptr, pages_ptr, slots_ptr,
    out_ptr, static_ptr, out_codes_ptr, out_scales_ptr, tickets_ptr, norm_eps, eps, tokens,
    TERM_STRIDE: tl.constexpr, TERM_PARTS: tl.constexpr, SLOTS: tl.constexpr, SHARED: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr, BLOCK: tl.constexpr, NORM_CODES: tl.constexpr, NORM_STATIC: tl.constexpr,
    X_STRIDE: tl.constexpr, PARTS: tl.constexpr, PART_K: tl.constexpr,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, ROW_STRIDE: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS_ON_M: tl.constexpr,
    Q: tl.constexpr, R: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr, CODES: tl.constexpr,
    STATIC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Without terms x is there, normed, and the launch has the last two stages."""
    after_others()
    place = next_place(tickets_ptr)
    tiles = tl.cdiv(ROWS, BLOCK_N) * tl.cdiv(tokens, BLOCK_T)
    norms = tokens if terms_ptr is not None else tokens * 0
    before = norms + tiles * PARTS
    if place < norms:
        if terms_ptr is not None:
            add_and_norm_row(
                place.to(tl.int64), terms_ptr, shares_ptr, residual_ptr, norm_ptr, x_ptr, norm_static_ptr, x_ptr,
                x_scales_ptr, norm_eps, tokens, TERM_STRIDE, TERM_PARTS, SLOTS, SHARED, RESIDUAL_STRIDE, K, BLOCK,
                NORM_CODES, NORM_STATIC,
            )  # fmt: skip
        end_of_first(tickets_ptr)
    elif place < before:
        if terms_ptr is not None:
            wait_for_firsts(tickets_ptr, norms)
        place -= norms
        linear_tile(
            place % tiles, place.to(tl.int64) * 0, place // tiles,
            x_ptr, x_scales_ptr, codes_ptr, scales_ptr, row_scales_ptr, parts_ptr, None, None, tokens,
            X_STRIDE, 0, ROWS, 0, 0, 1, False, PARTS, PART_K, True,
            FORMAT, ROWS, K, ROW_STRIDE, EXPERT_STRIDE, SCALE_N, SCALE_K, BLOCK_N, BLOCK_T, BLOCK_K, TOKENS_ON_M,
            False,
        )  # fmt: skip
        end_of_first(tickets_ptr)
    else:
        wait_for_firsts(tickets_ptr, before)
        place -= before
        latent_row(
            (place % tokens).to(tl.int64), place < tokens,
            parts_ptr, None, q_weight_ptr, kv_weight_ptr, cos_ptr, sin_ptr, pages_ptr, slots_ptr,
            out_ptr, static_ptr, out_codes_ptr, out_scales_ptr, eps, tokens,
            ROWS, PARTS, 0, False, Q, R, F, INTERLEAVED, CODES, STATIC, BLOCK_Q, BLOCK_R, BLOCK_F,
        )  # fmt: skip
        end_of_second(tickets_ptr, 2 * tokens)


def latents_of(
    x: Summands | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    down: Matrix,
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
    """See ops/latents.py."""
    require_pages("latents_of", pages=pages)
    width, rows, static, fp8 = query_norm.shape[0], residual.shape[0], static_scales(down), takes_fp8(down)
    planned = _latents(
        Weights.of("latents_of", down),
        "" if not fp8 else "by row" if static is None else "static",
        (residual.dtype, residual.shape, residual.stride(0)),
        None if x is None else form(x),
        (query_norm.dtype, pages.dtype),
        (width, kv_norm.shape[0], cos.shape[1]),
        interleaved,
        "" if not quantised else "by row" if scale is None else "static",
        multiprocessors(residual.device),
    )
    before: dict[str, Any] = {}
    if planned is not None and planned.with_norm and x is not None:
        columns = residual.shape[1]
        normed: Rows = empty_rows(residual, rows, columns) if fp8 else residual.new_empty(rows, columns)
        before = {"residual_ptr": residual, "norm_ptr": norm_weight, "norm_eps": norm_eps, **arguments(x)}
        before["terms_ptr"] = before.pop("x_ptr")
        if static is not None:
            before["norm_static_ptr"] = static
    else:
        normed = _normed(x, residual, norm_weight, norm_eps, fp8, static)
    if planned is None:
        rest = (query_norm, kv_norm, eps, cos, sin, interleaved, pages, slots, quantised, scale)
        return norm_latents(linear_terms(normed, down), *rest)
    before["tokens"] = rows
    out: Rows
    if quantised:
        out = empty_rows(query_norm, rows, width)
        before["out_codes_ptr"], before["out_scales_ptr"] = out.codes, out.scales
        if scale is not None:
            before["static_ptr"] = scale
    else:
        before["out_ptr"] = out = query_norm.new_empty(rows, width)
    before |= {"q_weight_ptr": query_norm, "kv_weight_ptr": kv_norm, "pages_ptr": pages, "slots_ptr": slots}
    before |= {"cos_ptr": cos.contiguous(), "sin_ptr": sin.contiguous(), "tickets_ptr": tickets(pages.device)}
    parts = residual.new_empty(*planned.parts, dtype=torch.float32)
    launch(planned.configuration, planned.grid, parts_ptr=parts, eps=eps, **_operands(normed, down), **before)
    return out


@dataclass(frozen=True, slots=True)
class Planned:
    """A launch whose choices are made. parts: their shape [P,T,N]. with_norm: whether the norm is a stage of it."""

    configuration: Configuration
    grid: tuple[int]
    parts: tuple[int, int, int]
    with_norm: bool = False


@decided
def _latents(
    weights: Weights,
    how: Codes,
    residual: tuple[torch.dtype, torch.Size, int],
    terms: tuple[Any, ...] | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    sizes: tuple[int, int, int],
    interleaved: bool,
    written: Codes,
    processors: int,
) -> Planned | None:
    """The launch of `latents_of`, if its stages are in one. how, written: in which form the norms before and after
    the product leave rows. residual: dtype, shape and stride. terms: their form. dtypes: of the latents' norms and
    of pages. sizes: Q, R, and P / 2."""
    dtype, (rows, columns), stride = residual
    cut = _cut(weights, E4M3 if how else dtype, columns, rows, processors)
    if cut is None or cut.tile.num_warps != row_warps(sizes[0]):
        return None
    first: Configuration | None = None
    if terms is not None and cut.tile.num_warps == norm_warps(columns, how):
        first = norm_configuration(POINTER[dtype], columns, layout(*terms), how, stride)
    types = (POINTER[dtypes[0]], POINTER[dtypes[1]])
    configuration = latents_of_configuration(
        cut, first, types, sizes, interleaved, bool(written), written == "static"
    )
    grid = (cut.programs(rows) + (2 if first is None else 3) * rows,)
    return Planned(configuration, grid, cut.shape(rows), first is not None)


def _normed(
    x: Summands | None, residual: Tensor, weight: Tensor, eps: float, fp8: bool, scale: Tensor | None
) -> Rows:
    """The norm in a launch of its own."""
    if x is None:
        return rms_norm_fp8(residual, weight, eps, scale) if fp8 else rms_norm(residual, weight, eps)
    if fp8:
        return add_rms_norm_fp8(x, residual, weight, eps, scale)
    return add_rms_norm(x, residual, weight, eps)


OWN = {"codes_ptr": "out_codes_ptr", "scales_ptr": "out_scales_ptr"}  # codes that norm_latents writes


BEFORE = {  # what add_rms_norm's arguments are called beside the others
    "x_ptr": "terms_ptr",
    "weight_ptr": "norm_ptr",
    "static_ptr": "norm_static_ptr",
    "eps": "norm_eps",
    "X_STRIDE": "TERM_STRIDE",
    "PARTS": "TERM_PARTS",
    "CODES": "NORM_CODES",
    "STATIC": "NORM_STATIC",
}


@kept
def latents_of_configuration(
    cut: Cut,
    first: Configuration | None,
    pointers_of: tuple[str, str],
    sizes: tuple[int, int, int],
    interleaved: bool,
    codes: bool,
    static: bool,
) -> Configuration:
    """first: add_rms_norm's, if its stage is there. pointers_of: to norms' weights and to pages. sizes: Q, R, and
    P / 2."""
    second = latents_configuration(pointers_of, cut.layout, sizes, interleaved, codes, static)
    found = cut.configuration(_latents_of, second, OWN)
    types, constants = dict(found.types), dict(found.constants)
    written = ("out_ptr", "codes_ptr", "scales_ptr", "D", "tokens")  # x, and what `cut` says
    missing = ("terms_ptr", "shares_ptr", "residual_ptr", "norm_ptr", "norm_static_ptr", "norm_eps")
    constants |= dict.fromkeys((*missing, *BEFORE.values(), "SLOTS", "SHARED", "RESIDUAL_STRIDE", "BLOCK"))
    if first is not None:
        types |= {BEFORE.get(name, name): kind for name, kind in first.types.items() if name not in written}
        constants |= {BEFORE.get(name, name): one for name, one in first.constants.items() if name not in written}
    constants = {name: value for name, value in constants.items() if name not in types}
    return replace(found, types=types, constants=constants)


def absorbed_queries(
    x: Rows, query_up: Matrix, w_uk_t: Matrix, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None
) -> Tensor:
    """See ops/latents.py."""
    if not isinstance(w_uk_t, Tensor):
        check.require("absorbed_queries", False, "w_uk_t is packed; on a GPU it must be a tensor")
        raise AssertionError
    scaled = scale is not None
    planned = None
    if not (isinstance(x, Tensor) and takes_fp8(query_up)):  # else rows that are to be quantised first
        codes = x if isinstance(x, Tensor) else x.codes
        planned = _queries(
            Weights.of("absorbed_queries", query_up),
            (codes.dtype, row_stride("absorbed_queries", "x", codes), codes.shape[0]),
            (w_uk_t.dtype, w_uk_t.shape, cos.shape[1]),
            interleaved,
            scaled,
            multiprocessors(codes.device),
        )
    if planned is None:
        return rotate_and_absorb(linear_terms(x, query_up), w_uk_t, cos, sin, interleaved, scale)
    (heads, rank, _), rows, pairs = w_uk_t.shape, x.shape[0], cos.shape[1]
    out = w_uk_t.new_empty(rows, heads, rank + 2 * pairs)
    launch(
        planned.configuration,
        planned.grid,
        **_operands(x, query_up),
        parts_ptr=w_uk_t.new_empty(*planned.parts, dtype=torch.float32),
        weight_ptr=w_uk_t.contiguous(),
        cos_ptr=cos.contiguous(),
        sin_ptr=sin.contiguous(),
        out_ptr=out,
        tickets_ptr=tickets(out.device),
        tokens=rows,
        first_row=cos.shape[0] - rows,
        **({} if scale is None else {"scale_ptr": scale.contiguous()}),
    )
    return out


@decided
def _queries(
    weights: Weights,
    x: tuple[torch.dtype, int, int],
    absorbing: tuple[torch.dtype, torch.Size, int],
    interleaved: bool,
    scaled: bool,
    processors: int,
) -> Planned | None:
    """The launch of `absorbed_queries`, if its stages are in one. x: dtype, stride and number of rows. absorbing:
    dtype and shape of W_UK, and P / 2."""
    dtype, stride, rows = x
    cut = _cut(weights, dtype, stride, rows, processors)
    if cut is None or cut.tile.num_warps != ABSORBING_WARPS:
        return None
    of, (heads, rank, nope), pairs = absorbing
    configuration = queries_configuration(cut, POINTER[of], (heads, nope, rank, pairs), interleaved, scaled)
    known = configuration.constants
    seconds = divide_up(rows, known["TOKENS"]) * heads * divide_up(rank, known["OUTPUTS"])
    return Planned(configuration, (cut.programs(rows) + seconds,), cut.shape(rows))


@kept
def queries_configuration(
    cut: Cut, pointer: str, sizes: tuple[int, int, int, int], interleaved: bool, scaled: bool
) -> Configuration:
    """pointer: to W_UK and results. sizes: heads, nope, R, and P / 2."""
    second = absorb_configuration(pointer, cut.layout, sizes, interleaved, scaled)
    own = {"BLOCK_N": "OUTPUTS", "BLOCK_K": "INNER"}
    return cut.configuration(_absorbed_queries, second, own)


def _cut(weights: Weights, dtype: torch.dtype, stride: int, tokens: int, processors: int) -> Cut | None:
    """How a product is cut, if each part has programs of its own and x is read as it is. dtype, stride: of rows."""
    pointer = POINTER[dtype]
    chosen, parts = narrow(weights, tile(weights, pointer, False, tokens), tokens, processors)
    if not parts.apart or tokens == 0 or reading(chosen, weights, tokens, stride * dtype.itemsize).described:
        return None
    return Cut(weights, chosen, parts, (pointer, stride))


def _operands(x: Rows, matrix: Matrix) -> dict[str, Tensor]:
    """Arguments for the rows and the weights of a product."""
    found = {"x_ptr": x} if isinstance(x, Tensor) else {"x_ptr": x.codes, "x_scales_ptr": x.scales}
    return found | pointers(matrix, described=False)
