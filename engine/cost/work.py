"""A step of a model as operations: how many bytes each must read, how many operations it must compute.

Bytes are those of the weights and cached rows that an operation touches, each once, and of the rows that go in and
out of norms and products; what an implementation moves beyond that is its own cost. The names are those of
kernels/ops, under which `cierzo bench step --profile` and the GPU bench measure. Formulas: docs/model.md; counted
as in bench/work.py.

Every number of a `StepShape` may be an array over several steps: so are the works then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from cierzo.cache.layout import VALUE_BYTES, CacheLayout
from cierzo.engine.cost.device import Kind, Number, Rate
from cierzo.engine.device_memory import BYTES
from cierzo.engine.expert_statistics import ExpertStatistics, expected_distinct
from cierzo.engine.model.config import GqaConfig, MlaConfig, ModelConfig, MoeConfig

# Sizes of a step, in tokens, at which expert statistics are asked; beyond the last nearly all experts have tokens.
STEP_SIZES = np.unique(np.geomspace(1, 1 << 14, 57).astype(np.int64))
Distinct = Callable[[Number], Number]  # tokens of a step -> experts that have any, in a layer on average


class NumberFormats(msgspec.Struct, frozen=True, kw_only=True):
    """Of weights, of the activations that meet them, and where: it decides which matrices keep more bits."""

    weights: str
    plain: str = "bf16"
    activations: str = "bf16"
    on_gpu: bool = True

    @property
    def dense(self) -> str:
        """Of all dense products but the head's; as engine/weights/matrices.py gives them."""
        return "fp8" if self.on_gpu and self.weights == "nvfp4" else self.weights

    @property
    def head(self) -> str:
        """Of the output head."""
        return self.plain if self.on_gpu or self.weights == self.plain else "int8"

    def rate(self, weights: str) -> Rate:
        """What a product with these weights is computed in: codes are widened to the activations' format, but FP8
        meets FP8 where the activations have it, and a CPU multiplies bytes."""
        if self.plain == "float32":
            return "fp32"
        if self.on_gpu:
            return "fp8" if self.activations == "fp8" and weights == "fp8" else "bf16"
        return "bf16" if weights == "bf16" else "int8"

    def measured_as(self, weights: str) -> str:
        """What the GPU bench calls products with these weights (bench/gpu/cases.py)."""
        return "fp8 x fp8" if self.rate(weights) == "fp8" else weights


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step computes. Rows in expanded form are prompt tokens, in absorbed form generated ones.

    pairs: of a query row and a key that it sees. context: tokens that attention reads, those of a sequence once.
    sampled: rows whose logits are wanted.
    """

    expanded_tokens: Number = 0.0
    expanded_pairs: Number = 0.0
    expanded_context: Number = 0.0
    absorbed_tokens: Number = 0.0
    absorbed_pairs: Number = 0.0
    absorbed_context: Number = 0.0
    sampled: Number = 0.0

    @property
    def tokens(self) -> Number:
        """T."""
        return self.expanded_tokens + self.absorbed_tokens


@dataclass(frozen=True, slots=True)
class Work:
    """All calls of one operation in a step. `format`: of its weights or pages. `replicated_bytes`: of them each of
    several cards reads all."""

    operation: str
    kind: Kind
    calls: int
    operations: Number
    num_bytes: Number
    rate: Rate
    format: str
    replicated_bytes: Number = 0.0

    def __add__(self, other: Work) -> Work:
        """The calls of both, which are of one operation."""
        return replace(
            self,
            calls=self.calls + other.calls,
            operations=self.operations + other.operations,
            num_bytes=self.num_bytes + other.num_bytes,
            replicated_bytes=self.replicated_bytes + other.replicated_bytes,
        )


def uniform_distinct(moe: MoeConfig) -> Distinct:
    """Of experts chosen at random: E (1 - (1 - K/E)^T)."""
    missed = 1 - moe.experts_per_token / moe.num_experts
    return lambda tokens: moe.num_experts * (1 - missed**tokens)


def measured_distinct(statistics: ExpertStatistics) -> Distinct:
    """Of what tokens chose (`expected_distinct`), averaged over the layers; straight lines in log(1 + T) between
    STEP_SIZES. Raises ValueError where nothing was counted."""
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
    counted = _Counter(model, layout, formats, step)
    found = [*counted.norms(), *counted.attention()]
    if model.moe is not None:
        found += counted.experts(model.moe, distinct or uniform_distinct(model.moe))
    dense_layers = model.num_layers if model.moe is None else model.moe.first_dense_layers
    if dense_layers:
        found += counted.gated_mlp("gated_mlp", dense_layers, model.mlp_width, formats.dense)
    found.append(counted.product("lm_head", 1, model.hidden_size, model.vocab_size, step.sampled, formats.head))
    together: dict[str, Work] = {}
    for work in found:
        together[work.operation] = together[work.operation] + work if work.operation in together else work
    return [*together.values()]


class _Counter:
    """The arguments that all operations share."""

    def __init__(self, model: ModelConfig, layout: CacheLayout, formats: NumberFormats, step: StepShape) -> None:
        self.model, self.layout, self.formats, self.step = model, layout, formats, step
        self.value_bytes = BYTES[formats.plain]
        rows = 1 if layout.kind == "mla" else 2 * layout.num_kv_heads
        self.pages = "bf16" if layout.dtype == "bfloat16" else layout.dtype
        self.cached_bytes = rows * layout.page_width * VALUE_BYTES[layout.dtype]  # of a token, one layer

    def product(self, name: str, calls: int, k: int, n: int, rows: Number, format: str, *, heads: int = 0) -> Work:
        """rows x [k] with a matrix [n,k], or one for each of `heads`; nothing is read where there are no rows."""
        matrices = calls * (heads or 1)
        weights = matrices * n * k * BYTES[format] * np.minimum(rows, 1.0)
        moved = weights + matrices * rows * (k + n) * self.value_bytes
        operations = 2.0 * matrices * rows * n * k
        rate, measured_as = self.formats.rate(format), self.formats.measured_as(format)
        return Work(name, "products", calls, operations, moved, rate, measured_as)

    def norms(self) -> Iterator[Work]:
        """Two of hidden rows a layer, each with a residual, and the last one, of rows whose logits are wanted."""
        halves = 2 * self.model.num_layers
        calls, rows = halves + 1, halves * self.step.tokens + self.step.sampled
        values = 4 * self.model.hidden_size * rows
        plain = self.formats.plain
        yield Work("norm", "memory", calls, values, values * self.value_bytes, self.formats.rate(plain), plain)

    def attention(self) -> Iterator[Work]:
        """Projections and the attention itself."""
        if isinstance(self.model.attention, MlaConfig):
            yield from self._mla(self.model.attention)
        else:
            yield from self._gqa(self.model.attention)

    def _mla(self, mla: MlaConfig) -> Iterator[Work]:
        """Its projections run on the card that holds a sequence's latents: several cards hold them all."""
        model, step, heads, rank = self.model, self.step, self.model.num_heads, mla.kv_lora_rank
        layers, hidden, dense = model.num_layers, model.hidden_size, self.formats.dense
        nope, rope, values = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim
        projections = [(hidden, (mla.q_lora_rank or heads * (nope + rope)) + rank + rope), (heads * values, hidden)]
        if mla.q_lora_rank:
            projections.append((mla.q_lora_rank, heads * (nope + rope)))
        for k, n in projections:
            yield _replicated(self.product("linear", layers, k, n, step.tokens, dense))
        plain, generated = self.formats.plain, step.absorbed_tokens
        for name, k, n in (("mla_absorb", nope, rank), ("mla_unabsorb", rank, values)):
            yield _replicated(self.product(name, layers, k, n, generated, plain, heads=heads))
        rate = self.formats.rate(plain)
        scores = 2.0 * layers * heads * (rank + rope + rank)
        cached = layers * self.cached_bytes
        read = cached * step.absorbed_context
        yield Work("mla_decode", "attention", layers, scores * step.absorbed_pairs, read, rate, self.pages)
        expansion = rank * (nope + values)
        computed = (
            2.0
            * layers
            * heads
            * (step.expanded_pairs * (nope + rope + values) + step.expanded_context * expansion)
        )
        yield Work("mla_prefill", "attention", layers, computed, cached * step.expanded_context, rate, self.pages)

    def _gqa(self, gqa: GqaConfig) -> Iterator[Work]:
        model, step, width = self.model, self.step, gqa.head_dim
        layers, hidden, heads = model.num_layers, model.hidden_size, model.num_heads
        for k, n in ((hidden, (heads + 2 * gqa.num_kv_heads) * width), (heads * width, hidden)):
            yield self.product("linear", layers, k, n, step.tokens, self.formats.dense)
        rate, cached = self.formats.rate(self.formats.plain), layers * self.cached_bytes
        for name, pairs, context in (
            ("gqa_decode", step.absorbed_pairs, step.absorbed_context),
            ("gqa_prefill", step.expanded_pairs, step.expanded_context),
        ):
            yield Work(
                name, "attention", layers, 4.0 * layers * heads * width * pairs, cached * context, rate, self.pages
            )

    def experts(self, moe: MoeConfig, distinct: Distinct) -> Iterator[Work]:
        """Routing; then the experts that have rows, each read once, and the shared one, in one operation."""
        layers = self.model.num_layers - moe.first_dense_layers
        hidden, tokens, width = self.model.hidden_size, self.step.tokens, moe.expert_width
        yield self.product("route", layers, hidden, moe.num_experts, tokens, self.formats.plain)
        format = self.formats.weights
        matrix, shared = 3 * hidden * width, moe.num_shared_experts
        reads = distinct(tokens) + shared * np.minimum(tokens, 1.0)
        rows = tokens * (moe.experts_per_token + shared)
        moved = layers * (reads * matrix * BYTES[format] + rows * 2 * (hidden + width) * self.value_bytes)
        rate, measured_as = self.formats.rate(format), self.formats.measured_as(format)
        yield Work("expert_mlp", "experts", layers, 2.0 * layers * rows * matrix, moved, rate, measured_as)

    def gated_mlp(self, name: str, layers: int, width: int, format: str) -> Iterator[Work]:
        """gate and up, then down."""
        hidden, tokens = self.model.hidden_size, self.step.tokens
        weights = layers * 3 * hidden * width * BYTES[format] * np.minimum(tokens, 1.0)
        moved = weights + layers * tokens * 2 * (hidden + width) * self.value_bytes
        operations = 2.0 * layers * tokens * 3 * hidden * width
        rate, measured_as = self.formats.rate(format), self.formats.measured_as(format)
        yield Work(name, "products", layers, operations, moved, rate, measured_as)


def _replicated(work: Work) -> Work:
    """The weights around MLA lie whole on each card. Rows do not, but weigh next to nothing beside them."""
    return replace(work, replicated_bytes=work.num_bytes)
