"""Attention over paged memory in C++, and the writes into it."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.cpu import abi, native
from cierzo.kernels.cpu.tensors import NativeMatrix, kv_format, packed_for, rows
from cierzo.kernels.formats.packed import PLAIN_FORMATS, Matrix
from cierzo.kernels.ops.attention import PagedQueries


def write_latents(pages: Tensor, slots: Tensor, latents: Tensor, rope_keys: Tensor) -> None:
    """See ops/attention.py."""
    latents, rope_keys, slots = rows(latents), rows(rope_keys), slots.contiguous()
    args = abi.WriteLatentsArgs(
        pages.data_ptr(),
        slots.data_ptr(),
        slots.shape[0],
        latents.shape[1],
        rope_keys.shape[1],
        latents.data_ptr(),
        latents.stride(0),
        rope_keys.data_ptr(),
        rope_keys.stride(0),
        kv_format(pages),
        abi.DTYPES[latents.dtype],
    )
    native.call("write_latents", args)


def write_keys_values(k_pages: Tensor, v_pages: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """See ops/attention.py."""
    keys, values, slots = keys.flatten(1), values.flatten(1), slots.contiguous()
    keys, values = rows(keys), rows(values)
    args = abi.WriteKeysValuesArgs(
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        slots.data_ptr(),
        slots.shape[0],
        k_pages.shape[2],
        keys.shape[1] // k_pages.shape[2],
        keys.data_ptr(),
        values.data_ptr(),
        keys.stride(0),
        values.stride(0),
        kv_format(k_pages),
        abi.DTYPES[keys.dtype],
    )
    native.call("write_keys_values", args)


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
    kv, norm_weight, slots = rows(kv), norm_weight.contiguous(), slots.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    args = abi.WriteNormedLatentsArgs(
        pages.data_ptr(),
        slots.data_ptr(),
        slots.shape[0],
        norm_weight.shape[0],
        2 * cos.shape[1],
        kv.data_ptr(),
        kv.stride(0),
        norm_weight.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        eps,
        interleaved,
        kv_format(pages),
        abi.DTYPES[kv.dtype],
    )
    native.call("write_normed_latents", args)


def rotate_and_write_keys_values(
    k_pages: Tensor, v_pages: Tensor, slots: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> None:
    """See ops/attention.py."""
    slots, cos, sin = slots.contiguous(), cos.contiguous(), sin.contiguous()
    width, kv_heads = 2 * cos.shape[1], k_pages.shape[2]
    args = abi.RotateAndWriteArgs(
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        slots.data_ptr(),
        slots.shape[0],
        qkv.shape[1] // width - 2 * kv_heads,
        kv_heads,
        width,
        qkv.data_ptr(),
        qkv.stride(0),
        cos.data_ptr(),
        sin.data_ptr(),
        interleaved,
        kv_format(k_pages),
        abi.DTYPES[qkv.dtype],
    )
    native.call("rotate_and_write_keys_values", args)


def mla_absorb(q: Tensor, w_uk_t: Matrix) -> Tensor:
    """See ops/attention.py."""
    weight = packed_for("mla_absorb", w_uk_t)
    heads, rank, nope = weight.shape
    q = q if q.stride(2) == 1 and q.stride(1) == q.shape[2] else q.contiguous()
    rope = q.shape[2] - nope
    out = torch.empty(q.shape[0], heads, rank + rope, dtype=q.dtype)
    args = abi.MlaAbsorbArgs(
        q.data_ptr(),
        q.shape[0],
        q.stride(0),
        nope,
        rope,
        weight.address,
        out.data_ptr(),
        abi.DTYPES[q.dtype],
    )
    native.call("mla_absorb", args)
    return out


def mla_unabsorb(latents: Tensor, w_uv: Matrix) -> Tensor:
    """See ops/attention.py."""
    weight, latents = packed_for("mla_unabsorb", w_uv), rows(latents)
    out = torch.empty(*latents.shape[:2], weight.shape[1], dtype=latents.dtype)
    args = abi.MlaUnabsorbArgs(
        latents.data_ptr(),
        latents.shape[0],
        latents.stride(0),
        latents.stride(1),
        weight.address,
        out.data_ptr(),
        abi.DTYPES[latents.dtype],
    )
    native.call("mla_unabsorb", args)
    return out


def mla_decode(q: Tensor, pages: Tensor, queries: PagedQueries, scale: float, rank: int) -> Tensor:
    """See ops/attention.py."""
    q = rows(q)
    num_rows, heads, width = q.shape
    out = torch.empty(num_rows, heads, rank, dtype=q.dtype)
    paged, _alive = paged_args(queries, pages.shape[1], num_rows)
    args = abi.MlaDecodeArgs(
        q.data_ptr(),
        heads,
        rank,
        width - rank,
        q.stride(0),
        q.stride(1),
        pages.data_ptr(),
        paged,
        out.data_ptr(),
        scale,
        kv_format(pages),
        abi.DTYPES[q.dtype],
    )
    native.call("mla_decode", args)
    return out


def mla_prefill(
    q: Tensor, pages: Tensor, w_uk: Matrix, w_uv: Matrix, queries: PagedQueries, scale: float
) -> Tensor:
    """See ops/attention.py."""
    q, keys, values = rows(q), _expander("w_uk", w_uk), _expander("w_uv", w_uv)
    heads, nope, rank = keys.shape
    value_width = values.shape[1]
    out = torch.empty(q.shape[0], heads, value_width, dtype=q.dtype)
    paged, _alive = paged_args(queries, pages.shape[1], q.shape[0])
    args = abi.MlaPrefillArgs(
        q.data_ptr(),
        heads,
        rank,
        q.shape[2] - nope,
        nope,
        value_width,
        q.stride(0),
        q.stride(1),
        pages.data_ptr(),
        keys.address,
        values.address,
        paged,
        out.data_ptr(),
        scale,
        kv_format(pages),
        abi.DTYPES[q.dtype],
    )
    native.call("mla_prefill", args)
    return out


def _expander(name: str, weight: Matrix) -> NativeMatrix:
    """The packed matrix that makes keys or values from latents; it must be in their number format."""
    packed = packed_for("mla_prefill", weight)
    format = PLAIN_FORMATS[packed.dtype]
    check.require("mla_prefill", packed.format == format, f"{name} must be packed as {format}, is {packed.format}")
    return packed


def gqa_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    queries: PagedQueries,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See ops/attention.py. No window, no sinks."""
    _require_plain("gqa_prefill", window, sinks)
    return _gqa("gqa_prefill", q, k_pages, v_pages, queries, scale)


def gqa_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    queries: PagedQueries,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See ops/attention.py. No window, no sinks."""
    _require_plain("gqa_decode", window, sinks)
    return _gqa("gqa_decode", q, k_pages, v_pages, queries, scale)


def _require_plain(operation: str, window: int | None, sinks: Tensor | None) -> None:
    given = f"window {window}" if window is not None else "sinks"
    check.require(
        operation,
        window is None and sinks is None,
        f"{given} given, and the C++ kernel has none: choose the implementation torch for {operation}",
    )


def _gqa(
    operation: str, q: Tensor, k_pages: Tensor, v_pages: Tensor, queries: PagedQueries, scale: float
) -> Tensor:
    q = rows(q)
    out = torch.empty(q.shape, dtype=q.dtype)
    paged, _alive = paged_args(queries, k_pages.shape[1], q.shape[0])
    args = abi.GqaArgs(
        q.data_ptr(),
        q.shape[1],
        k_pages.shape[2],
        q.shape[2],
        q.stride(0),
        q.stride(1),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        paged,
        out.data_ptr(),
        scale,
        kv_format(k_pages),
        abi.DTYPES[q.dtype],
    )
    native.call(operation, args)
    return out


def paged_args(queries: PagedQueries, block_tokens: int, num_rows: int) -> tuple[abi.PagedArgs, list[Tensor]]:
    """The segments as the kernels take them, and the tensors that must live as long."""
    tensors = [
        tensor.contiguous()
        for tensor in (queries.query_starts, queries.context_lengths, queries.table_rows, queries.block_tables)
    ]
    addresses = (tensor.data_ptr() for tensor in tensors)
    stride = tensors[-1].stride(0)
    return abi.PagedArgs(*addresses, len(queries.query_lengths), stride, block_tokens, num_rows), tensors
