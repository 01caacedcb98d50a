"""Cases of attention, of the writes into its pages, and of the blocks of a layer; see kernel_cases.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cierzo.bench.kernel_cases import (
    VALUE_BYTES,
    Call,
    Maker,
    Model,
    Size,
    case,
    expert_bytes,
    tables,
    weight_bytes,
)
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ops.block import (
    DecoderWeights,
    GqaWeights,
    MlaWeights,
    MlpWeights,
    MoeWeights,
    PositionTables,
    StepRows,
)

BLOCK_TOKENS = 32
EPS = 1e-6
TOKENS = 32  # of the vocabulary of a decoder without a head to speak of


def queries_of(size: Size, rows_each: int) -> PagedQueries:
    """Scattered blocks, those of a prefix the first sequence's; the last `rows_each` tokens of each ask."""
    blocks = size.context // BLOCK_TOKENS
    ids = torch.randperm(size.sequences * blocks, generator=torch.Generator().manual_seed(0)).view(-1, blocks)
    ids[:, : size.shared // BLOCK_TOKENS] = ids[0, : size.shared // BLOCK_TOKENS].clone()
    count = size.sequences if rows_each else 0
    return PagedQueries.of([rows_each] * count, [size.context] * count, list(range(count)), ids.int())


def slots_of(size: Size) -> Tensor:
    """Cache slots of the step's rows, the last ones of each context."""
    tables = queries_of(size, size.rows_each).block_tables.long()
    positions = torch.arange(size.context - size.rows_each, size.context)
    return (tables[:, positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS).flatten()


def pages_of(size: Size, make: Maker, *entry: int) -> Tensor:
    """[B,S,...]: all contexts."""
    return make.pages(size.sequences * size.context // BLOCK_TOKENS, BLOCK_TOKENS, *entry)


def pairs_seen(size: Size, window: int = 0) -> int:
    """(query, key) pairs under the causal mask, and that of a window."""
    seen = range(size.context - size.rows_each + 1, size.context + 1)
    return size.sequences * sum(min(tokens, window) if window else tokens for tokens in seen)


# --- writes ------------------------------------------------------------------------------------------------


@case
def write_latents(model: Model, size: Size, make: Maker) -> Call | None:
    """The step's latents."""
    if not model.rank:
        return None
    latents, keys = make.noise(size.rows, model.rank), make.noise(size.rows, model.rope)
    pages = pages_of(size, make, model.rank + model.rope)
    moved = size.rows * (model.rank + model.rope) * (VALUE_BYTES + pages.element_size())
    return Call([(pages, slots_of(size), latents, keys)], moved)


@case
def write_normed_latents(model: Model, size: Size, make: Maker) -> Call | None:
    """The step's latents, with their norm and rotation."""
    if not model.rank:
        return None
    kv, pages = make.noise(size.rows, model.rank + model.rope), pages_of(size, make, model.rank + model.rope)
    arguments = (pages, slots_of(size), kv, make.noise(model.rank), EPS, *tables(size.rows, model.rope // 2), True)
    moved = kv.numel() * (VALUE_BYTES + pages.element_size()) + model.rank * VALUE_BYTES
    return Call([arguments], moved + size.rows * model.rope * 4)  # and the angles


@case
def write_keys_values(model: Model, size: Size, make: Maker) -> Call | None:
    """The step's keys and values."""
    if not model.kv_heads:
        return None
    entry = (model.kv_heads, model.head_dim)
    pages, new = [pages_of(size, make, *entry) for _ in range(2)], [make.noise(size.rows, *entry) for _ in range(2)]
    moved = 2 * size.rows * model.kv_heads * model.head_dim * (VALUE_BYTES + pages[0].element_size())
    return Call([(*pages, slots_of(size), *new)], moved)


@case
def rotate_and_write_keys_values(model: Model, size: Size, make: Maker) -> Call | None:
    """The step's queries, keys and values."""
    if not model.kv_heads:
        return None
    pages = [pages_of(size, make, model.kv_heads, model.head_dim) for _ in range(2)]
    qkv = make.noise(size.rows, (model.heads + 2 * model.kv_heads) * model.head_dim)
    turns = tables(size.rows, model.head_dim // 2)
    each = model.heads * 2 * VALUE_BYTES + 2 * model.kv_heads * (VALUE_BYTES + pages[0].element_size())
    moved = size.rows * model.head_dim * (each + 4)  # and the angles
    return Call([(*pages, slots_of(size), qkv, *turns, False)], moved)


# --- attention ---------------------------------------------------------------------------------------------


@case
def mla_absorb(model: Model, size: Size, make: Maker) -> Call | None:
    """Generated rows."""
    if not (model.rank and size.decodes):
        return None
    q = make.noise(size.rows, model.heads, model.nope + model.rope)
    weights = make.cold(lambda: (make.matrix(model.heads, model.rank, model.nope),))
    moved = weight_bytes(*weights[0]) + size.rows * model.heads * (model.nope + model.rank) * VALUE_BYTES
    flops = 2 * size.rows * model.heads * model.nope * model.rank
    return Call([(q, *matrices) for matrices in weights], moved, flops)


@case
def mla_unabsorb(model: Model, size: Size, make: Maker) -> Call | None:
    """Generated rows."""
    if not (model.rank and size.decodes):
        return None
    latents = make.noise(size.rows, model.heads, model.rank)
    weights = make.cold(lambda: (make.matrix(model.heads, model.value_dim, model.rank),))
    moved = weight_bytes(*weights[0]) + size.rows * model.heads * (model.rank + model.value_dim) * VALUE_BYTES
    flops = 2 * size.rows * model.heads * model.value_dim * model.rank
    return Call([(latents, *matrices) for matrices in weights], moved, flops)


@case
def mla_decode(model: Model, size: Size, make: Maker) -> Call | None:
    """Generated rows, absorbed."""
    if not (model.rank and size.decodes):
        return None
    width = model.rank + model.rope
    q, pages = make.noise(size.rows, model.heads, width), pages_of(size, make, width)
    read = size.context - size.shared * (size.sequences - 1) / size.sequences  # tokens, of a sequence
    moved = (
        int(pages.nbytes * read / size.context) + (q.numel() + size.rows * model.heads * model.rank) * VALUE_BYTES
    )
    flops = 2 * pairs_seen(size) * model.heads * (width + model.rank)
    return Call([(q, pages, queries_of(size, 1), 0.1, model.rank)], moved, flops)


@case
def mla_prefill(model: Model, size: Size, make: Maker) -> Call | None:
    """Prompt rows, expanded; every context token's keys and values are expanded once."""
    if not model.rank or size.decodes:
        return None
    heads, rank, nope, value_dim = model.heads, model.rank, model.nope, model.value_dim
    q = make.noise(size.rows, heads, nope + model.rope)
    pages, weights = pages_of(size, make, rank + model.rope), _expanders(model, make)
    moved = pages.nbytes + (q.numel() + size.rows * heads * value_dim) * VALUE_BYTES + weight_bytes(*weights)
    expansion = 2 * size.sequences * size.context * heads * (nope + value_dim) * rank
    flops = expansion + 2 * pairs_seen(size) * heads * (nope + model.rope + value_dim)
    return Call([(q, pages, *weights, queries_of(size, size.rows_each), 0.1)], moved, flops)


def _expanders(model: Model, make: Maker) -> tuple[Matrix, Matrix]:
    """w_uk [H,nope,R], w_uv [H,V,R]."""
    return tuple(make.matrix(model.heads, n, model.rank) for n in (model.nope, model.value_dim))  # type: ignore[return-value]


@case
def gqa_prefill(model: Model, size: Size, make: Maker) -> Call | None:
    """Prompt rows."""
    return None if size.decodes else _gqa(model, size, make)


@case
def gqa_decode(model: Model, size: Size, make: Maker) -> Call | None:
    """Generated rows."""
    return _gqa(model, size, make) if size.decodes else None


def _gqa(model: Model, size: Size, make: Maker) -> Call | None:
    if not model.kv_heads:
        return None
    q = make.noise(size.rows, model.heads, model.head_dim)
    keys, values = (pages_of(size, make, model.kv_heads, model.head_dim) for _ in range(2))
    read = min(size.context, model.window + size.rows_each - 1) if model.window else size.context
    moved = 2 * q.numel() * VALUE_BYTES + 2 * keys.nbytes * read // size.context
    flops = 4 * pairs_seen(size, model.window) * model.heads * model.head_dim
    arguments: tuple[Any, ...] = (q, keys, values, queries_of(size, size.rows_each), 0.1)
    if model.window or model.sinks:
        arguments += (model.window or None, _sinks(model, make) if model.sinks else None)
    return Call([arguments], moved, flops)


def _sinks(model: Model, make: Maker) -> Tensor:
    """Sinks of every kind: one that is none, one that takes everything, and others that count."""
    sinks = make.noise(model.heads, dtype=torch.float32) * 2
    sinks[0], sinks[1] = -torch.inf, 1e4
    return sinks


# --- the blocks of a layer ---------------------------------------------------------------------------------


def step_rows(size: Size, pairs: int) -> tuple[StepRows, PositionTables]:
    """Generated rows, or a prompt."""
    expanded = queries_of(size, 0 if size.decodes else size.rows_each)
    absorbed = queries_of(size, size.rows_each if size.decodes else 0)
    num_expanded = 0 if size.decodes else size.rows
    tokens, positions = torch.arange(size.rows) % TOKENS, torch.arange(size.rows) % size.context
    rows = StepRows(tokens, positions, slots_of(size), num_expanded, expanded, absorbed)
    return rows, PositionTables(*tables(size.rows, pairs))


@case
def mla_block(model: Model, size: Size, make: Maker) -> Call | None:
    """Attention's half of a layer."""
    if not model.rank:
        return None
    hidden, heads, rank, rope = model.hidden, model.heads, model.rank, model.rope

    def weights() -> tuple[Matrix, ...]:
        w_uk, w_uv = _expanders(model, make)
        return (
            make.matrix(model.query_rank + rank + rope, hidden),
            make.matrix(heads * (model.nope + rope), model.query_rank),
            w_uk,
            make.matrix(heads, rank, model.nope),
            w_uv,
            make.matrix(hidden, heads * model.value_dim),
        )

    norms = make.noise(hidden), make.noise(model.query_rank), make.noise(rank)
    layers = [
        MlaWeights(norms[0], down, norms[1], up, norms[2], w_uk, w_uk_t, w_uv, out, EPS, EPS, 0.1, True)
        for down, up, w_uk, w_uk_t, w_uv, out in make.cold(weights)
    ]
    x, step = make.noise(size.rows, hidden) * 0, step_rows(size, rope // 2)
    pages, residual = pages_of(size, make, rank + rope), make.noise(size.rows, hidden)
    attention = (mla_decode if size.decodes else mla_prefill)(model, size, make)
    assert attention is not None
    first = layers[0]
    dense = [matrix for matrix in (first.down, first.query_up, first.output) if matrix is not None]
    by_head = (first.w_uk_t, first.w_uv) if size.decodes else ()  # a prompt's attention counts its own
    used = weight_bytes(*dense, *by_head)
    per_row = sum(matrix.shape[0] * matrix.shape[1] for matrix in dense)
    per_row += heads * (model.nope + model.value_dim) * rank if size.decodes else 0
    moved = used + attention.num_bytes + 4 * residual.numel() * VALUE_BYTES
    return Call(
        [(x, residual, layer, *step, pages) for layer in layers],
        moved,
        attention.flops + 2 * size.rows * per_row,
    )


@case
def gqa_block(model: Model, size: Size, make: Maker) -> Call | None:
    """Attention's half of a layer."""
    attention = _gqa(model, size, make)
    if attention is None:
        return None
    hidden, width = model.hidden, model.heads * model.head_dim
    outputs = width + 2 * model.kv_heads * model.head_dim
    weights = make.cold(lambda: (make.matrix(outputs, hidden), make.matrix(hidden, width)))
    norm, step = make.noise(hidden), step_rows(size, model.head_dim // 2)
    layers = [GqaWeights(norm, qkv, output, model.heads, model.kv_heads, EPS, 0.1) for qkv, output in weights]
    pages = [pages_of(size, make, model.kv_heads, model.head_dim) for _ in range(2)]
    x, residual = make.noise(size.rows, hidden) * 0, make.noise(size.rows, hidden)
    moved = weight_bytes(*weights[0]) + attention.num_bytes + 4 * x.numel() * VALUE_BYTES
    flops = attention.flops + 2 * size.rows * hidden * (outputs + width)
    return Call([(x, residual, layer, *step, *pages) for layer in layers], moved, flops)


@case
def mlp_block(model: Model, size: Size, make: Maker) -> Call | None:
    """The dense MLP's half of a layer."""
    if model.experts:
        return None
    hidden, width = model.hidden, model.mlp_width
    weights = make.cold(lambda: (make.matrix(2 * width, hidden, paired=True), make.matrix(hidden, width)))
    x, residual, norm = make.noise(size.rows, hidden) * 0, make.noise(size.rows, hidden), make.noise(hidden)
    moved = weight_bytes(*weights[0]) + 4 * x.numel() * VALUE_BYTES
    calls = [(x, residual, MlpWeights(norm, gate_up, down, EPS)) for gate_up, down in weights]
    return Call(calls, moved, 6 * size.rows * hidden * width)


@case
def moe_block(model: Model, size: Size, make: Maker) -> Call | None:
    """The experts' half of a layer. Its router chooses: the bytes are those of as many random choices."""
    if not model.experts:
        return None
    hidden, width, rows = model.hidden, model.expert_width, size.rows
    router = make.matrix(model.experts, hidden, format="bf16")
    routed = make.matrix(model.experts, 2 * width, hidden, paired=True), make.matrix(model.experts, hidden, width)
    shared = make.matrix(2 * model.mlp_width, hidden, paired=True), make.matrix(hidden, model.mlp_width)
    layer = MoeWeights(make.noise(hidden), router, *routed, *shared, EPS, model.top_k, 1, 1, True, 1.0)
    x, residual = make.noise(rows, hidden) * 0, make.noise(rows, hidden)
    moved = expert_bytes(model, size, *routed) + weight_bytes(router, *shared) + 4 * x.numel() * VALUE_BYTES
    flops = 2 * rows * hidden * (3 * (model.top_k * width + model.mlp_width) + model.experts)
    return Call([(x, residual, layer)], moved, flops)


@case
def decoder(model: Model, size: Size, make: Maker) -> Call | None:
    """A layer of the model in one call: its two blocks, between an embedding and a head of a few tokens."""
    first = (mla_block if model.rank else gqa_block)(model, size, make)
    second = (moe_block if model.experts else mlp_block)(model, size, make)
    assert first is not None
    assert second is not None
    _, _, attention, rows, position_tables, *pages = first.arguments[0]
    blocks = [attention, second.arguments[0][2]]
    head, embedding = make.matrix(TOKENS, model.hidden), make.noise(TOKENS, model.hidden)
    weights = DecoderWeights(embedding, blocks, [tuple(pages)], make.noise(model.hidden), EPS, head)
    calls = [(weights, rows, position_tables, None)]
    return Call(calls, first.num_bytes + second.num_bytes, first.flops + second.flops)
