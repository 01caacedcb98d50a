"""MLA's latents and absorbed queries in plain torch."""

from __future__ import annotations

from torch import Tensor

from cierzo.kernels.formats.activations import Rows, static_scales, takes_fp8
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.terms import Summands
from cierzo.kernels.ref import attention, linear, norm, rope
from cierzo.kernels.ref.terms import rows_of


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
    """See ops/latents.py."""
    q, kv = rows_of(x).tensor_split((len(query_norm),), dim=1)
    attention.write_normed_latents(pages, slots, kv, kv_norm, eps, cos, sin, interleaved)
    return norm.rms_norm_fp8(q, query_norm, eps, scale) if quantised else norm.rms_norm(q, query_norm, eps)


def rotate_and_absorb(
    q: Summands, w_uk_t: Matrix, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None
) -> Tensor:
    """See ops/latents.py."""
    heads, first = rows_of(q).unflatten(1, (w_uk_t.shape[0], -1)), len(cos) - q.shape[0]
    rope.apply_rope(heads, cos[first:], sin[first:], interleaved, None if scale is None else scale[first:])
    return attention.mla_absorb(heads, w_uk_t)


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
    rest = (query_norm, kv_norm, eps, cos, sin, interleaved, pages, slots)
    fp8, given = takes_fp8(down), (norm_weight, norm_eps)
    normed: Rows
    if x is None:
        normed = (
            norm.rms_norm_fp8(residual, *given, static_scales(down)) if fp8 else norm.rms_norm(residual, *given)
        )
    elif fp8:
        normed = norm.add_rms_norm_fp8(x, residual, *given, static_scales(down))
    else:
        normed = norm.add_rms_norm(x, residual, *given)
    return norm_latents(linear.linear(normed, down), *rest, quantised, scale)


def absorbed_queries(
    x: Rows, query_up: Matrix, w_uk_t: Matrix, cos: Tensor, sin: Tensor, interleaved: bool, scale: Tensor | None
) -> Tensor:
    """See ops/latents.py."""
    return rotate_and_absorb(linear.linear(x, query_up), w_uk_t, cos, sin, interleaved, scale)
