"""The blocks of a decoder layer, each one call: addition to the residual stream, norm, and all that follows.

    residual += x;  out = attention or MLP (rms_norm(residual))

x is the result of the block before (None before the first one), which may be terms (terms.py); with several ranks
it is their sum. Each block equals the composition of the single operations (compose.py): an implementation may run
it in one go, so that a step crosses from Python twice a layer, and not thirty times.

Letters: T rows of the step, D hidden width, H heads, R latent rank, P rope dims, V value dims, Q latent rank of the
query, E experts, K experts per token, F expert or MLP width; Hq and Hk query and key-value heads, d their width;
M rows whose logits are wanted, N logits of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.derived import derived
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops import moe
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ops.terms import Summands, Terms
from cierzo.kernels.registry import bound


@dataclass(frozen=True, slots=True, eq=False)
class StepRows:
    """T rows of a step: first the prompt tokens (expanded form), then the generated ones (absorbed form).

    Made of a batch by engine/worker/step_rows.py. token_ids, positions, cache_slots: int64 [T]; cache_slots[i] =
    block * S + offset is where row i's cache entry is written before anything reads it. num_expanded: rows of the
    first kind. expanded, absorbed: the segments of each kind, their rows counted from its first one. expert_ids:
    contiguous int64 [MoE layers,T,K], written: the experts that each of these layers chose for each row, best
    first; None: not wanted. image_rows int64 [I], image_embeddings [I,D], contiguous, in the embedding's dtype:
    rows of the first kind that begin with these in the place of their tokens' embeddings; None: no row does.
    """

    token_ids: Tensor
    positions: Tensor
    cache_slots: Tensor
    num_expanded: int
    expanded: PagedQueries
    absorbed: PagedQueries
    expert_ids: Tensor | None = None
    image_rows: Tensor | None = None
    image_embeddings: Tensor | None = None

    @property
    def longest_context(self) -> int:
        """Tokens in the longest context of the step; 0 without any."""
        return max((*self.expanded.contexts, *self.absorbed.contexts), default=0)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PositionTables:
    """Tables of the positions of a step's rows, the same for every layer.

    cos, sin: fp32 [T,P/2]. query_scale: fp32 [T], or None where it is 1 for every row.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
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


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class GqaWeights:
    """Grouped-query attention. norm [D]; qkv [(Hq+2Hk) d, D], queries above keys above values; output [D, Hq d]."""

    norm: Tensor
    qkv: Matrix
    output: Matrix
    query_heads: int
    kv_heads: int
    eps: float
    scale: float


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class MlpWeights:
    """A gated MLP. norm [D]; gate_up [2F,D], the gate above; down [D,F]."""

    norm: Tensor
    gate_up: Matrix
    down: Matrix
    eps: float


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class MoeWeights:
    """A mixture of experts. norm [D]; router [E,D]; gate_up [E,2F,D], down [E,D,F]; shared [2F',D] and [D,F']. The
    other fields are route's."""

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


BlockWeights = MlaWeights | GqaWeights | MlpWeights | MoeWeights


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class DecoderWeights:
    """A model on one rank. embedding [N,D]; final_norm [D], eps; head [N,D].

    blocks: attention and MLP of each layer in turn, each on the sum of those before it. pages: those of each
    attention in turn (latents; or keys, values).
    """

    embedding: Tensor
    blocks: Sequence[BlockWeights]
    pages: Sequence[tuple[Tensor, ...]]
    final_norm: Tensor
    eps: float
    head: Matrix


def mla_block(
    x: Summands | None, residual: Tensor, weights: MlaWeights, rows: StepRows, tables: PositionTables, pages: Tensor
) -> Summands:
    """Attention in each row's form; writes the rows' latents into `pages` first -> new [T,D].

    x, residual [T,D]; pages [B,S,R+P], or uint8 [B,S,R+P+8] (see attention.py).
    """
    _check("mla_block", x, residual, weights.norm)
    return bound.mla_block(x, residual, weights, rows, tables, pages)


def gqa_block(
    x: Summands | None,
    residual: Tensor,
    weights: GqaWeights,
    rows: StepRows,
    tables: PositionTables,
    k_pages: Tensor,
    v_pages: Tensor,
) -> Summands:
    """Grouped-query attention, halves of each head rotated, queries then scaled; writes keys and values first ->
    new [T,D]."""
    _check("gqa_block", x, residual, weights.norm)
    return bound.gqa_block(x, residual, weights, rows, tables, k_pages, v_pages)


def mlp_block(x: Summands | None, residual: Tensor, weights: MlpWeights) -> Summands:
    """A gated MLP -> new [T,D]."""
    _check("mlp_block", x, residual, weights.norm)
    return bound.mlp_block(x, residual, weights)


def moe_block(
    x: Summands | None, residual: Tensor, weights: MoeWeights, expert_ids: Tensor | None = None
) -> Summands:
    """Router, experts and shared expert -> new [T,D]. expert_ids: as in StepRows, of this layer, [T,K]."""
    _check("moe_block", x, residual, weights.norm)
    if expert_ids is not None:
        moe.check_expert_ids("moe_block", expert_ids, residual.shape[0], weights.top_k)
    return bound.moe_block(x, residual, weights, expert_ids)


def decoder(weights: DecoderWeights, rows: StepRows, tables: PositionTables, logit_rows: Tensor | None) -> Tensor:
    """A whole model on one rank: the step's tokens, in [0, N) -> logits, new fp32 [M,N].

    logit_rows int64 [M], in [0, T): whose logits; None: all T, in order. An implementation may run all of it in
    one call: the weights that stream by drive the interpreter out of the caches, so that each operation in between
    costs several times its usual microseconds.
    """
    check.sizes("decoder", token_ids=(rows.token_ids, "T"), slots=(rows.cache_slots, "T"))
    check.dtype("decoder", torch.int64, token_ids=rows.token_ids)
    if logit_rows is not None:
        check.dtype("decoder", torch.int64, logit_rows=logit_rows)
    if rows.expert_ids is not None:
        top_ks = _top_ks(weights)
        moe.check_expert_ids("decoder", rows.expert_ids, len(top_ks), len(rows.token_ids), *top_ks[:1])
    if rows.image_rows is not None and rows.image_embeddings is not None:
        check.sizes(
            "decoder",
            image_rows=(rows.image_rows, "I"),
            image_embeddings=(rows.image_embeddings, "I D"),
            embedding=(weights.embedding, "N D"),
        )
        check.dtype("decoder", torch.int64, image_rows=rows.image_rows)
        check.same_dtype("decoder", embedding=weights.embedding, image_embeddings=rows.image_embeddings)
        contiguous = rows.image_rows.is_contiguous() and rows.image_embeddings.is_contiguous()
        check.require("decoder", contiguous, "image_rows and image_embeddings must be contiguous")
    return bound.decoder(weights, rows, tables, logit_rows)


@derived
def _top_ks(weights: DecoderWeights) -> list[int]:
    """Experts per token of each MoE layer."""
    return [block.top_k for block in weights.blocks if isinstance(block, MoeWeights)]


def _check(operation: str, x: Summands | None, residual: Tensor, norm: Tensor) -> None:
    check.sizes(operation, residual=(residual, "T D"), norm=(norm, "D"))
    check.same_dtype(operation, residual=residual, norm=norm)
    check.require(operation, residual.is_contiguous(), "residual must be contiguous: it is written in place")
    if x is not None:
        check.require(
            operation,
            x.shape == residual.shape and x.dtype == residual.dtype and (isinstance(x, Terms) or x.is_contiguous()),
            f"x is {list(x.shape)} {x.dtype}, residual {list(residual.shape)} {residual.dtype}; contiguous",
        )


def query_width(weights: MlaWeights) -> int:
    """Columns of `down` that belong to the query: Q, or H(nope+P) without a latent query."""
    return weights.down.shape[0] - weights.kv_norm.shape[0] - rope_width(weights)


def rope_width(weights: MlaWeights) -> int:
    """P, the rope dims of a head."""
    heads, nope, _ = weights.w_uk.shape
    if weights.query_up is not None:
        return weights.query_up.shape[0] // heads - nope
    rank = weights.kv_norm.shape[0]
    return (weights.down.shape[0] - rank - heads * nope) // (heads + 1)
