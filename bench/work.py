"""Work of a native operation, from its arguments: the yardstick of its time (engine/cost/operations.py)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cierzo.engine.cost import operations
from cierzo.engine.cost.operations import Work
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels.cpu import abi

VALUE_BYTES = {0: 4, 1: 2}  # of an abi dtype
PAGE_BYTES = {0: 4, 1: 2, 2: 1}  # of an abi kv_format, whose last has scales
FORMATS = {number: name for name, number in abi.FORMATS.items()}


def work(operation: str, args: Any) -> Work:
    """The work of one call; none for an operation that has no entry below."""
    rule = _RULES.get(operation)
    return rule(args) if rule is not None else Work(operation, 0)


def matrix_rows(address: int) -> int:
    """n of the matrix [n,k] at an address of a call's arguments."""
    return int(_matrix(address).n)


def _matrix(address: int) -> abi.Matrix:
    return abi.Matrix.from_address(address)


def _sizes(args: Any, **sizes: Any) -> ModelSizes:
    return ModelSizes(value_bytes=VALUE_BYTES[args.dtype], **sizes)


def _linear(args: Any) -> Work:
    weight = _matrix(args.weight)
    written = weight.n * VALUE_BYTES[args.out_dtype]
    return operations.linear(_sizes(args), args.rows, weight.k, weight.n, FORMATS[weight.format], written=written)


def _gated_mlp(args: Any) -> Work:
    down = _matrix(args.down)
    return operations.gated_mlp(_sizes(args, hidden=down.n, mlp_width=down.k), args.rows, FORMATS[down.format])


def _route(args: Any) -> Work:
    weight = _matrix(args.weight)
    return operations.route(_sizes(args, hidden=weight.k, experts=weight.n, top_k=args.top_k), args.rows)


def _expert_mlp(args: Any) -> Work:
    down = _matrix(args.down)
    shared_width = _matrix(args.shared_down).k if args.shared_down else 0
    sizes = _sizes(args, hidden=down.n, expert_width=down.k, top_k=args.slots, shared_width=shared_width)
    distinct = np.count_nonzero(np.diff(_array(args.starts, down.experts + 1, ctypes.c_int64)))
    return operations.expert_mlp(sizes, args.rows, int(distinct), FORMATS[down.format])


def _mla_absorb(args: Any) -> Work:
    w_uk = _matrix(args.w_uk)
    return operations.mla_absorb(_sizes(args, heads=w_uk.experts, nope=w_uk.k, rank=w_uk.n), args.rows)


def _mla_unabsorb(args: Any) -> Work:
    w_uv = _matrix(args.w_uv)
    return operations.mla_unabsorb(_sizes(args, heads=w_uv.experts, rank=w_uv.k, value_dim=w_uv.n), args.rows)


def _attention(args: Any, count: Callable[..., Work], scales: int, **sizes: int) -> Work:
    """scales: of a token's cache entry in INT8."""
    s = _sizes(args, **sizes)
    entry_bytes = PAGE_BYTES[args.kv_format] * s.page_values + (4 * scales if args.kv_format == 2 else 0)
    return count(s, *_queries(args.paged), entry_bytes)


def _gqa(args: Any) -> Work:
    sizes = {"heads": args.query_heads, "kv_heads": args.kv_heads, "head_dim": args.width}
    return _attention(args, operations.gqa, 2 * args.kv_heads, **sizes)


def _queries(paged: Any) -> tuple[int, int, int]:
    """(query rows, pairs under the causal mask, context tokens that are read)."""
    lengths = np.diff(_array(paged.query_starts, paged.segments + 1, ctypes.c_int32)).astype(np.int64)
    contexts = _array(paged.context_lengths, paged.segments, ctypes.c_int32)
    visible = lengths * contexts - lengths * (lengths - 1) // 2
    return int(lengths.sum()), int(visible.sum()), int(contexts[lengths > 0].sum())


def _array(address: int, count: int, kind: Any) -> NDArray[Any]:
    return np.ctypeslib.as_array((kind * count).from_address(address))


_RULES: dict[str, Callable[[Any], Work]] = {
    "norm": lambda args: operations.norm(_sizes(args, hidden=args.width), args.rows, residual=bool(args.residual)),
    "linear": _linear,
    "gated_mlp": _gated_mlp,
    "route": _route,
    "expert_mlp": _expert_mlp,
    "mla_absorb": _mla_absorb,
    "mla_unabsorb": _mla_unabsorb,
    "mla_decode": lambda a: _attention(a, operations.mla_decode, 2, heads=a.heads, rank=a.rank, rope=a.rope),
    "mla_prefill": lambda a: _attention(
        a,
        operations.mla_prefill,
        2,
        heads=a.heads,
        rank=a.rank,
        rope=a.rope,
        nope=a.nope,
        value_dim=a.value_width,
    ),
    "gqa_decode": _gqa,
    "gqa_prefill": _gqa,
    "peaks": lambda args: operations.moved("peaks", ModelSizes(vocab=args.vocab), args.rows),
}
