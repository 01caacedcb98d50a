"""Writes into the cache that norm and rotate on the way, in C++."""

from __future__ import annotations

from torch import Tensor

from cierzo.kernels.cpu import abi, native
from cierzo.kernels.cpu.tensors import rows


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
        kv.shape[0],
        norm_weight.shape[0],
        kv.shape[1] - norm_weight.shape[0],
        kv.data_ptr(),
        kv.stride(0),
        norm_weight.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        eps,
        int(interleaved),
        abi.KV_FORMATS[pages.dtype],
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
        qkv.shape[0],
        qkv.shape[1] // width - 2 * kv_heads,
        kv_heads,
        width,
        qkv.data_ptr(),
        qkv.stride(0),
        cos.data_ptr(),
        sin.data_ptr(),
        int(interleaved),
        abi.KV_FORMATS[k_pages.dtype],
        abi.DTYPES[qkv.dtype],
    )
    native.call("rotate_and_write_keys_values", args)
