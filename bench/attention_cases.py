"""Calls that time attention, the writes into its pages, and the blocks of a layer; see kernel_cases.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cierzo.bench.kernel_cases import Call, Maker, Size, case, cases, expert_work, mlp_weights, tables
from cierzo.engine.cost import operations
from cierzo.engine.cost.sizes import ModelSizes
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


def latent_pages(model: ModelSizes, size: Size, make: Maker) -> Tensor:
    """Pages [B,S,R+P] of all contexts."""
    return make.pages(size.sequences * size.context // BLOCK_TOKENS, BLOCK_TOKENS, model.rank + model.rope)


def key_value_pages(model: ModelSizes, size: Size, make: Maker) -> tuple[Tensor, Tensor]:
    """Pages of keys and of values [B,S,heads,width] of all contexts."""
    shape = (size.sequences * size.context // BLOCK_TOKENS, BLOCK_TOKENS, model.kv_heads, model.head_dim)
    return make.pages(*shape), make.pages(*shape)


# --- writes ------------------------------------------------------------------------------------------------


@cases("write_latents", "write_normed_latents")
def write_latents(operation: str, model: ModelSizes, size: Size, make: Maker) -> Call | None:
    """The step's latents, as they are or with their norm and rotation."""
    if not model.rank:
        return None
    pages, slots = latent_pages(model, size, make), slots_of(size)
    latents, keys = make.noise(size.rows, model.rank), make.noise(size.rows, model.rope)
    arguments: tuple[Any, ...] = (pages, slots, latents, keys)
    if operation == "write_normed_latents":
        turns = tables(size.rows, model.rope // 2)
        arguments = (pages, slots, torch.cat([latents, keys], -1), make.noise(model.rank), EPS, *turns, True)
    return Call([arguments], operations.moved(operation, model, size.rows, make.kv_dtype.itemsize))


@cases("write_keys_values", "rotate_and_write_keys_values")
def write_keys_values(operation: str, model: ModelSizes, size: Size, make: Maker) -> Call | None:
    """The step's keys and values, as they are or, with the queries beside them, with their rotation."""
    if not model.kv_heads:
        return None
    pages, slots = key_value_pages(model, size, make), slots_of(size)
    arguments: tuple[Any, ...] = (*pages, slots, *(make.noise(size.rows, *pages[0].shape[2:]) for _ in range(2)))
    if operation == "rotate_and_write_keys_values":
        qkv = make.noise(size.rows, (model.heads + 2 * model.kv_heads) * model.head_dim)
        arguments = (*pages, slots, qkv, *tables(size.rows, model.head_dim // 2), False)
    return Call([arguments], operations.moved(operation, model, size.rows, make.kv_dtype.itemsize))


# --- attention ---------------------------------------------------------------------------------------------


@cases("mla_absorb", "mla_unabsorb")
def by_head(operation: str, model: ModelSizes, size: Size, make: Maker) -> Call | None:
    """Generated rows times a matrix of each head, which stays plain: into latent space, or out of it."""
    if not (model.rank and size.decodes):
        return None
    absorb = operation == "mla_absorb"
    x = make.noise(size.rows, model.heads, model.nope + model.rope if absorb else model.rank)
    n, k = (model.rank, model.nope) if absorb else (model.value_dim, model.rank)
    weights = make.cold(lambda: (make.matrix(model.heads, n, k, format="bf16"),))
    work = (operations.mla_absorb if absorb else operations.mla_unabsorb)(model, size.rows)
    return Call([(x, *matrices) for matrices in weights], work)


@case
def mla_decode(model: ModelSizes, size: Size, make: Maker) -> Call | None:
    """Generated rows, absorbed."""
    if not (model.rank and size.decodes):
        return None
    q, pages = make.noise(size.rows, model.heads, model.rank + model.rope), latent_pages(model, size, make)
    work = operations.mla_decode(model, *size.queries(), make.entry_bytes(model))
    return Call([(q, pages, queries_of(size, 1), 0.1, model.rank)], work)


@case
def mla_prefill(model: ModelSizes, size: Size, make: Maker) -> Call | None:
    """Prompt rows, expanded; every context token's keys and values are expanded once."""
    if not model.rank or size.decodes:
        return None
    q, pages = make.noise(size.rows, model.heads, model.nope + model.rope), latent_pages(model, size, make)
    arguments = (q, pages, *_expanders(model, make), queries_of(size, size.rows_each), 0.1)
    work = operations.mla_prefill(model, *size.queries(), make.entry_bytes(model))
    return Call([arguments], work)


def _expanders(model: ModelSizes, make: Maker) -> tuple[Matrix, Matrix]:
    """w_uk [H,nope,R], w_uv [H,V,R], which stay plain."""
    w_uk = make.matrix(model.heads, model.nope, model.rank, format="bf16")
    return w_uk, make.matrix(model.heads, model.value_dim, model.rank, format="bf16")


@cases("gqa_decode", "gqa_prefill")
def grouped(operation: str, model: ModelSizes, size: Size, make: Maker) -> Call | None:
    """Generated rows, or a prompt's."""
    return _gqa(model, size, make) if size.decodes == (operation == "gqa_decode") else None


def _gqa(model: ModelSizes, size: Size, make: Maker) -> Call | None:
    if not model.kv_heads:
        return None
    q, pages = make.noise(size.rows, model.heads, model.head_dim), key_value_pages(model, size, make)
    arguments: tuple[Any, ...] = (q, *pages, queries_of(size, size.rows_each), 0.1)
    if model.window or model.sinks:
        arguments += (model.window or None, _sinks(model, make) if model.sinks else None)
    return Call([arguments], operations.gqa(model, *size.queries(model.window), make.entry_bytes(model)))


def _sinks(model: ModelSizes, make: Maker) -> Tensor:
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


def _hidden(model: ModelSizes, size: Size, make: Maker) -> tuple[Tensor, Tensor]:
    """A half's input, which is zero so that repeated calls stay finite, and the residual."""
    return make.noise(size.rows, model.hidden) * 0, make.noise(size.rows, model.hidden)


@case
def mla_block(model: ModelSizes, size: Size, make: Maker) -> Call | None:
    """Attention's half of a layer."""
    if not model.rank:
        return None

    def weights() -> tuple[Matrix, ...]:
        down, up, output = (make.matrix(n, k) for k, n in model.projections)
        w_uk, w_uv = _expanders(model, make)
        w_uk_t = make.matrix(model.heads, model.rank, model.nope, format="bf16")
        return down, up, w_uk, w_uk_t, w_uv, output

    norms = make.noise(model.hidden), make.noise(model.query_rank), make.noise(model.rank)
    layers = [
        MlaWeights(norms[0], down, norms[1], up, norms[2], w_uk, w_uk_t, w_uv, output, EPS, EPS, 0.1, True)
        for down, up, w_uk, w_uk_t, w_uv, output in make.cold(weights)
    ]
    x, residual = _hidden(model, size, make)
    step, pages = step_rows(size, model.rope // 2), latent_pages(model, size, make)
    attention = (mla_decode if size.decodes else mla_prefill)(model, size, make)
    assert attention is not None
    work = operations.attention_half(model, size.rows, attention.work, make.weights, absorbed=size.decodes)
    return Call([(x, residual, layer, *step, pages) for layer in layers], work)


@case
def gqa_block(model: ModelSizes, size: Size, make: Maker) -> Call | None:
    """Attention's half of a layer."""
    attention = _gqa(model, size, make)
    if attention is None:
        return None
    norm, step = make.noise(model.hidden), step_rows(size, model.head_dim // 2)
    weights = make.cold(lambda: tuple(make.matrix(n, k) for k, n in model.projections))
    layers = [GqaWeights(norm, qkv, output, model.heads, model.kv_heads, EPS, 0.1) for qkv, output in weights]
    x, residual = _hidden(model, size, make)
    pages = key_value_pages(model, size, make)
    work = operations.attention_half(model, size.rows, attention.work, make.weights, absorbed=False)
    return Call([(x, residual, layer, *step, *pages) for layer in layers], work)


@case
def mlp_block(model: ModelSizes, size: Size, make: Maker) -> Call | None:
    """The dense MLP's half of a layer."""
    if model.experts:
        return None
    (x, residual), norm = _hidden(model, size, make), make.noise(model.hidden)
    weights = make.cold(lambda: mlp_weights(model.mlp_width, model, make))
    calls = [(x, residual, MlpWeights(norm, gate_up, down, EPS)) for gate_up, down in weights]
    mlp = operations.gated_mlp(model, size.rows, make.weights)
    return Call(calls, operations.mlp_half(model, size.rows, mlp))


@case
def moe_block(model: ModelSizes, size: Size, make: Maker) -> Call | None:
    """The experts' half of a layer. Its router chooses: the bytes are those of as many random choices."""
    if not model.experts:
        return None
    router = make.matrix(model.experts, model.hidden, format="bf16")
    routed = mlp_weights(model.expert_width, model, make, model.experts)
    shared = mlp_weights(model.shared_width, model, make)
    layer = MoeWeights(make.noise(model.hidden), router, *routed, *shared, EPS, model.top_k, 1, 1, True, 1.0)
    work = operations.mlp_half(model, size.rows, expert_work(model, size, make))
    return Call([(*_hidden(model, size, make), layer)], work)


@case
def decoder(model: ModelSizes, size: Size, make: Maker) -> Call | None:
    """A layer of the model in one call: its two blocks, between an embedding and a head of a few tokens."""
    first = (mla_block if model.rank else gqa_block)(model, size, make)
    second = (moe_block if model.experts else mlp_block)(model, size, make)
    assert first is not None
    assert second is not None
    _, _, attention, rows, position_tables, *pages = first.arguments[0]
    blocks = [attention, second.arguments[0][2]]
    head, embedding = make.matrix(TOKENS, model.hidden), make.noise(TOKENS, model.hidden)
    weights = DecoderWeights(embedding, blocks, [tuple(pages)], make.noise(model.hidden), EPS, head)
    return Call([(weights, rows, position_tables, None)], first.work + second.work)
