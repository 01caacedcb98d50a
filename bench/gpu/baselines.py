"""Functions of torch for the same as our kernels, made from the arguments of an operation.

Whatever such a function needs in another form than ours, such as contexts that lie contiguous, is made beforehand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from cierzo.kernels.formats.activations import quantise_rows, static_scales
from cierzo.kernels.formats.definition import as_tensor
from cierzo.kernels.formats.device import DeviceMatrix
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.attention import PagedQueries

Baseline = Callable[[], Tensor]


def _product(x: Tensor, weight: Matrix) -> Tensor:
    """Quantised weights are dequantised in every call, as an engine without kernels for them does; those that meet
    activations in FP8 go to torch._scaled_mm, with rows that torch quantises too: a scale for each row of both."""
    if not isinstance(weight, DeviceMatrix) or weight.activations != "fp8":
        return functional.linear(x, as_tensor(weight).to(x.dtype))
    rows, codes = quantise_rows(x, static_scales(weight)), weight.codes[0].T
    scales = weight.scales[0].repeat_interleave(weight.block[0], 0).T
    return torch._scaled_mm(rows.codes, codes, rows.scales[:, None], scales, out_dtype=torch.bfloat16)


def _linear(x: Tensor, weight: Matrix) -> Baseline:
    return lambda: _product(x, weight)


def _gated_mlp(x: Tensor, gate_up: Matrix, down: Matrix) -> Baseline:
    def run() -> Tensor:
        gate, up = _product(x, gate_up).chunk(2, dim=-1)
        return _product(functional.silu(gate) * up, down)

    return run


def _expert_mlp(
    x: Tensor, gate_up: Matrix, down: Matrix, weights: Tensor, order: Tensor, starts: Tensor, *shared: Matrix
) -> Baseline:
    """torch._grouped_mm over the grouped rows, then the sum over slots and the shared expert."""
    ends, of_shared = starts[1:].int(), _gated_mlp(x, *shared)

    def run() -> Tensor:
        tokens = order // weights.shape[1]
        first, second = (as_tensor(matrix).to(x.dtype).transpose(1, 2) for matrix in (gate_up, down))
        gate, up = torch._grouped_mm(x[tokens], first, offs=ends).chunk(2, dim=-1)
        mixed = torch._grouped_mm(functional.silu(gate) * up, second, offs=ends)
        shares = weights.flatten()[order].to(x.dtype)
        return torch.zeros_like(x).index_add_(0, tokens, mixed * shares[:, None]) + of_shared()

    return run


def _gathered(q: Tensor, queries: PagedQueries, *pages: Tensor) -> list[Tensor]:
    """Queries [N, heads, rows, width], and the pages of each context in a row [N, context, ...]: torch's attention
    has no pages to walk. All contexts are equally long."""
    blocks = queries.block_tables[queries.table_rows.long()].long()
    rows = q.unflatten(0, (len(queries.contexts), -1)).transpose(1, 2)
    return [rows, *(one[blocks].flatten(1, 2).to(q.dtype) for one in pages)]


def _gqa(q: Tensor, keys: Tensor, values: Tensor, queries: PagedQueries, scale: float) -> Baseline:
    rows, *pages = _gathered(q, queries, keys, values)
    k, v = (one.transpose(1, 2) for one in pages)
    return lambda: functional.scaled_dot_product_attention(
        rows, k, v, is_causal=rows.shape[2] > 1, scale=scale, enable_gqa=True
    )


def _mla_decode(q: Tensor, pages: Tensor, queries: PagedQueries, scale: float, rank: int) -> Baseline:
    rows, latents = _gathered(q, queries, pages)
    keys = latents[:, None].expand(-1, rows.shape[1], -1, -1)
    return lambda: functional.scaled_dot_product_attention(rows, keys, keys[..., :rank], scale=scale)


def _mla_prefill(
    q: Tensor, pages: Tensor, w_uk: Tensor, w_uv: Tensor, queries: PagedQueries, scale: float
) -> Baseline:
    rows, found = _gathered(q, queries, pages)
    latents, rope = found.split([w_uk.shape[2], found.shape[-1] - w_uk.shape[2]], -1)

    def run() -> Tensor:
        keys, values = (torch.einsum("bcr,hnr->bhcn", latents, matrix) for matrix in (w_uk, w_uv))
        keys = torch.cat([keys, rope[:, None].expand(-1, w_uk.shape[0], -1, -1)], -1)
        return functional.scaled_dot_product_attention(rows, keys, values, is_causal=True, scale=scale)

    return run


BASELINES: dict[str, Callable[..., Baseline]] = {
    "linear": _linear,
    "lm_head": _linear,
    "gated_mlp": _gated_mlp,
    "expert_mlp": _expert_mlp,
    "gqa_decode": _gqa,
    "gqa_prefill": _gqa,
    "mla_decode": _mla_decode,
    "mla_prefill": _mla_prefill,
}
