"""Every kernel at the sizes of a serving step, beside torch's own, as shares of the card's measured limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cierzo.bench.gpu.cases import BY_FP8, WEIGHTED, make_call
from cierzo.bench.gpu.timing import samples
from cierzo.bench.kernel_cases import Size
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels import registry
from cierzo.kernels.formats.activations import quantise_rows, static_scales, takes_fp8
from cierzo.kernels.formats.definition import as_tensor
from cierzo.kernels.formats.device import DeviceMatrix
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.triton import heuristics

SIZES = (
    *(Size(name=f"decode {n}", sequences=n, rows_each=1, context=4096) for n in (1, 8, 64, 256)),
    Size(name="decode 64, one prefix", sequences=64, rows_each=1, context=4096, shared=3584),
    Size(name="decode 1 of 256k", sequences=1, rows_each=1, context=262_144),
    Size(name="prefill 4096", sequences=1, rows_each=4096, context=4096),
    Size(name="prefill 8192", sequences=1, rows_each=8192, context=8192),
    Size(name="prefill 16384", sequences=1, rows_each=16_384, context=16_384),
)


def measure(
    operation: str,
    model: ModelSizes,
    size: Size,
    format: str,
    device: torch.device,
    limits: Mapping[str, float],
    cold_bytes: int | None = None,
) -> dict[str, Any] | None:
    """us, GB/s, TFLOP/s and share of the limit, ours and torch's; None where the model lacks the operation."""
    call = make_call(operation, model, size, format, device, cold_bytes=cold_bytes)
    if call is None:
        return None
    choice = registry.implementations(operation, "cuda")[0]
    num_bytes, flops = float(call.work.num_bytes), float(call.work.operations)
    found: dict[str, Any] = {"bytes": num_bytes, "flops": flops, "implementation": choice.name}
    rate = limits.get("fp8_tflop_per_s" if format in BY_FP8 else "bf16_tflop_per_s", limits["bf16_tflop_per_s"])
    limit_s = max(num_bytes / limits["copy_gb_per_s"] / 1e9, flops / rate / 1e12)
    times, replayed = samples(choice.load(), call.arguments, device)
    found |= _figures(times, num_bytes, flops, limit_s) | {"replayed": replayed}
    if operation in WEIGHTED and not size.decodes:  # for heuristics.DESCRIBED_TOKENS
        with read_through_descriptors():
            times, replayed = samples(choice.load(), call.arguments, device)
        found["described"] = _figures(times, num_bytes, flops, limit_s) | {"replayed": replayed}
    baseline = None if model.window or model.sinks else BASELINES.get(operation)  # SDPA has no sinks
    if baseline is not None:
        prepared = [baseline(arguments) for arguments in call.arguments[:2]]
        times, replayed = samples(lambda run: run(), [(run,) for run in prepared], device)
        found["torch"] = _figures(times, num_bytes, flops, limit_s) | {"replayed": replayed}
    return found


@contextmanager
def read_through_descriptors() -> Iterator[None]:
    """Products with weights read them so within, whatever the number of tokens."""
    before, heuristics.DESCRIBED_TOKENS = heuristics.DESCRIBED_TOKENS, 0
    try:
        yield
    finally:
        heuristics.DESCRIBED_TOKENS = before


def _figures(times: list[float], num_bytes: float, flops: float, limit_s: float) -> dict[str, Any]:
    ordered = sorted(times)
    seconds = ordered[len(ordered) // 2]
    return {
        "us": seconds * 1e6,
        "samples_us": [sample * 1e6 for sample in times],
        "gb_per_s": num_bytes / seconds / 1e9,
        "tflop_per_s": flops / seconds / 1e12,
        "share": limit_s / seconds,
    }


# --- what torch has for the same ---------------------------------------------------------------------------


def _plain(matrix: Matrix) -> Tensor:
    return as_tensor(matrix)


def _linear(arguments: tuple[Any, ...]) -> Callable[[], Any]:
    """Quantised weights are dequantised in every call, as an engine without kernels for them does."""
    x, weight = arguments
    if takes_fp8(weight):
        return lambda: _scaled(x, weight)
    return lambda: functional.linear(x, _plain(weight).to(x.dtype))


def _scaled(x: Tensor, weight: DeviceMatrix) -> Tensor:
    """torch._scaled_mm, of rows that torch quantises too: a scale for each row of both."""
    rows = quantise_rows(x, static_scales(weight))
    scales = rows.scales[:, None], weight.scales[0].T
    return torch._scaled_mm(rows.codes, weight.codes[0].T, *scales, out_dtype=torch.bfloat16)


def _gated_mlp(arguments: tuple[Any, ...]) -> Callable[[], Any]:
    x, gate_up, down = arguments

    def run() -> Tensor:
        gate, up = _linear((x, gate_up))().chunk(2, dim=-1)
        product: Tensor = _linear((functional.silu(gate) * up, down))()
        return product

    return run


def _expert_mlp(arguments: tuple[Any, ...]) -> Callable[[], Any]:
    """torch._grouped_mm over the grouped rows, then the sum over slots and the shared expert."""
    x, gate_up, down, weights, order, starts, shared_gate_up, shared_down = arguments
    slots = weights.shape[1]
    ends = starts[1:].int()

    def run() -> Tensor:
        rows = x[order // slots]
        first, second = _plain(gate_up).to(x.dtype), _plain(down).to(x.dtype)
        gate, up = torch._grouped_mm(rows, first.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        mixed = torch._grouped_mm(functional.silu(gate) * up, second.transpose(1, 2), offs=ends)
        shares = weights.flatten()[order].to(x.dtype)
        total = torch.zeros_like(x).index_add_(0, order // slots, mixed * shares[:, None])
        return total + _gated_mlp((x, shared_gate_up, shared_down))()

    return run


def _gqa(arguments: tuple[Any, ...]) -> Callable[[], Any]:
    """scaled_dot_product_attention over contexts that lie contiguous already: it has no pages to walk."""
    q, keys, values, queries, scale = arguments
    count = len(queries.contexts)
    k, v = (_gathered(pages, queries).to(q.dtype).transpose(1, 2) for pages in (keys, values))
    rows = q.unflatten(0, (count, -1)).transpose(1, 2)
    causal = rows.shape[2] > 1

    def run() -> Tensor:
        return functional.scaled_dot_product_attention(rows, k, v, is_causal=causal, scale=scale, enable_gqa=True)

    return run


def _mla_decode(arguments: tuple[Any, ...]) -> Callable[[], Any]:
    q, pages, queries, scale, rank = arguments
    keys = _gathered(pages, queries).to(q.dtype)[:, None]
    rows = q.unflatten(0, (len(queries.contexts), -1)).transpose(1, 2)
    heads = rows.shape[1]

    def run() -> Tensor:
        k = keys.expand(-1, heads, -1, -1)
        return functional.scaled_dot_product_attention(rows, k, k[..., :rank], scale=scale)

    return run


def _mla_prefill(arguments: tuple[Any, ...]) -> Callable[[], Any]:
    q, pages, w_uk, w_uv, queries, scale = arguments
    latents = _gathered(pages, queries).to(q.dtype)
    rank = w_uk.shape[2]
    rows = q.unflatten(0, (len(queries.contexts), -1)).transpose(1, 2)

    def run() -> Tensor:
        nope = torch.einsum("bcr,hnr->bhcn", latents[..., :rank], w_uk)
        rope = latents[:, None, :, rank:].expand(-1, w_uk.shape[0], -1, -1)
        values = torch.einsum("bcr,hvr->bhcv", latents[..., :rank], w_uv)
        return functional.scaled_dot_product_attention(
            rows, torch.cat([nope, rope], -1), values, is_causal=True, scale=scale
        )

    return run


def _gathered(pages: Tensor, queries: PagedQueries) -> Tensor:
    """[N, context, ...] of sequences that are equally long."""
    blocks = queries.block_tables[queries.table_rows.long()].long()
    return pages[blocks].flatten(1, 2)


BASELINES: dict[str, Callable[[tuple[Any, ...]], Callable[[], Any]]] = {
    "linear": _linear,
    "lm_head": _linear,
    "gated_mlp": _gated_mlp,
    "expert_mlp": _expert_mlp,
    "gqa_decode": _gqa,
    "gqa_prefill": _gqa,
    "mla_decode": _mla_decode,
    "mla_prefill": _mla_prefill,
}
