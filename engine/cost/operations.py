"""Bytes and operations of one call of each operation of kernels/ops, from plain sizes. No msgspec: see __init__.py.

Bytes are those that an operation must read and write: its weights, the cache entries that it reads, the rows that
go in and out, each once. Operations are those of products, a multiplication and an addition being two; what is done
value by value (norms, rotations, sampling) counts for none. Formulas: docs/model.md.

rows: T. pairs: of a query row and a token that it sees. context: tokens whose cache entries are read, each once.
entry_bytes, page_bytes: of a token's cache entry in one layer, of one value of it. format: number format of the
weights. Numbers of rows may be arrays, over several calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels.formats.number_formats import NUMBER_FORMATS

if TYPE_CHECKING:
    from cierzo.engine.cost.device import Kind, Number, Rate

KINDS: dict[str, Kind] = {
    **dict.fromkeys(("expert_mlp", "expert_terms"), "experts"),
    **dict.fromkeys(("mla_decode", "mla_values", "mla_prefill", "gqa_decode", "gqa_prefill"), "attention"),
    **dict.fromkeys(("linear", "lm_head", "gated_mlp", "route", "mla_absorb", "mla_unabsorb"), "products"),
    **dict.fromkeys(("linear_in", "linear_terms", "route_groups"), "products"),
    **dict.fromkeys(("latents_of", "absorbed_queries", "rotate_and_absorb"), "products"),
}
INT64, INT32, FP32 = 8, 4, 4  # bytes


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes and operations that calls of one operation need at least.

    rate: number format of the arithmetic; format: that of the weights or pages; width: of the model's hidden rows.
    replicated_bytes: bytes of
    which each of several cards moves all: attention is divided by sequences, so that the weights around MLA lie on
    every card. (Their rows do not, but weigh next to nothing beside them.)
    """

    operation: str
    num_bytes: Number
    operations: Number = 0
    calls: int = 1
    rate: Rate = "bf16"
    format: str = "bf16"
    replicated_bytes: Number = 0
    width: int = 0

    @property
    def kind(self) -> Kind:
        """The kind of work, for which a device has a stated share of its limits."""
        return KINDS.get(self.operation, "memory")

    def __add__(self, other: Work) -> Work:
        """Add the calls of another work of the same operation."""
        return replace(
            self,
            calls=self.calls + other.calls,
            operations=self.operations + other.operations,
            num_bytes=self.num_bytes + other.num_bytes,
            replicated_bytes=self.replicated_bytes + other.replicated_bytes,
        )


def stored(format: str, rows: Number, width: int) -> Number:
    """Bytes of activations [rows, width], or of a matrix, in a number format, scales included."""
    known = NUMBER_FORMATS[format]
    return rows * (width * known.value_bytes + known.row_bytes)


def random_distinct(experts: int, top_k: int, tokens: Number) -> Number:
    """Expected number of distinct experts that T tokens reach when each picks K of E at random: E (1-(1-K/E)^T)."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


# --- operations without products ---------------------------------------------------------------------------

# Bytes that an operation moves: by the sizes, the rows (of logits one a sequence, of edits one a changed logit) and
# the bytes of a value in the cache.
MOVED: dict[str, Callable[[ModelSizes, Number, int], Number]] = {
    "rope_tables": lambda s, rows, _: rows * (INT64 + s.rotated * FP32),
    "apply_rope": lambda s, rows, _: rows * s.rotated * (2 * (s.heads + s.kv_heads) * s.value_bytes + FP32),
    "write_latents": lambda s, rows, page: rows * s.page_values * (s.value_bytes + page),
    "write_keys_values": lambda s, rows, page: rows * s.page_values * (s.value_bytes + page),
    "write_normed_latents": lambda s, rows, page: (  # the norm's weights, and angles
        rows * (s.page_values * (s.value_bytes + page) + s.rope * FP32) + s.rank * s.value_bytes
    ),
    "norm_latents": lambda s, rows, page: (  # write_normed_latents, beside the queries' latents
        MOVED["write_normed_latents"](s, rows, page) + (2 * rows + 1) * s.query_rank * s.value_bytes
    ),
    "rotate_and_write_keys_values": lambda s, rows, page: (  # queries in place, and angles
        rows * (s.page_values * (s.value_bytes + page) + s.head_dim * (2 * s.heads * s.value_bytes + FP32))
    ),
    "plan": lambda s, rows, _: rows * 3 * INT32,  # of a sequence: where it starts, its length, an item of work
    "group_by_expert": lambda s, rows, _: (2 * rows * s.top_k + s.experts + 1) * INT64,
    "sum_terms": lambda s, rows, _: (
        rows * (s.hidden * (s.top_k + 2) * s.value_bytes + s.top_k * FP32)
    ),  # and shared
    "peaks": lambda s, rows, _: rows * s.vocab * FP32,
    "draw": lambda s, rows, _: rows * s.vocab * FP32,
    "top_tokens": lambda s, rows, _: rows * s.vocab * FP32,
    "log_probabilities": lambda s, rows, _: rows * s.vocab * 2 * FP32,
    "mask_tokens": lambda s, edits, _: edits * (2 * INT64 + FP32),  # its row and token; the logit is not read
    "mask_bits": lambda s, rows, _: rows * (s.vocab * FP32 + -(-s.vocab // 32) * 4 + INT64),  # all may be masked
    "add_bias": lambda s, edits, _: edits * (2 * INT64 + 2 * FP32 + FP32),  # and a bias
    "apply_penalties": lambda s, edits, _: edits * (2 * INT64 + 2 * FP32 + INT64),  # and a count
}


def moved(operation: str, s: ModelSizes, rows: Number, page_bytes: int = 2) -> Work:
    """The work of an operation of MOVED."""
    return Work(operation, MOVED[operation](s, rows, page_bytes))


def norm(s: ModelSizes, rows: Number, *, residual: bool = False, row_bytes: int | None = None) -> Work:
    """A norm of hidden rows; with a residual, that is read and written too. row_bytes: of a normed row."""
    values = s.hidden * s.value_bytes
    read = rows * values * (3 if residual else 1) + values
    return Work("norm", read + rows * (values if row_bytes is None else row_bytes))


# --- products ----------------------------------------------------------------------------------------------


def linear(s: ModelSizes, rows: Number, k: int, n: int, format: str) -> Work:
    """Rows [k] times [n,k]."""
    moved = stored(format, n, k) + rows * (k + n) * s.value_bytes
    return Work("linear", moved, 2 * rows * k * n, replicated_bytes=moved if s.rank else 0)


def lm_head(s: ModelSizes, rows: Number, format: str) -> Work:
    """Logits, in fp32."""
    moved = stored(format, s.vocab, s.hidden) + rows * (s.hidden * s.value_bytes + s.vocab * FP32)
    return Work("lm_head", moved, 2 * rows * s.hidden * s.vocab)


def gated_mlp(s: ModelSizes, rows: Number, format: str) -> Work:
    """Gate and up, then down; what lies between them need not leave the operation."""
    moved = _mlp_bytes(s, s.mlp_width, format) + 2 * rows * s.hidden * s.value_bytes
    return Work("gated_mlp", moved, 6 * rows * s.hidden * s.mlp_width)


def route(s: ModelSizes, rows: Number) -> Work:
    """Scores of the experts; the chosen ones and their weights out. The router is plain."""
    matrix = s.experts * s.hidden
    moved = rows * (s.hidden * s.value_bytes + s.top_k * (INT64 + FP32))
    return Work("route", matrix * s.value_bytes + moved, 2 * rows * matrix)


def expert_mlp(s: ModelSizes, rows: Number, distinct: Number, format: str) -> Work:
    """The MLPs of `distinct` experts that have rows, and the shared ones'."""
    weights = distinct * _mlp_bytes(s, s.expert_width, format) + _mlp_bytes(s, s.shared_width, format)
    multiplied = 3 * s.hidden * (s.top_k * s.expert_width + s.shared_width)
    return Work("expert_mlp", weights + 2 * rows * s.hidden * s.value_bytes, 2 * rows * multiplied)


def _mlp_bytes(s: ModelSizes, width: int, format: str) -> Number:
    return stored(format, 2 * width, s.hidden) + stored(format, s.hidden, width) if width else 0


# --- attention ---------------------------------------------------------------------------------------------


def by_head(operation: str, s: ModelSizes, rows: Number) -> Work:
    """mla_absorb: each head's W_UK, which is plain, multiplied into generated queries. mla_unabsorb: each head's
    sum of latents, multiplied out by W_UV, which is plain."""
    k, n = (s.nope, s.rank) if operation == "mla_absorb" else (s.rank, s.value_dim)
    moved = s.heads * (n * k + rows * (k + n)) * s.value_bytes
    return Work(operation, moved, 2 * rows * s.heads * k * n, replicated_bytes=moved)


def rotate_and_absorb(s: ModelSizes, rows: Number) -> Work:
    """mla_absorb of queries that are rotated, and scaled, on the way."""
    absorbed, angles = by_head("mla_absorb", s, rows), rows * (s.rope + 1) * FP32
    moved = absorbed.num_bytes + angles  # all of which each card moves
    return replace(absorbed, operation="rotate_and_absorb", num_bytes=moved, replicated_bytes=moved)


def latents_of(s: ModelSizes, rows: Number, format: str, page_bytes: int, *, fp8: bool) -> Work:
    """add_rms_norm, MLA's first product and norm_latents, which leaves FP8 codes or values; what lies between them
    need not leave the operation."""
    width = s.query_rank + s.page_values
    before, after = norm(s, rows, residual=True, row_bytes=0), moved("norm_latents", s, rows, page_bytes)
    ends = before.num_bytes + after.num_bytes - rows * width * s.value_bytes
    if fp8:
        ends += stored("fp8", rows, s.query_rank) - rows * s.query_rank * s.value_bytes
    num_bytes = ends + stored(format, width, s.hidden)
    return Work("latents_of", num_bytes, 2 * rows * s.hidden * width, replicated_bytes=num_bytes)


def absorbed_queries(s: ModelSizes, rows: Number, format: str, *, fp8: bool) -> Work:
    """The queries' product, of FP8 codes or of values, and rotate_and_absorb; what lies between them need not leave
    the operation."""
    after, width = rotate_and_absorb(s, rows), s.heads * (s.nope + s.rope)
    read = stored("fp8" if fp8 else "bf16", rows, s.query_rank) + stored(format, width, s.query_rank)
    num_bytes = read + after.num_bytes + rows * s.heads * (s.rope - s.nope) * s.value_bytes
    operations = after.operations + 2 * rows * s.query_rank * width
    return Work("absorbed_queries", num_bytes, operations, replicated_bytes=num_bytes)


def mla_decode(s: ModelSizes, rows: Number, pairs: Number, context: Number, entry_bytes: float) -> Work:
    """Generated rows in absorbed form."""
    width = s.rank + s.rope
    moved = rows * s.heads * (width + s.rank) * s.value_bytes
    return Work("mla_decode", context * entry_bytes + moved, 2 * pairs * s.heads * (width + s.rank))


def mla_values(decoding: Work, s: ModelSizes, rows: Number) -> Work:
    """mla_decode and mla_unabsorb, whose latents stay between them."""
    out = by_head("mla_unabsorb", s, rows)
    moved = decoding.num_bytes + out.num_bytes - 2 * rows * s.heads * s.rank * s.value_bytes
    return replace(
        decoding,
        operation="mla_values",
        num_bytes=moved,
        operations=decoding.operations + out.operations,
        replicated_bytes=out.replicated_bytes,
    )


def mla_prefill(s: ModelSizes, rows: Number, pairs: Number, context: Number, entry_bytes: float) -> Work:
    """Prompt rows in expanded form; each context token's keys and values are multiplied out once."""
    weights = s.heads * (s.nope + s.value_dim) * s.rank * s.value_bytes
    moved = weights + context * entry_bytes + rows * s.heads * (s.nope + s.rope + s.value_dim) * s.value_bytes
    multiplied = pairs * (s.nope + s.rope + s.value_dim) + context * s.rank * (s.nope + s.value_dim)
    return Work("mla_prefill", moved, 2 * s.heads * multiplied, replicated_bytes=weights)


def gqa(s: ModelSizes, rows: Number, pairs: Number, context: Number, entry_bytes: float) -> Work:
    """gqa_decode, gqa_prefill (the step names it)."""
    moved = 2 * rows * s.heads * s.head_dim * s.value_bytes
    return Work("gqa_decode", context * entry_bytes + moved, 4 * pairs * s.heads * s.head_dim)
