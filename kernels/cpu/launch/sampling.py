"""Sampling in C++."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.cpu import abi, native
from cierzo.kernels.cpu.tensors import rows


def add_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor) -> None:
    """See ops/sampling.py."""
    _edit("add_bias", logits, rows, token_ids, bias=bias)


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
    penalties = {"repetition": repetition, "presence": presence, "frequency": frequency}
    _edit("apply_penalties", logits, rows, token_ids, output_counts=output_counts, **penalties)


def mask_tokens(logits: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """See ops/sampling.py."""
    _edit("mask_tokens", logits, rows, token_ids)


def _edit(operation: str, logits: Tensor, at_rows: Tensor, token_ids: Tensor, **values: Tensor) -> None:
    check.require(
        operation, logits.stride(1) == 1, f"logits have strides {logits.stride()}, but are edited in place"
    )
    tensors = {name: tensor.contiguous() for name, tensor in values.items()}
    at_rows, token_ids = at_rows.contiguous(), token_ids.contiguous()
    wrong = ctypes.c_int64()
    args = abi.EditArgs(
        logits.data_ptr(),
        *logits.shape,
        logits.stride(0),
        token_ids.numel(),
        at_rows.data_ptr(),
        token_ids.data_ptr(),
        wrong=ctypes.addressof(wrong),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    native.call(operation, args)
    check.require(operation, wrong.value == 0, f"{wrong.value} entries lie outside logits {list(logits.shape)}")


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
