"""Attention of prompt tokens in C++: every instruction set, odd sizes, contexts of many blocks.

A row's bits are its own, however its prompt was cut and whatever stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
from paged_cases import HUGE, NAN, SEGMENTS, assert_attends, attend, expanded, make_case, make_queries
from rounding import Near, assert_near, exact
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cpu import native
from cierzo.kernels.formats import kv_int8
from cierzo.kernels.ops import attention
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.pack import pack
from cierzo.kernels.ref import attention as ref
from cierzo.kernels.registry import bind

DTYPES = [torch.float32, torch.bfloat16]
SCALE = 0.3
LENGTH = 700  # several softmax blocks and stretches of expanded keys, and no multiple of either
Segment = tuple[int, int, int]  # a sequence, its first row and the one past its last


@pytest.fixture(autouse=True)
def _bound() -> None:
    if not native.available():
        pytest.skip("the native kernels are not built, or this CPU has none of their instruction sets")
    bind(KernelsConfig(), "cpu")
    native.set_threads(1)


@dataclass(frozen=True)
class Model:
    """Sizes of one attention. MLA has a rank; GQA has kv_heads, and nope as the width of a head."""

    heads: int
    nope: int
    rope: int = 0
    rank: int = 0
    value_width: int = 0
    kv_heads: int = 0

    @property
    def entry(self) -> tuple[int, ...]:
        """Shape of what is cached of a token."""
        return (self.rank + self.rope,) if self.rank else (2, self.kv_heads, self.nope)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(5)
        w_uk = torch.randn(self.heads, self.nope, self.rank, generator=random)
        w_uv = torch.randn(self.heads, self.value_width, self.rank, generator=random)
        return (w_uk * 0.3).to(dtype), (w_uv * 0.3).to(dtype)

    def call(self, q: Tensor, pages: list[Tensor], queries: PagedQueries, scale: float = SCALE) -> Tensor:
        if self.rank:
            return attention.mla_prefill(q, pages[0], *self.weights(q.dtype), queries, scale)
        return attention.gqa_prefill(q, *pages, queries, scale)

    def call_ref(self, q: Tensor, pages: list[Tensor], queries: PagedQueries) -> Tensor:
        if self.rank:
            return ref.mla_prefill(q, pages[0], *self.weights(q.dtype), queries, SCALE)
        return ref.gqa_prefill(q, *pages, queries, SCALE)

    def keys_values(self, context: Tensor, dtype: torch.dtype) -> tuple[Near, Near]:
        """Expand a dense context [c, *entry] in fp64 into keys [c,H,nope+P] and values [c,H,V]."""
        if not self.rank:
            group = self.heads // self.kv_heads
            keys, values = (exact(context[:, which].repeat_interleave(group, dim=1)) for which in (0, 1))
            return keys, values
        return expanded(context, *self.weights(dtype), dtype)


MLA = Model(heads=3, nope=6, rope=4, rank=10, value_width=7)
GQA = Model(heads=6, nope=8, kv_heads=2)
MODELS = [pytest.param(MLA, id="mla"), pytest.param(GQA, id="gqa")]


@dataclass(frozen=True)
class Batch:
    """Segments of sequences in pages of their own, scattered and poisoned as in paged_cases."""

    q: Tensor
    pages: list[Tensor]
    queries: PagedQueries


def random_sequence(model: Model, dtype: torch.dtype, seed: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Queries [L,H,nope+P] and what is cached, [L, *entry]."""
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(length, model.heads, model.nope + model.rope, generator=random)
    return q.to(dtype), torch.randn(length, *model.entry, generator=random).to(dtype)


def make_batch(
    model: Model,
    sequences: list[tuple[Tensor, Tensor]],
    segments: list[Segment],
    block_tokens: int = 16,
    int8: bool = False,
) -> Batch:
    random = torch.Generator().manual_seed(len(segments))
    needed = [-(-len(cached) // block_tokens) for _, cached in sequences]
    ids = torch.randperm(sum(needed) + 3, generator=random)
    tables = torch.full((len(sequences), max(needed) + 2), HUGE, dtype=torch.int32)
    parts = [(slice(None),)] if model.rank else [(slice(None), 0), (slice(None), 1)]
    pages = []
    for part in parts:
        filled = [stored(model, cached[part], int8) for _, cached in sequences]
        poison = 255 if int8 else NAN  # a scale of 255s is a NaN
        memory = torch.full((len(ids) * block_tokens, *filled[0].shape[1:]), poison, dtype=filled[0].dtype)
        used = 0
        for row, rows in enumerate(filled):
            own = ids[used : used + needed[row]]
            used += needed[row]
            tables[row, : len(own)] = own.int()
            positions = torch.arange(len(rows))
            memory[own[positions // block_tokens] * block_tokens + positions % block_tokens] = rows
        pages.append(memory.unflatten(0, (len(ids), block_tokens)))
    q = torch.cat([sequences[which][0][first:last] for which, first, last in segments])
    lengths = [(last - first, last) for _, first, last in segments]
    return Batch(q, pages, make_queries(lengths, torch.tensor([which for which, _, _ in segments]), tables))


def stored(model: Model, values: Tensor, int8: bool) -> Tensor:
    if not int8:
        return values
    if model.rank:
        return kv_int8.quantise_latents(*values.tensor_split((model.rank,), dim=1))
    return kv_int8.quantise(values)


def segments_near(
    model: Model, q: Tensor, queries: PagedQueries, sequences: list[tuple[Tensor, Tensor]], segments: list[Segment]
) -> Near:
    """Exact results of the segments' rows, and how far from them a result may lie."""
    both = [model.keys_values(sequences[which][1][:last].double(), q.dtype) for which, _, last in segments]
    return attend(q, queries, both, SCALE)


def read(model: Model, values: Tensor) -> Tensor:
    """Float32 values as they are read after they were stored as INT8."""
    rows = stored(model, values, int8=True)
    if model.rank:
        return kv_int8.dequantise_latents(rows, model.rank, torch.float32)
    return kv_int8.dequantise(rows, torch.float32)


def results(model: Model, batch: Batch) -> list[Tensor]:
    """One tensor per segment."""
    return list(model.call(batch.q, batch.pages, batch.queries).split(batch.queries.query_lengths))


def random_cut(length: int, longest: int, seed: int) -> list[tuple[int, int]]:
    random = torch.Generator().manual_seed(seed)
    ends = [0]
    while ends[-1] < length:
        ends.append(min(length, ends[-1] + int(torch.randint(1, longest + 1, (), generator=random))))
    return list(pairwise(ends))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_hostile_cases(instruction_set: str, model: Model, dtype: torch.dtype) -> None:
    for name in SEGMENTS:
        case = make_case(name, model.nope + model.rope, model.heads, dtype, entry=model.entry)
        pages = [case.pages] if model.rank else [page.contiguous() for page in case.pages.unbind(2)]
        result = model.call(case.q, pages, case.queries)
        both = [model.keys_values(context, dtype) for context in case.contexts]
        assert_attends(result, case, both, SCALE)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8 pages"])
@pytest.mark.parametrize("model", MODELS)
def test_a_row_has_its_bits_however_its_prompt_is_cut(instruction_set: str, model: Model, kind: str) -> None:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    sequences = [random_sequence(model, dtype, seed) for seed in (1, 2)]
    batch = partial(make_batch, model, sequences, int8=kind == "int8 pages")
    whole = results(model, batch([(0, 0, LENGTH)]))[0]
    assert whole.isfinite().all()

    cut = random_cut(LENGTH, 150, seed=3)
    for block_tokens, threads in ((16, 1), (7, 2)):  # chunks in one step, beside another sequence's, in other pages
        native.set_threads(threads)
        segments = [(0, first, last) for first, last in cut]
        beside = [(1, max(0, last - 40), last) for _, last in cut]
        mixed = [segment for pair in zip(beside, segments, strict=True) for segment in pair]
        pieces = results(model, batch(mixed, block_tokens))[1::2]
        assert torch.equal(torch.cat(pieces), whole)
    native.set_threads(1)
    for first, last in [(0, 1), (127, 129), (255, 256), (LENGTH - 1, LENGTH)]:  # chunks alone
        assert torch.equal(results(model, batch([(0, first, last)]))[0], whole[first:last])


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(Model(heads=1, nope=6, rope=4, rank=3, value_width=7), id="mla"),
        pytest.param(Model(heads=3, nope=8, kv_heads=1), id="gqa"),
    ],
)
def test_a_head_whose_rows_are_shared_between_threads(model: Model, threads: int) -> None:
    batch = make_batch(model, [random_sequence(model, torch.bfloat16, 4)], [(0, 0, LENGTH)])
    alone = results(model, batch)[0]
    native.set_threads(threads)
    assert torch.equal(results(model, batch)[0], alone)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8 pages"])
@pytest.mark.parametrize("model", MODELS)
def test_long_contexts(instruction_set: str, model: Model, kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    sequences = [random_sequence(model, dtype, seed) for seed in (6, 7)]
    segments = [(0, 600, LENGTH), (1, 0, LENGTH), (0, 0, 33), (1, LENGTH - 1, LENGTH)]
    batch = make_batch(model, sequences, segments, int8=kind == "int8 pages")
    if kind == "int8 pages":
        sequences = [(q, read(model, cached)) for q, cached in sequences]
    expected = segments_near(model, batch.q, batch.queries, sequences, segments)
    assert_near(model.call(batch.q, batch.pages, batch.queries), expected)
    assert_near(model.call_ref(batch.q, batch.pages, batch.queries), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "model",
    [
        Model(heads=2, nope=64, rope=64, rank=256, value_width=128),
        Model(heads=2, nope=5, rope=3, rank=7, value_width=1),
        Model(heads=1, nope=1, rope=1, rank=1, value_width=33),
        Model(heads=2, nope=33, rope=17, rank=40, value_width=66),
        Model(heads=4, nope=128, kv_heads=2),
        Model(heads=9, nope=64, kv_heads=3),
        Model(heads=5, nope=7, kv_heads=1),
        Model(heads=2, nope=34, kv_heads=2),
    ],
    ids=str,
)
def test_sizes_that_fit_no_tile(instruction_set: str, model: Model, dtype: torch.dtype) -> None:
    sequences = [random_sequence(model, dtype, 8, length=150)]
    segments = [(0, 0, 35), (0, 100, 150)]
    batch = make_batch(model, sequences, segments)
    q, pages = batch.q * 0.3, batch.pages  # the widest heads would attend to one token alone
    expected = segments_near(model, q, batch.queries, sequences, segments)
    assert_near(model.call(q, pages, batch.queries), expected)
    assert_near(model.call_ref(q, pages, batch.queries), expected)


def growing(length: int) -> Tensor:
    return torch.arange(length) / length


@pytest.mark.parametrize("order", [growing, lambda n: 1 - growing(n)], ids=["rising", "falling"])
def test_scores_whose_peak_moves_by_hundreds(instruction_set: str, order: Callable[[int], Tensor]) -> None:
    model = Model(heads=1, nope=8, kv_heads=1)
    q, cached = random_sequence(model, torch.float32, 9)
    q = torch.ones_like(q)
    cached[:, 0] = order(LENGTH)[:, None, None] * 100  # scores from 0 to 240
    batch = make_batch(model, [(q, cached)], [(0, LENGTH - 5, LENGTH)])
    keys, values = cached.double().unbind(1)
    scores = torch.einsum("hd,chd->hc", q[-1].double(), keys) * SCALE
    expected = torch.einsum("hc,chd->hd", scores.softmax(-1), values)
    torch.testing.assert_close(results(model, batch)[0][-1], expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_a_nan_stays_in_the_rows_that_see_it(instruction_set: str, model: Model) -> None:
    sequences = [random_sequence(model, torch.bfloat16, seed) for seed in (1, 2)]
    before, clean = results(model, make_batch(model, sequences, [(0, 150, 300), (1, 0, 300)]))
    sequences[0][1][200] = NAN
    poisoned, beside = results(model, make_batch(model, sequences, [(0, 150, 300), (1, 0, 300)]))
    assert torch.equal(beside, clean)
    assert poisoned[50:].isnan().all()
    assert torch.equal(
        poisoned[:11], before[:11]
    )  # 40 positions before it; nearer ones may have it (ops/attention.py)


def test_a_quantised_expander_is_refused_by_name(instruction_set: str) -> None:
    w_uk, w_uv = Model(heads=2, nope=32, rope=4, rank=64, value_width=32).weights(torch.bfloat16)
    case = make_case("mixed", 36, 2, torch.bfloat16, entry=(68,))
    with pytest.raises(ArgumentError, match="mla_prefill: w_uv must be packed as bf16, is int8"):
        attention.mla_prefill(case.q, case.pages, pack(w_uk, "bf16"), pack(w_uv, "int8"), case.queries, SCALE)
