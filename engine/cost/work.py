"""A step of a model as a list of operations; see operations.py.

The names are those under which `cierzo bench step --profile` and the GPU bench measure. Every number of a
`StepShape` may be an array over several steps: so are the works then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cierzo.cache.layout import CacheLayout
from cierzo.engine.cost import operations
from cierzo.engine.cost.device import Number, Rate
from cierzo.engine.cost.operations import Work, random_distinct
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.engine.cost.weights import NumberFormats, sizes_of
from cierzo.engine.expert_statistics import ExpertStatistics, expected_distinct
from cierzo.engine.model.config import ModelConfig

# Sizes of a step, in tokens, at which expert statistics are asked; beyond the last nearly all experts have tokens.
STEP_SIZES = np.unique(np.geomspace(1, 1 << 14, 57).astype(np.int64))
Distinct = Callable[[Number], Number]  # tokens of a step -> experts that have any, in a layer on average


@dataclass(frozen=True, slots=True)
class StepShape:
    """Rows that a step computes: prompt tokens in expanded form, generated tokens in absorbed form.

    pairs: of a query row and a key that it sees. context: tokens that attention reads, those of a sequence once.
    sampled: rows whose logits are wanted. embeddings, embedding_pairs: of images that the step makes, their tokens,
    and the squares of these.
    """

    expanded_tokens: Number = 0.0
    expanded_pairs: Number = 0.0
    expanded_context: Number = 0.0
    absorbed_tokens: Number = 0.0
    absorbed_pairs: Number = 0.0
    absorbed_context: Number = 0.0
    sampled: Number = 0.0
    embeddings: Number = 0.0
    embedding_pairs: Number = 0.0

    @classmethod
    def of(cls, pieces: Sequence[tuple[float, int]], *, generated: bool) -> StepShape:
        """The shape of a step that computes of each sequence so many tokens from a position on: (position, tokens).
        generated: in absorbed form. Each sequence's last row is sampled."""
        starts, counts = np.array(pieces, dtype=np.float64).T
        pairs = counts * starts + counts * (counts + 1) / 2
        sums = (float(counts.sum()), float(pairs.sum()), float((starts + counts).sum()))
        none = (0.0, 0.0, 0.0)
        return cls(*(none + sums if generated else sums + none), float(len(pieces)))

    @property
    def tokens(self) -> Number:
        """T."""
        return self.expanded_tokens + self.absorbed_tokens


def measured_distinct(statistics: ExpertStatistics) -> Distinct:
    """Distinct experts from what tokens chose (`expected_distinct`), averaged over the layers; straight lines in
    log(1 + T) between STEP_SIZES. Raises ValueError where nothing was counted."""
    layers = range(len(statistics.layers))
    found = [[expected_distinct(statistics, layer, float(size)) for layer in layers] for size in STEP_SIZES]
    points = np.concatenate([[0.0], np.log1p(STEP_SIZES)])
    means = np.concatenate([[0.0], np.mean(found, axis=1)])

    def distinct(tokens: Number) -> Number:
        return np.interp(np.log1p(tokens), points, means)

    return distinct


def step_work(
    model: ModelConfig,
    layout: CacheLayout,
    formats: NumberFormats,
    step: StepShape,
    distinct: Distinct | None = None,
) -> list[Work]:
    """The operations of a step. distinct: of a model with experts; by default as if chosen at random."""
    s, plain, tokens = sizes_of(model, formats.plain), formats.plain, step.tokens
    linear, experts, head = formats.of("linear"), formats.of("experts"), formats.of("head")
    sparse = s.layers - s.dense_layers
    parts = [  # layers that have the operation, its rows, the format of its weights, its work in one layer
        (2 * s.layers, tokens, plain, operations.norm(s, tokens, residual=True)),
        (1, step.sampled, plain, operations.norm(s, step.sampled, residual=True)),
        *((s.layers, tokens, linear, operations.linear(s, tokens, k, n, linear)) for k, n in s.projections),
        *((s.layers, rows, plain, work) for rows, work in _attention(s, layout, step)),
        (1, step.sampled, head, operations.lm_head(s, step.sampled, head)),
    ]
    if model.moe is not None:
        reached = distinct(tokens) if distinct else random_distinct(s.experts, s.top_k, tokens)
        parts.append((sparse, tokens, plain, operations.route(s, tokens)))
        parts.append((sparse, tokens, experts, operations.expert_mlp(s, tokens, reached, experts)))
    if s.dense_layers:
        parts.append((s.dense_layers, tokens, linear, operations.gated_mlp(s, tokens, linear)))
    found: list[Part] = []
    for layers, rows, format, work in parts:
        met = replace(formats, activations=formats.plain) if work.operation == "lm_head" else formats
        stored = pages_of(layout) if work.kind == "attention" else met.measured_as(format)
        found.append((layers, rows, stored, met.rate(format), work))
    return in_all_layers(s, found)


Part = tuple[int, Number, str, Rate, Work]  # layers, rows, format by the GPU bench's name, rate, work in one layer


def in_all_layers(s: ModelSizes, parts: Sequence[Part]) -> list[Work]:
    """Works in all layers that have them, those of one operation together."""
    found: dict[str, Work] = {}
    for part in parts:
        work = _in_layers(s, part)
        found[work.operation] = found[work.operation] + work if work.operation in found else work
    return [*found.values()]


def _in_layers(s: ModelSizes, part: Part) -> Work:
    layers, rows, format, rate, work = part
    times = layers * np.minimum(rows, 1.0)  # nothing is read for no rows
    return replace(
        work,
        calls=layers,
        num_bytes=times * work.num_bytes,
        operations=times * work.operations,
        replicated_bytes=times * work.replicated_bytes,
        rate=rate,
        width=s.hidden,
        format=format,
    )


def pages_of(layout: CacheLayout) -> str:
    """Number format of the cache's pages."""
    return "bf16" if layout.dtype == "bfloat16" else layout.dtype


def tower_work(model: ModelConfig, formats: NumberFormats, embeddings: int) -> list[Work]:
    """The products of the vision tower for an image of so many embeddings, whose patches see each other. All are
    priced as the text model's dense products of their size are: nobody has predicted the tower's own kernels."""
    s, vision, plain = sizes_of(model, formats.plain), model.vision, formats.plain
    assert vision is not None
    merged, hidden, width = vision.merge**2, vision.hidden_size, vision.mlp_width
    patches, layers = embeddings * merged, vision.num_layers
    parts = [
        (1, operations.linear(s, patches, 3 * vision.patch**2, hidden, plain)),
        (layers, operations.linear(s, patches, hidden, 3 * hidden, plain)),
        (layers, Work("linear", 4 * patches * hidden * s.value_bytes, 4 * patches**2 * hidden)),  # attention
        (layers, operations.linear(s, patches, hidden, hidden, plain)),
        (layers, operations.linear(s, patches, hidden, 2 * width, plain)),
        (layers, operations.linear(s, patches, width, hidden, plain)),
        (1, operations.linear(s, embeddings, merged * hidden, hidden, plain)),
        (1, operations.linear(s, embeddings, hidden, s.hidden, plain)),
        (1, operations.linear(s, embeddings, s.hidden, s.hidden, plain)),
    ]
    format = formats.measured_as(plain if formats.on_gpu else formats.of("linear"))
    return [_in_layers(s, (calls, patches, format, formats.rate(plain), work)) for calls, work in parts]


def _attention(s: ModelSizes, layout: CacheLayout, step: StepShape) -> Iterator[tuple[Number, Work]]:
    """(rows, work) of one layer's attention: of generated rows, then of prompts."""
    entry_bytes = layout.bytes_per_token / layout.num_layers
    generated, prompt = step.absorbed_tokens, step.expanded_tokens
    absorbed = generated, step.absorbed_pairs, step.absorbed_context, entry_bytes
    expanded = prompt, step.expanded_pairs, step.expanded_context, entry_bytes
    if not s.rank:
        yield generated, operations.gqa(s, *absorbed)
        yield prompt, replace(operations.gqa(s, *expanded), operation="gqa_prefill")
        return
    yield generated, operations.by_head("mla_absorb", s, generated)
    yield generated, operations.by_head("mla_unabsorb", s, generated)
    yield generated, operations.mla_decode(s, *absorbed)
    yield prompt, operations.mla_prefill(s, *expanded)
