"""What a native operation must read and compute, from its arguments: the yardstick of its time.

Bytes are those of the weights and cached rows that it touches, each once, and of the rows that go in and out;
operations count a multiplication and an addition as two. What an implementation does beyond that is its own cost.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cierzo.kernels.cpu import abi

VALUE_BYTES = {0: 4, 1: 2}  # of an abi dtype
Work = tuple[float, float]  # operations, bytes


def work(operation: str, args: Any) -> Work:
    """(operations, bytes) of one call; (0, 0) for an operation that has no entry below."""
    rule = _RULES.get(operation)
    return rule(args) if rule is not None else (0.0, 0.0)


def matrix_rows(address: int) -> int:
    """n of the matrix [n,k] at an address of a call's arguments."""
    return int(_matrix(address).n)


def _matrix(address: int) -> abi.Matrix:
    return abi.Matrix.from_address(address)


def _product(rows: int, address: int, value_bytes: int) -> Work:
    weight = _matrix(address)
    moved = weight.expert_bytes + rows * (weight.k + weight.n) * value_bytes
    return 2.0 * rows * weight.n * weight.k, float(moved)


def _linear(args: Any) -> Work:
    return _product(args.rows, args.weight, VALUE_BYTES[args.dtype])


def _gated(args: Any) -> Work:
    return _sum(_product(args.rows, matrix, VALUE_BYTES[args.dtype]) for matrix in (args.gate_up, args.down))


def _experts(args: Any) -> Work:
    """Each expert that has rows, once."""
    counts = np.diff(_array(args.starts, _matrix(args.gate_up).experts + 1, ctypes.c_int64))
    value_bytes = VALUE_BYTES[args.dtype]
    groups = [(int(rows), args.gate_up, args.down) for rows in counts[counts > 0]]
    if args.shared_gate_up:
        groups.append((args.rows, args.shared_gate_up, args.shared_down))
    return _sum(_product(rows, matrix, value_bytes) for rows, *both in groups for matrix in both)


def _contexts(paged: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """(query rows, context) of every segment."""
    starts = _array(paged.query_starts, paged.segments + 1, ctypes.c_int32)
    return np.diff(starts).astype(np.int64), _array(paged.context_lengths, paged.segments, ctypes.c_int32)


def _pairs(paged: Any) -> tuple[float, float]:
    """(query-key pairs under the causal mask, context tokens that are read)."""
    lengths, contexts = _contexts(paged)
    visible = lengths * contexts - lengths * (lengths - 1) // 2
    return float(visible.sum()), float(contexts[lengths > 0].sum())


def _row_bytes(kv_format: int, values: int, scales: int) -> int:
    return values + 4 * scales if kv_format == 2 else values * (4 if kv_format == 0 else 2)


def _mla_decode(args: Any) -> Work:
    pairs, tokens = _pairs(args.paged)
    width = args.rank + args.rope
    return 2 * pairs * args.heads * (width + args.rank), tokens * _row_bytes(args.kv_format, width, 2)


def _mla_prefill(args: Any) -> Work:
    """The expansion of every context token counts once a call."""
    pairs, tokens = _pairs(args.paged)
    per_pair = args.nope + args.rope + args.value_width
    expansion = tokens * args.rank * (args.nope + args.value_width)
    row_bytes = _row_bytes(args.kv_format, args.rank + args.rope, 2)
    return 2 * args.heads * (pairs * per_pair + expansion), tokens * row_bytes


def _gqa(args: Any) -> Work:
    pairs, tokens = _pairs(args.paged)
    row_bytes = 2 * args.kv_heads * _row_bytes(args.kv_format, args.width, 1)
    return 4 * pairs * args.query_heads * args.width, tokens * row_bytes


def _by_head(args: Any) -> Work:
    weight = _matrix(args.w_uk if hasattr(args, "w_uk") else args.w_uv)
    return 2.0 * args.rows * weight.experts * weight.n * weight.k, float(weight.experts * weight.expert_bytes)


def _route(args: Any) -> Work:
    return _product(args.rows, args.weight, VALUE_BYTES[args.dtype])


def _norm(args: Any) -> Work:
    passes = 4 if args.residual else 2
    return 4.0 * args.rows * args.width, float(passes * args.rows * args.width * VALUE_BYTES[args.dtype])


def _peaks(args: Any) -> Work:
    return float(args.rows * args.vocab), 4.0 * args.rows * args.vocab


def _array(address: int, count: int, kind: Any) -> NDArray[Any]:
    return np.ctypeslib.as_array((kind * count).from_address(address))


def _sum(parts: Any) -> Work:
    found = list(parts)
    return sum(part[0] for part in found), sum(part[1] for part in found)


_RULES: dict[str, Callable[[Any], Work]] = {
    "norm": _norm,
    "linear": _linear,
    "gated_mlp": _gated,
    "route": _route,
    "expert_mlp": _experts,
    "mla_absorb": _by_head,
    "mla_unabsorb": _by_head,
    "mla_decode": _mla_decode,
    "mla_prefill": _mla_prefill,
    "gqa_decode": _gqa,
    "gqa_prefill": _gqa,
    "peaks": _peaks,
}
