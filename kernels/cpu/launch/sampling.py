"""Sampling in C++."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.cpu import abi, native
from cierzo.kernels.cpu.tensors import rows


def apply_penalties(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """See ops/sampling.py."""
    entries = (rows, token_ids, output_counts)
    tensors = [values.contiguous() for values in (*entries, repetition, presence, frequency)]
    contiguous = logits.stride(1) == 1
    check.require("apply_penalties", contiguous, f"logits are edited in place, but have strides {logits.stride()}")
    wrong = ctypes.c_int64()
    args = abi.PenaltiesArgs(
        logits.data_ptr(),
        *logits.shape,
        logits.stride(0),
        token_ids.numel(),
        *(values.data_ptr() for values in tensors),
        ctypes.addressof(wrong),
    )
    native.call("apply_penalties", args)
    count = wrong.value
    check.require("apply_penalties", count == 0, f"{count} entries lie outside logits {list(logits.shape)}")


def mask_bits(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """See ops/sampling.py."""
    rows, bits = rows.contiguous(), bits.contiguous()
    contiguous = logits.stride(1) == 1
    check.require("mask_bits", contiguous, f"logits are edited in place, but have strides {logits.stride()}")
    wrong = ctypes.c_int64()
    pointers = (rows.data_ptr(), bits.data_ptr(), ctypes.addressof(wrong))
    args = abi.MaskBitsArgs(logits.data_ptr(), *logits.shape, logits.stride(0), rows.numel(), *pointers)
    native.call("mask_bits", args)
    count = wrong.value
    check.require("mask_bits", count == 0, f"{count} rows lie outside logits {list(logits.shape)}")


def peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See ops/sampling.py."""
    logits = rows(logits)
    values = torch.empty(logits.shape[0], dtype=torch.float32)
    ids = torch.empty(logits.shape[0], dtype=torch.int64)
    native.call(
        "peaks",
        abi.PeaksArgs(logits.data_ptr(), *logits.shape, logits.stride(0), values.data_ptr(), ids.data_ptr()),
    )
    return values, ids


def draw(
    logits: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    seeds: Tensor,
    samples: Tensor,
    positions: Tensor,
) -> Tensor:
    """See ops/sampling.py."""
    logits = rows(logits)
    parameters = [
        values.contiguous() for values in (temperatures, top_ks, top_ps, min_ps, seeds, samples, positions)
    ]
    token_ids = torch.empty(logits.shape[0], dtype=torch.int64)
    pointers = [values.data_ptr() for values in (*parameters, token_ids)]
    native.call("draw", abi.DrawArgs(logits.data_ptr(), *logits.shape, logits.stride(0), *pointers))
    return token_ids


def log_probabilities(logits: Tensor) -> Tensor:
    """See ops/sampling.py."""
    logits = rows(logits)
    out = torch.empty(logits.shape, dtype=torch.float32)
    native.call(
        "log_probabilities",
        abi.LogProbabilitiesArgs(logits.data_ptr(), *logits.shape, logits.stride(0), out.data_ptr()),
    )
    return out


def top_tokens(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See ops/sampling.py."""
    scores = rows(scores)
    values = torch.empty((scores.shape[0], count), dtype=torch.float32)
    ids = torch.empty((scores.shape[0], count), dtype=torch.int64)
    args = abi.TopTokensArgs(
        scores.data_ptr(), *scores.shape, scores.stride(0), count, values.data_ptr(), ids.data_ptr()
    )
    native.call("top_tokens", args)
    return values, ids
