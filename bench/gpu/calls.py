"""A case of each operation: one function per operation, from a model and a size to arguments and their work.

Letters as in kernels/ops/; work is counted by engine/cost/operations.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from cierzo.bench.gpu.cases import (
    BY_FP8,
    CASES,
    COLD_BYTES,
    GPT_OSS,
    GPT_OSS_WINDOW,
    HOSTILE_WINDOWS,
    KV,
    LATENT_QUERIES,
    LATENTS,
    MODELS,
    Call,
    Maker,
    Size,
    case,
)
from cierzo.engine.cost import operations
from cierzo.engine.cost.operations import stored
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels.formats.activations import quantise_rows
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ops.terms import Terms

BLOCK_TOKENS = 64  # as on a GPU by default
EPS = 1e-6
SEEN = 100  # tokens of each row that an edit of logits changes
Arguments = tuple[Any, ...]
Cell = tuple[str, ModelSizes, Size, str]  # operation, model, size, format


def cells(
    sizes: Sequence[Size], more: Mapping[str, Sequence[ModelSizes]] | None = None
) -> Iterator[tuple[str, Cell]]:
    """(name, Cell) of every operation that a model and a size have; engine/cost/cards.py takes names apart. more:
    models by operation, beside those of its case."""
    for operation, known in CASES.items():
        models = (*known.models, *(more or {}).get(operation, ()))
        for model, size, format in product(models, sizes, known.formats):
            if known.has(model, size):
                yield f"{operation}, {model.name}, {size.name}, {format}", (operation, model, size, format)


def make_call(
    operation: str,
    model: ModelSizes,
    size: Size,
    format: str,
    device: torch.device,
    *,
    seed: int = 0,
    cold_bytes: int = COLD_BYTES,
) -> Call:
    """The call of an operation, which the model and the step have (Case.has), on a device."""
    known = CASES[operation]
    weights, pages = ("bf16", format) if known.of == "pages" else (format, "bf16")
    calls, work = known.make(model, size, Maker(weights, str(device), seed, KV[pages], cold_bytes))
    on_device = [
        tuple(one.to(device) if isinstance(one, Tensor) else one for one in arguments) for arguments in calls
    ]
    return on_device, work


def tables(rows: int, pairs: int) -> tuple[Tensor, Tensor]:
    """cos, sin of random angles, fp32 [rows, pairs]."""
    angles = torch.rand(rows, pairs, generator=torch.Generator().manual_seed(1)) * 6
    return angles.cos(), angles.sin()


# --- norms, rotations --------------------------------------------------------------------------------------


@case("rms_norm", rowwise=True, models=(*MODELS, LATENT_QUERIES))
@case("rms_norm_fp8", of="codes", rowwise=True, models=(*MODELS, LATENT_QUERIES))
@case("add_rms_norm", changes=(1,))
@case("add_rms_norm_fp8", of="codes", changes=(1,))
def norm(operation: str, model: ModelSizes, size: Size, make: Maker) -> Call:
    """The hidden rows, alone or added to a residual; into codes by each row's own scale, or by a static one."""
    residual, fp8 = operation.startswith("add"), operation.endswith("fp8")
    beside = model.rank + model.rope if model.hidden == model.query_rank else 0
    x, weight = make.noise(size.rows, model.hidden + beside)[:, : model.hidden], make.noise(model.hidden)
    arguments: Arguments = (x * 0, x.clone(), weight, EPS) if residual else (x, weight, EPS)
    if fp8:
        static = BY_FP8.get(make.format)
        arguments += (None if static is None else torch.full((1,), static, device=make.device),)
    row_bytes = int(stored("fp8", 1, model.hidden)) if fp8 else None
    return [arguments], operations.norm(model, size.rows, residual=residual, row_bytes=row_bytes)


@case()
def rope_tables(model: ModelSizes, size: Size, make: Maker) -> Call:
    """Angles of a step's positions."""
    positions = torch.arange(size.rows) + size.context - size.rows_each
    frequencies = torch.rand(model.rotated // 2, generator=torch.Generator().manual_seed(make.seed))
    arguments = (positions, frequencies, 1.0)
    return [arguments], operations.moved("rope_tables", model, size.rows)


@case(changes=(0,))
def apply_rope(model: ModelSizes, size: Size, make: Maker) -> Call:
    """The queries, which latent attention scales by their position; with grouped queries, the keys too."""
    x = make.noise(size.rows, model.heads + model.kv_heads, model.nope + model.rotated)
    scale = torch.rand(size.rows, generator=torch.Generator().manual_seed(2)) + 1 if model.rope else None
    arguments = (x, *tables(size.rows, model.rotated // 2), model.rope > 0, scale)
    return [arguments], operations.moved("apply_rope", model, size.rows)


# --- dense products ----------------------------------------------------------------------------------------


@case("linear", "linear_terms", of="weights", rowwise=True, models=(*MODELS, LATENTS))
def linear(_: str, model: ModelSizes, size: Size, make: Maker) -> Call:
    """The projection after attention."""
    k, n = model.projections[-1]
    x, weights = make.noise(size.rows, k), make.cold(lambda: (make.matrix(n, k),))
    return [(x, *matrices) for matrices in weights], operations.linear(model, size.rows, k, n, make.weights)


@case(of="head", rowwise=True)
def lm_head(model: ModelSizes, size: Size, make: Maker) -> Call:
    """Logits of a row a sequence."""
    x = make.noise(size.sequences, model.hidden)
    weights = make.cold(lambda: (make.matrix(model.vocab, model.hidden),))
    return [(x, *matrices) for matrices in weights], operations.lm_head(model, size.sequences, make.weights)


@case(of="weights", rowwise=True)
def gated_mlp(model: ModelSizes, size: Size, make: Maker) -> Call:
    """The dense MLP, or one as wide as the shared expert."""
    x, hidden, width = make.noise(size.rows, model.hidden), model.hidden, model.mlp_width
    weights = make.cold(lambda: (make.matrix(2 * width, hidden, paired=True), make.matrix(hidden, width)))
    return [(x, *matrices) for matrices in weights], operations.gated_mlp(model, size.rows, make.weights)


# --- mixture of experts ------------------------------------------------------------------------------------


def random_experts(model: ModelSizes, size: Size) -> Tensor:
    """int64 [T,K], distinct in a row, every expert as likely as the others."""
    scores = torch.rand(size.rows, model.experts, generator=torch.Generator().manual_seed(size.rows))
    return scores.topk(model.top_k).indices


@case("route", "route_groups", needs="experts")
def route(_: str, model: ModelSizes, size: Size, make: Maker) -> Call:
    """The router in the checkpoint's bf16."""
    x = make.noise(size.rows, model.hidden)
    weights = make.cold(lambda: (make.plain(model.experts, model.hidden),))
    calls: list[Arguments] = [(x, *matrices, model.top_k, 1, 1, True, 1.0) for matrices in weights]
    return calls, operations.route(model, size.rows)


@case(needs="experts")
def group_by_expert(model: ModelSizes, size: Size, make: Maker) -> Call:
    """Random choices."""
    arguments = (random_experts(model, size), model.experts)
    return [arguments], operations.moved("group_by_expert", model, size.rows)


def expert_weights(width: int, model: ModelSizes, make: Maker, *experts: int) -> tuple[Matrix, Matrix]:
    """Gate and up, and down, of experts or of the shared one; in FP8 each of the three has one scale, as in
    checkpoints."""
    gate_up = make.matrix(*experts, 2 * width, model.hidden, paired=True, block=(width, model.hidden))
    return gate_up, make.matrix(*experts, model.hidden, width, block=(model.hidden, width))


@case("expert_mlp", "expert_terms", needs="experts", of="weights")
def expert_mlp(_: str, model: ModelSizes, size: Size, make: Maker) -> Call:
    """Random choices, and the shared expert."""
    ids = random_experts(model, size)
    order = ids.flatten().sort(stable=True)
    starts = torch.searchsorted(order.values, torch.arange(model.experts + 1))
    x, shares = make.noise(size.rows, model.hidden), torch.full(ids.shape, 1 / model.top_k)
    routed = expert_weights(model.expert_width, model, make, model.experts)
    shared = expert_weights(model.shared_width, model, make)
    work = operations.expert_mlp(model, size.rows, len(ids.unique()), make.weights)
    return [(x, *routed, shares, order.indices, starts, *shared)], work


@case(needs="experts")
def sum_terms(model: ModelSizes, size: Size, make: Maker) -> Call:
    """Outputs of each token's experts, and of the shared one."""
    return [(expert_outputs(model, size, make),)], operations.moved("sum_terms", model, size.rows)


def expert_outputs(model: ModelSizes, size: Size, make: Maker) -> Terms:
    """Terms as experts leave them."""
    weights = torch.full((size.rows, model.top_k), 1 / model.top_k, device=make.device)
    return Terms(make.noise(size.rows * (model.top_k + 1), model.hidden), weights, torch.bfloat16)


# --- pages of the cache ------------------------------------------------------------------------------------


def queries_of(size: Size, device: str = "cpu") -> PagedQueries:
    """Scattered blocks, those of a prefix the first sequence's; the last tokens of each context ask."""
    blocks, count = -(-size.context // BLOCK_TOKENS), size.sequences
    ids = torch.randperm(count * blocks, generator=torch.Generator().manual_seed(0)).view(-1, blocks)
    ids[:, : size.shared // BLOCK_TOKENS] = ids[0, : size.shared // BLOCK_TOKENS].clone()
    tables = ids.int().to(device)
    return PagedQueries.of([size.rows_each] * count, [size.context] * count, list(range(count)), tables)


def slots_of(size: Size) -> Tensor:
    """Cache slots of the step's rows, the last ones of each context."""
    positions = torch.arange(size.context - size.rows_each, size.context)
    blocks = queries_of(size).block_tables.long()[:, positions // BLOCK_TOKENS]
    return (blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS).flatten()


def pages_of(model: ModelSizes, size: Size, make: Maker) -> list[tuple[Tensor, ...]]:
    """Pages of all contexts, each call's own: of latents [B,S,R+P], or of keys and of values [B,S,heads,width]."""
    entries = [(model.rank + model.rope,)] if model.rank else 2 * [(model.kv_heads, model.head_dim)]
    rows = size.sequences * -(-size.context // BLOCK_TOKENS), BLOCK_TOKENS
    return make.cold(lambda: tuple(make.noise(*rows, *entry, dtype=make.kv_dtype) for entry in entries))


@case("write_latents", "write_normed_latents", needs="rank", of="pages", changes=(0,))
@case("write_keys_values", needs="kv_heads", of="pages", changes=(0, 1))
@case("rotate_and_write_keys_values", needs="kv_heads", of="pages", changes=(0, 1, 3))
def write(operation: str, model: ModelSizes, size: Size, make: Maker) -> Call:
    """The step's latents, or its keys and values: as they are; with their norm and rotation; or, with the queries
    beside them, with their rotation."""
    arguments: Arguments = (slots_of(size),)
    if operation == "write_latents":
        arguments += (make.noise(size.rows, model.rank), make.noise(size.rows, model.rope))
    elif operation == "write_normed_latents":
        beside = make.noise(size.rows, model.query_rank + model.page_values)  # the query's latent, before
        arguments += (
            beside[:, model.query_rank :],
            make.noise(model.rank),
            EPS,
            *tables(size.rows, model.rope // 2),
            True,
        )
    elif operation == "write_keys_values":
        arguments += tuple(make.noise(size.rows, model.kv_heads, model.head_dim) for _ in range(2))
    else:
        qkv = make.noise(size.rows, (model.heads + 2 * model.kv_heads) * model.head_dim)
        arguments += (qkv, *tables(size.rows, model.head_dim // 2), False)
    work = operations.moved(operation, model, size.rows, make.kv_dtype.itemsize)
    return [(*pages, *arguments) for pages in pages_of(model, size, make)], work


@case("norm_latents", needs="rank", of="pages", changes=(7,))
def norm_latents(_: str, model: ModelSizes, size: Size, make: Maker) -> Call:
    """A row of MLA's first product for each token: both norms, the rotation and the cache entry."""
    x = make.noise(size.rows, model.query_rank + model.page_values)
    before = (
        x,
        make.noise(model.query_rank),
        make.noise(model.rank),
        EPS,
        *tables(size.rows, model.rope // 2),
        True,
    )
    work = operations.moved("norm_latents", model, size.rows, make.kv_dtype.itemsize)
    return [(*before, *pages, slots_of(size), False, None) for pages in pages_of(model, size, make)], work


@case(needs="query_rank", of="weights", changes=(1, 11))
def latents_of(model: ModelSizes, size: Size, make: Maker) -> Call:
    """Hidden rows added to a residual, normed, times MLA's first product; norm_latents of that."""
    x, width = make.noise(size.rows, model.hidden), model.query_rank + model.page_values
    static, fp8 = BY_FP8.get(make.format), make.format in BY_FP8
    weights = make.cold(lambda: (make.matrix(width, model.hidden),))
    ((pages,),) = pages_of(model, size, replace(make, cold_bytes=0))
    norms = (make.noise(model.query_rank), make.noise(model.rank), EPS, *tables(size.rows, model.rope // 2), True)
    rest = (pages, slots_of(size), fp8, None if static is None else torch.full((1,), static, device=make.device))
    before = (x * 0, x.clone(), make.noise(model.hidden), EPS)
    work = operations.latents_of(model, size.rows, make.weights, make.kv_dtype.itemsize, fp8=fp8)
    return [(*before, *matrices, *norms, *rest) for matrices in weights], work


@case("copy_blocks", "scatter_blocks", changes=(0,))
@case("gather_blocks", changes=(2,))
def blocks(operation: str, model: ModelSizes, size: Size, make: Maker) -> Call:
    """A context's blocks: from the front of a layer's pages to their end, or out of and into every second one."""
    width, count = model.rank + model.rope or model.kv_heads * model.head_dim, -(-size.context // BLOCK_TOKENS)
    every = make.cold(lambda: (make.noise(2 * count, BLOCK_TOKENS, width),))
    work = operations.Work(operation, 2 * count * every[0][0][0].nbytes)  # read and written
    if operation == "copy_blocks":
        pairs = torch.stack([torch.arange(count), torch.arange(2 * count - 1, count - 1, -1)], dim=1)
        return [(pages, pairs) for (pages,) in every], work
    return [(pages, torch.arange(count) * 2, pages[:count].clone()) for (pages,) in every], work


# --- attention ---------------------------------------------------------------------------------------------


@case(needs="rank", decodes=True)
def rotate_and_absorb(model: ModelSizes, size: Size, make: Maker) -> Call:
    """Generated queries, rotated and scaled, times a matrix of each head, which stays plain."""
    q = make.noise(size.rows, model.heads * (model.nope + model.rope))
    scale = torch.rand(size.rows, generator=torch.Generator().manual_seed(2)) + 1
    weights = make.cold(lambda: (make.plain(model.heads, model.rank, model.nope),))
    angles = tables(size.rows, model.rope // 2)
    work = operations.rotate_and_absorb(model, size.rows)
    return [(q, *matrices, *angles, True, scale) for matrices in weights], work


@case(needs="query_rank", decodes=True, of="weights")
def absorbed_queries(model: ModelSizes, size: Size, make: Maker) -> Call:
    """Generated queries' latents, in FP8 where the product takes that, times it; rotate_and_absorb of that."""
    latents = make.noise(size.rows, model.query_rank)
    static, fp8 = BY_FP8.get(make.format), make.format in BY_FP8
    by = None if static is None else torch.full((1,), static, device=make.device)
    x = quantise_rows(latents, by) if fp8 else latents
    scale = torch.rand(size.rows, generator=torch.Generator().manual_seed(2)) + 1
    weights = make.cold(
        lambda: (
            make.matrix(model.heads * (model.nope + model.rope), model.query_rank),
            make.plain(model.heads, model.rank, model.nope),
        )
    )
    angles = tables(size.rows, model.rope // 2)
    work = operations.absorbed_queries(model, size.rows, make.weights, fp8=fp8)
    return [(x, *matrices, *angles, True, scale) for matrices in weights], work


@case("mla_absorb", "mla_unabsorb", needs="rank", decodes=True, rowwise=True)
def by_head(operation: str, model: ModelSizes, size: Size, make: Maker) -> Call:
    """Generated rows times a matrix of each head, which stays plain: into latent space, or out of it."""
    absorb = operation == "mla_absorb"
    x = make.noise(size.rows, model.heads, model.nope + model.rope if absorb else model.rank)
    n, k = (model.rank, model.nope) if absorb else (model.value_dim, model.rank)
    weights = make.cold(lambda: (make.plain(model.heads, n, k),))
    work = operations.by_head(operation, model, size.rows)
    return [(x, *matrices) for matrices in weights], work


@case(needs="rank", decodes=True, of="pages")
def mla_decode(model: ModelSizes, size: Size, make: Maker) -> Call:
    """Generated rows, absorbed."""
    q = make.noise(size.rows, model.heads, model.rank + model.rope)
    work = operations.mla_decode(model, *size.queries(), make.entry_bytes(model))
    queries = queries_of(size, make.device)
    return [(q, *pages, queries, 0.1, model.rank) for pages in pages_of(model, size, make)], work


@case(needs="rank", decodes=True, of="pages")
def mla_values(model: ModelSizes, size: Size, make: Maker) -> Call:
    """Generated rows, absorbed, up to the values, by weights that stay plain."""
    calls, work = CASES["mla_decode"].make(model, size, make)
    weight = make.plain(model.heads, model.value_dim, model.rank)
    return [(*arguments[:-1], weight) for arguments in calls], operations.mla_values(work, model, size.rows)


@case(needs="rank", decodes=False, of="pages")
def mla_prefill(model: ModelSizes, size: Size, make: Maker) -> Call:
    """Prompt rows, expanded; each context token's keys and values once, by weights that stay plain."""
    q = make.noise(size.rows, model.heads, model.nope + model.rope)
    expanders = [make.plain(model.heads, width, model.rank) for width in (model.nope, model.value_dim)]
    work = operations.mla_prefill(model, *size.queries(), make.entry_bytes(model))
    queries = queries_of(size, make.device)
    return [(q, *pages, *expanders, queries, 0.1) for pages in pages_of(model, size, make)], work


WINDOWED: dict[str, Any] = {"models": (*MODELS, GPT_OSS, GPT_OSS_WINDOW), "hostile": HOSTILE_WINDOWS}


@case("gqa_decode", needs="kv_heads", decodes=True, of="pages", **WINDOWED)
@case("gqa_prefill", needs="kv_heads", decodes=False, of="pages", **WINDOWED)
def gqa(operation: str, model: ModelSizes, size: Size, make: Maker) -> Call:
    """Generated rows, or a prompt's; queries lie beside keys and values, in rows of one product."""
    q = make.noise(size.rows, model.heads + 2 * model.kv_heads, model.head_dim)[:, : model.heads]
    arguments: Arguments = (queries_of(size, make.device), 0.1)
    if model.window or model.sinks:  # sinks of every kind: one that is none, one that takes everything, and others
        sinks = make.noise(model.heads, dtype=torch.float32) * 2
        sinks[0], sinks[1] = -torch.inf, 1e4
        arguments += (model.window or None, sinks if model.sinks else None)
    work = operations.gqa(model, *size.queries(model.window), make.entry_bytes(model))
    return [(q, *pages, *arguments) for pages in pages_of(model, size, make)], work


# --- sampling ----------------------------------------------------------------------------------------------


def logits_of(model: ModelSizes, size: Size) -> Tensor:
    """fp32 [M,N]: one row a sequence, a few tokens likely."""
    return torch.randn(size.sequences, model.vocab, generator=torch.Generator().manual_seed(0)) * 3


@case("add_bias", "apply_penalties", "mask_tokens", changes=(0,))
def edit(operation: str, model: ModelSizes, size: Size, make: Maker) -> Call:
    """Changes of a hundred tokens a row: by a bias, by a count and its row's penalties, or to nothing."""
    rows = torch.arange(size.sequences).repeat_interleave(SEEN)
    ids = (torch.arange(SEEN) * 37 % model.vocab).repeat(size.sequences)
    more: list[Tensor] = []
    if operation == "add_bias":
        more = [torch.zeros(len(ids))]
    if operation == "apply_penalties":
        more = [torch.ones_like(ids), *(torch.full((size.sequences,), value) for value in (1.0, 0.0, 0.0))]
    return [(logits_of(model, size), rows, ids, *more)], operations.moved(operation, model, len(ids))


@case("mask_bits", changes=(0,))
def mask_rows(operation: str, model: ModelSizes, size: Size, make: Maker) -> Call:
    """Masks of all rows that leave nothing but every thousandth token."""
    rows, bits = size.sequences, torch.zeros(size.sequences, -(-model.vocab // 32), dtype=torch.int32)
    bits[:, ::31] = 1
    return [(logits_of(model, size), torch.arange(rows), bits)], operations.moved(operation, model, rows)


@case("peaks", "log_probabilities", rowwise=True)
@case("top_tokens", "draw")
def read_logits(operation: str, model: ModelSizes, size: Size, make: Maker) -> Call:
    """Logits of every token: the largest, their log-probabilities, the twenty largest, a draw."""
    rows, more = size.sequences, Arguments()
    if operation == "top_tokens":
        more = (20,)
    if operation == "draw":
        temperatures, top_ps, min_ps = (torch.full((rows,), p, dtype=torch.float64) for p in (0.8, 0.95, 0.0))
        zeros = torch.zeros(rows, dtype=torch.int64)
        more = (temperatures, zeros, top_ps, min_ps, zeros, zeros, zeros)
    return [(logits_of(model, size), *more)], operations.moved(operation, model, rows)
