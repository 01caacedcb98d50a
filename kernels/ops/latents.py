"""Norms, rotations and products of MLA between its first product and attention. Letters as there; F = P/2."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.formats.activations import Rows
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.attention import check_pages
from cierzo.kernels.ops.terms import Summands
from cierzo.kernels.registry import bound


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
    *,
    quantised: bool = False,
    scale: Tensor | None = None,
) -> Rows:
    """rms_norm of the queries' latents -> new [T,Q]; write_normed_latents of the keys', in place.

    x [T,Q+R+P], [query latent | latent | rope key] of each token, or its terms; query_norm [Q], kv_norm [R], one
    dtype; cos, sin fp32 [T,F]; pages and slots as for write_normed_latents. quantised: rms_norm_fp8, by `scale`.
    """
    names = check.sizes(
        "norm_latents",
        x=(x, "T W"),
        query_norm=(query_norm, "Q"),
        kv_norm=(kv_norm, "R"),
        cos=(cos, "T F"),
        sin=(sin, "T F"),
        pages=(pages, "B S *"),
        slots=(slots, "T"),
    )
    width = names["R"] + 2 * names["F"]
    check.require("norm_latents", names["W"] == names["Q"] + width, f"x {list(x.shape)} is not Q+R+P wide")
    check.same_dtype("norm_latents", x=x, query_norm=query_norm, kv_norm=kv_norm)
    check.dtype("norm_latents", torch.float32, cos=cos, sin=sin)
    check.dtype("norm_latents", torch.int64, slots=slots)
    check_pages("norm_latents", width, 2, kv_norm=kv_norm, pages=pages)
    return bound.norm_latents(x, query_norm, kv_norm, eps, cos, sin, interleaved, pages, slots, quantised, scale)


def rotate_and_absorb(
    q: Summands, w_uk_t: Matrix, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None = None
) -> Tensor:
    """apply_rope of each head of q, whose memory may hold anything afterwards; then mla_absorb -> new [T,H,R+P].

    q [T,H(nope+P)] or its terms; w_uk_t [H,R,nope]; one dtype. cos, sin fp32 [N,F] and scale fp32 [N], N >= T:
    those of q's rows are the last T.
    """
    names = check.sizes("rotate_and_absorb", q=(q, "T W"), w_uk_t=(w_uk_t, "H R nope"), cos=(cos, "N F"))
    check.sizes("rotate_and_absorb", cos=(cos, "N F"), sin=(sin, "N F"))
    heads, width = names["H"], names["nope"] + 2 * names["F"]
    check.require("rotate_and_absorb", names["W"] == heads * width, f"q {list(q.shape)} has not {heads} x {width}")
    check.require("rotate_and_absorb", names["T"] <= names["N"], f"{names['T']} rows, {names['N']} of tables")
    check.same_dtype("rotate_and_absorb", q=q, w_uk_t=w_uk_t)
    check.dtype("rotate_and_absorb", torch.float32, cos=cos, sin=sin)
    if scale is not None:
        check.sizes("rotate_and_absorb", scale=(scale, "N"), cos=(cos, "N F"))
        check.dtype("rotate_and_absorb", torch.float32, scale=scale)
    return bound.rotate_and_absorb(q, w_uk_t, cos, sin, interleaved, scale)


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
    *,
    quantised: bool = False,
    scale: Tensor | None = None,
) -> Rows:
    """norm_latents of n down^T, or of its terms -> new [T,Q]; n: add_rms_norm of x and residual, in place, or
    rms_norm of the residual where x is None; in FP8 where `down` takes that.

    x, residual [T,D]; norm_weight [D]; down [Q+R+P,D]; the rest as for norm_latents.
    """
    names = check.sizes(
        "latents_of",
        residual=(residual, "T D"),
        norm_weight=(norm_weight, "D"),
        down=(down, "W D"),
        query_norm=(query_norm, "Q"),
        kv_norm=(kv_norm, "R"),
        cos=(cos, "T F"),
        sin=(sin, "T F"),
        pages=(pages, "B S *"),
        slots=(slots, "T"),
    )
    width = names["R"] + 2 * names["F"]
    check.require("latents_of", names["W"] == names["Q"] + width, f"down {list(down.shape)} is not Q+R+P high")
    if x is not None:
        check.sizes("latents_of", x=(x, "T D"), residual=(residual, "T D"))
        check.same_dtype("latents_of", x=x, down=down, residual=residual)
    check.same_dtype(
        "latents_of", residual=residual, norm_weight=norm_weight, query_norm=query_norm, kv_norm=kv_norm
    )
    check.dtype("latents_of", torch.float32, cos=cos, sin=sin)
    check.dtype("latents_of", torch.int64, slots=slots)
    check_pages("latents_of", width, 2, kv_norm=kv_norm, pages=pages)
    before = (x, residual, norm_weight, norm_eps, down)
    rest = (query_norm, kv_norm, eps, cos, sin, interleaved, pages, slots, quantised, scale)
    return bound.latents_of(*before, *rest)


def absorbed_queries(
    x: Rows,
    query_up: Matrix,
    w_uk_t: Matrix,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    scale: Tensor | None = None,
) -> Tensor:
    """rotate_and_absorb of x query_up^T, or of its terms -> new [T,H,R+P].

    x [T,Q], or as FP8; query_up [H(nope+P),Q]; the rest as for rotate_and_absorb.
    """
    names = check.sizes("absorbed_queries", w_uk_t=(w_uk_t, "H R nope"), cos=(cos, "N F"), sin=(sin, "N F"))
    check.sizes("absorbed_queries", x=(x, "T Q"), query_up=(query_up, "W Q"))
    wanted = names["H"] * (names["nope"] + 2 * names["F"])
    check.require(
        "absorbed_queries", query_up.shape[0] == wanted, f"query_up {list(query_up.shape)}, not [{wanted},Q]"
    )
    check.require("absorbed_queries", x.shape[0] <= names["N"], f"{x.shape[0]} rows, {names['N']} of tables")
    check.same_dtype("absorbed_queries", x=x, query_up=query_up, w_uk_t=w_uk_t)
    check.dtype("absorbed_queries", torch.float32, cos=cos, sin=sin)
    if scale is not None:
        check.sizes("absorbed_queries", scale=(scale, "N"), cos=(cos, "N F"))
        check.dtype("absorbed_queries", torch.float32, scale=scale)
    return bound.absorbed_queries(x, query_up, w_uk_t, cos, sin, interleaved, scale)
