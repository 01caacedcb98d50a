"""A step of a model as a GPU launches it: kernels/ops/compose.py's operations, each with the rows that it gets.

Where a launch does what several operations of `step_work` do, it is one operation here, with a price of its own.
Steps without prompts have MLA's products with what is around them (latents_of, absorbed_queries); in others the
queries of prompts are rotated by themselves. Operations that move next to nothing are there for their launches.

Not counted, once a step: the first layer's norm, which has a launch of its own where tokens are few; and where only
some rows' logits are wanted, the sum of the last layer's terms before those rows are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from cierzo.cache.layout import CacheLayout
from cierzo.engine.cost import operations
from cierzo.engine.cost.device import Number, Rate
from cierzo.engine.cost.operations import Work, moved, random_distinct, stored
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.engine.cost.weights import NumberFormats, sizes_of
from cierzo.engine.cost.work import Distinct, Part, StepShape, in_all_layers, pages_of
from cierzo.engine.model.config import ModelConfig


def launched_work(
    model: ModelConfig,
    layout: CacheLayout,
    formats: NumberFormats,
    step: StepShape,
    distinct: Distinct | None = None,
) -> list[Work]:
    """The operations that a step launches on a GPU. distinct: see step_work."""
    s, tokens = sizes_of(model, formats.plain), step.tokens
    linear, experts, head = (formats.of(role) for role in ("linear", "experts", "head"))
    met, sparse = replace(formats, activations=formats.plain), s.layers - s.dense_layers
    parts: list[Part] = [
        (1, *_plain(tokens, moved("rope_tables", s, tokens))),
        (1, *_plain(step.absorbed_tokens, moved("plan", s, step.absorbed_tokens))),
        *_attention(s, layout, formats, step),
        *((s.dense_layers, *one) for one in (_norm(s, tokens, linear, formats), _mlp(s, tokens, linear, formats))),
    ]
    if model.moe is not None:
        reached = distinct(tokens) if distinct else random_distinct(s.experts, s.top_k, tokens)
        terms = replace(operations.expert_mlp(s, tokens, reached, experts), operation="expert_terms")
        parts += [
            (sparse, *_norm(s, tokens, linear, met)),  # the router's rows stay in the model's dtype
            (sparse, *_plain(tokens, replace(operations.route(s, tokens), operation="route_groups"))),
            (sparse, *_weighted(tokens, experts, formats, terms)),
        ]
    parts += [
        (1, *_norm(s, step.sampled, linear, met)),
        (1, *_weighted(step.sampled, head, met, operations.lm_head(s, step.sampled, head))),
        (1, *_plain(step.sampled, moved("draw", s, step.sampled))),
    ]
    return in_all_layers(s, [part for part in parts if part[0]])


InLayer = tuple[Number, str, Rate, Work]  # a Part without its layers


def _attention(s: ModelSizes, layout: CacheLayout, formats: NumberFormats, step: StepShape) -> Iterator[Part]:
    """Attention with the products and the norm around it."""
    format, pages, tokens = formats.of("linear"), pages_of(layout), step.tokens
    page_bytes = 2 if pages == "bf16" else 1
    expanded, absorbed = step.expanded_tokens, step.absorbed_tokens
    entry = layout.bytes_per_token / layout.num_layers
    seen = absorbed, step.absorbed_pairs, step.absorbed_context, entry
    prompts = expanded, step.expanded_pairs, step.expanded_context, entry

    def plain(rows: Number, work: Work, kept: str = "bf16") -> Part:
        return s.layers, *_plain(rows, work, kept)

    def weighted(rows: Number, work: Work) -> Part:
        return s.layers, *_weighted(rows, format, formats, work)

    first, *_, (k, n) = s.projections
    after = replace(operations.linear(s, tokens, k, n, format), operation="linear_terms")
    if not s.rank:
        yield s.layers, *_norm(s, tokens, format, formats)
        yield weighted(tokens, _linear_in(s, tokens, *first, format))
        yield plain(tokens, moved("rotate_and_write_keys_values", s, tokens, page_bytes), pages)
        yield plain(absorbed, operations.gqa(s, *seen), pages)
        yield plain(expanded, replace(operations.gqa(s, *prompts), operation="gqa_prefill"), pages)
        yield weighted(tokens, after)
        return
    fp8 = formats.measured_as(format) != format
    among = np.where(np.asarray(expanded) > 0, 1.0, 0.0)  # prompts, whose queries are not absorbed
    mixed, alone = absorbed * among, absorbed * (1 - among)
    if s.query_rank:
        yield weighted(tokens, operations.latents_of(s, tokens, format, page_bytes, fp8=fp8))
        yield weighted(tokens * among, _linear_in(s, tokens, s.query_rank, s.heads * (s.nope + s.rope), format))
        yield weighted(alone, operations.absorbed_queries(s, alone, format, fp8=fp8))
    else:
        mixed = absorbed
        yield s.layers, *_norm(s, tokens, format, formats)
        yield weighted(tokens, _linear_in(s, tokens, *first, format))
        yield plain(tokens, moved("write_normed_latents", s, tokens, page_bytes), pages)
    yield plain(expanded, moved("apply_rope", s, expanded))
    yield plain(mixed, operations.rotate_and_absorb(s, mixed))
    yield plain(expanded, operations.mla_prefill(s, *prompts), pages)
    yield plain(absorbed, operations.mla_values(operations.mla_decode(s, *seen), s, absorbed), pages)
    yield weighted(tokens, after)


def _linear_in(s: ModelSizes, rows: Number, k: int, n: int, format: str) -> Work:
    return replace(operations.linear(s, rows, k, n, format), operation="linear_in")


def _norm(s: ModelSizes, rows: Number, format: str, formats: NumberFormats) -> InLayer:
    """The norm of a sum; of rows that meet weights of a format, into codes where the product takes them."""
    if formats.measured_as(format) == format:
        return _plain(rows, replace(operations.norm(s, rows, residual=True), operation="add_rms_norm"))
    work = operations.norm(s, rows, residual=True, row_bytes=int(stored("fp8", 1, s.hidden)))
    return _weighted(rows, format, formats, replace(work, operation="add_rms_norm_fp8"))


def _mlp(s: ModelSizes, rows: Number, format: str, formats: NumberFormats) -> InLayer:
    return _weighted(rows, format, formats, operations.gated_mlp(s, rows, format))


def _weighted(rows: Number, format: str, formats: NumberFormats, work: Work) -> InLayer:
    return rows, formats.measured_as(format), formats.rate(format), work


def _plain(rows: Number, work: Work, format: str = "bf16") -> InLayer:
    return rows, format, "bf16", work
