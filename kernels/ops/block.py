"""The halves of a decoder layer, each one call: addition to the residual stream, norm, and all that follows.

    residual += x;  out = attention or MLP (rms_norm(residual))

x is the other half's result (None before the first layer); with several ranks it is their sum. Each block equals
the composition of the single operations (compose.py): an implementation may run it in one go, so that a step
crosses from Python twice a layer, and not thirty times. `scratch`, in what is handed in, holds what an
implementation derived from the other fields and finds again in its next call.

Letters: T rows of the step, D hidden width, H heads, R latent rank, P rope dims, V value dims, Q latent rank of the
query, E experts, K experts per token, F expert or MLP width; Hq and Hk query and key-value heads, d their width;
M rows whose logits are wanted, N logits of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cierzo.kernels import check
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops import linear, moe, norm
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.registry import bound

Scratch = dict[object, Any]


@dataclass(frozen=True, slots=True, eq=False)
class StepRows:
    """What the rows of a step are, the same for every layer: first the prompt tokens, then the generated ones.

    cos, sin: fp32 [T,P/2]. query_scale: fp32 [T], or None where it is 1 for every row. cache_slots: int64 [T].
    num_expanded: rows of the first kind. expanded, absorbed: the segments of each kind, counted from its first row.
    expert_ids: contiguous int64 [MoE layers,T,K], written: what each of them chose, best first; None: not wanted.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None
    cache_slots: Tensor
    num_expanded: int
    expanded: PagedQueries
    absorbed: PagedQueries
    expert_ids: Tensor | None = None
    scratch: Scratch = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class MlaWeights:
    """Multi-head latent attention. norm [D], eps: of the residual stream.

    down: [Q+R+P, D], the query's latent above the keys' and values'; query_norm [Q]; query_up [H(nope+P), Q].
    Without a latent query: down [H(nope+P)+R+P, D], and neither of the others. kv_norm [R]. w_uk [H,nope,R];
    w_uk_t [H,R,nope], the same with its axes exchanged; w_uv [H,V,R]; output [D, H V].
    """

    norm: Tensor
    down: Matrix
    query_norm: Tensor | None
    query_up: Matrix | None
    kv_norm: Tensor
    w_uk: Matrix
    w_uk_t: Matrix
    w_uv: Matrix
    output: Matrix
    eps: float
    latent_eps: float
    scale: float
    interleaved: bool
    scratch: Scratch = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class GqaWeights:
    """Grouped-query attention. norm [D]; qkv [(Hq+2Hk) d, D], queries above keys above values; output [D, Hq d]."""

    norm: Tensor
    qkv: Matrix
    output: Matrix
    query_heads: int
    kv_heads: int
    eps: float
    scale: float
    scratch: Scratch = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class MlpWeights:
    """norm [D]; gate_up [2F,D], the gate above; down [D,F]."""

    norm: Tensor
    gate_up: Matrix
    down: Matrix
    eps: float
    scratch: Scratch = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class MoeWeights:
    """norm [D]; router [E,D]; gate_up [E,2F,D], down [E,D,F]; shared [2F',D] and [D,F']. The other
    fields are route's."""

    norm: Tensor
    router: Matrix
    gate_up: Matrix
    down: Matrix
    shared_gate_up: Matrix
    shared_down: Matrix
    eps: float
    top_k: int
    groups: int
    top_groups: int
    renormalise: bool
    scale: float
    scratch: Scratch = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Half:
    """One half of a layer: its weights, and the pages of an attention (latents; or keys, values)."""

    weights: MlaWeights | GqaWeights | MlpWeights | MoeWeights
    pages: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class DecoderWeights:
    """embedding [N,D]; attention and MLP of each layer in turn, each on the sum of those before it; final_norm [D],
    eps; head [N,D]."""

    embedding: Tensor
    halves: Sequence[Half]
    final_norm: Tensor
    eps: float
    head: Matrix
    scratch: Scratch = field(default_factory=dict, repr=False)


def mla_block(x: Tensor | None, residual: Tensor, weights: MlaWeights, rows: StepRows, pages: Tensor) -> Tensor:
    """Attention in each row's form; writes the rows' latents into `pages` first -> new [T,D].

    x, residual [T,D]; pages [B,S,R+P], or uint8 [B,S,R+P+8] (see attention.py).
    """
    _check("mla_block", x, residual, weights.norm)
    return bound.mla_block(x, residual, weights, rows, pages)


def gqa_block(
    x: Tensor | None, residual: Tensor, weights: GqaWeights, rows: StepRows, k_pages: Tensor, v_pages: Tensor
) -> Tensor:
    """Grouped-query attention, halves of each head rotated; writes keys and values first -> new [T,D]."""
    _check("gqa_block", x, residual, weights.norm)
    return bound.gqa_block(x, residual, weights, rows, k_pages, v_pages)


def mlp_block(x: Tensor | None, residual: Tensor, weights: MlpWeights) -> Tensor:
    """A gated MLP -> new [T,D]."""
    _check("mlp_block", x, residual, weights.norm)
    return bound.mlp_block(x, residual, weights)


def moe_block(x: Tensor | None, residual: Tensor, weights: MoeWeights, expert_ids: Tensor | None = None) -> Tensor:
    """Router, experts and shared expert -> new [T,D]. expert_ids: as in StepRows, of this layer, [T,K]."""
    _check("moe_block", x, residual, weights.norm)
    if expert_ids is not None:
        moe.check_expert_ids("moe_block", expert_ids, residual.shape[0], weights.top_k)
    return bound.moe_block(x, residual, weights, expert_ids)


def decoder(token_ids: Tensor, weights: DecoderWeights, rows: StepRows, logit_rows: Tensor | None) -> Tensor:
    """A whole model on one rank: the step's tokens -> logits, new fp32 [M,N].

    token_ids int64 [T], in [0, N). logit_rows int64 [M], in [0, T): whose logits; None: all T, in order. An
    implementation may run all of it in one call: the weights that stream by drive the interpreter out of the
    caches, so that each operation in between costs several times its usual microseconds.
    """
    check.sizes("decoder", token_ids=(token_ids, "T"), slots=(rows.cache_slots, "T"))
    check.dtype("decoder", torch.int64, token_ids=token_ids)
    if logit_rows is not None:
        check.dtype("decoder", torch.int64, logit_rows=logit_rows)
    if rows.expert_ids is not None:
        top_ks = weights.scratch.get("top_ks")
        if top_ks is None:
            top_ks = [half.weights.top_k for half in weights.halves if isinstance(half.weights, MoeWeights)]
            weights.scratch["top_ks"] = top_ks
        moe.check_expert_ids("decoder", rows.expert_ids, len(top_ks), len(token_ids), *top_ks[:1])
    return bound.decoder(token_ids, weights, rows, logit_rows)


def run_decoder(
    token_ids: Tensor,
    weights: DecoderWeights,
    rows: StepRows,
    logit_rows: Tensor | None,
    all_reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """The same half by half, the ranks' sums added up by `all_reduce` -> this rank's columns of the logits."""
    residual = functional.embedding(token_ids, weights.embedding)
    x: Tensor | None = None
    expert_ids = iter(() if rows.expert_ids is None else rows.expert_ids)
    for half in weights.halves:
        chosen = next(expert_ids, None) if isinstance(half.weights, MoeWeights) else None
        x = all_reduce(run_half(x, residual, half, rows, chosen))
    assert x is not None, "a model has layers"
    if logit_rows is not None:
        x, residual = x[logit_rows], residual[logit_rows]
    return linear.lm_head(norm.add_rms_norm(x, residual, weights.final_norm, weights.eps), weights.head)


def run_half(
    x: Tensor | None, residual: Tensor, half: Half, rows: StepRows, expert_ids: Tensor | None = None
) -> Tensor:
    """One half of a layer, whatever it is -> new [T,D]. expert_ids: see moe_block."""
    weights, pages = half.weights, half.pages
    match weights:
        case MlaWeights():
            return mla_block(x, residual, weights, rows, *pages)
        case GqaWeights():
            return gqa_block(x, residual, weights, rows, *pages)
        case MlpWeights():
            return mlp_block(x, residual, weights)
        case MoeWeights():
            return moe_block(x, residual, weights, expert_ids)


def _check(operation: str, x: Tensor | None, residual: Tensor, norm: Tensor) -> None:
    check.sizes(operation, residual=(residual, "T D"), norm=(norm, "D"))
    check.same_dtype(operation, residual=residual, norm=norm)
    check.require(operation, residual.is_contiguous(), "residual must be contiguous: it is written in place")
    if x is not None:
        check.require(
            operation,
            x.shape == residual.shape and x.dtype == residual.dtype and x.is_contiguous(),
            f"x is {list(x.shape)} {x.dtype}, residual {list(residual.shape)} {residual.dtype}; contiguous",
        )


def query_width(weights: MlaWeights) -> int:
    """Columns of `down` that belong to the query: Q, or H(nope+P) without a latent query."""
    return weights.down.shape[0] - weights.kv_norm.shape[0] - rope_width(weights)


def rope_width(weights: MlaWeights) -> int:
    """P."""
    heads, nope, _ = weights.w_uk.shape
    if weights.query_up is not None:
        return weights.query_up.shape[0] // heads - nope
    rank = weights.kv_norm.shape[0]
    return (weights.down.shape[0] - rank - heads * nope) // (heads + 1)
