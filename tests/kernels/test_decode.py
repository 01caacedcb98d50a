"""Attention of generated tokens in C++: every instruction set, odd sizes, contexts of many splits.

A row's bits are its own: alone, beside others, with any number of threads, in blocks of any size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import ModuleType

import pytest
import torch
from paged_cases import NAN, SEGMENTS, assert_attends, make_case
from paged_sequences import SCALE, Form, Sequence, make_batch, random_sequence, segments_near
from rounding import assert_near, exact, product, rounded
from torch import Tensor

from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cpu import native
from cierzo.kernels.ops import attention
from cierzo.kernels.ref import attention as ref
from cierzo.kernels.registry import bind, bound

DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["float32", "bfloat16", "int8 pages, float32", "int8 pages, bfloat16"]
LENGTH = 5300  # sixteen short splits, a long one, and part of another
MLA = Form(heads=3, rank=10, rope=4)
WIDE_MLA = Form(heads=20, rank=34, rope=5)  # rows of two queries in one vector, and a last vector half full
GQA = Form(heads=6, kv_heads=2, width=8)
FORMS = [pytest.param(MLA, id="mla"), pytest.param(WIDE_MLA, id="mla-20"), pytest.param(GQA, id="gqa")]


@pytest.fixture(autouse=True)
def _bound() -> Iterator[None]:
    if not native.available():
        pytest.skip("the native kernels are not built, or this CPU has none of their instruction sets")
    bind(KernelsConfig(), "cpu")
    native.set_threads(1)
    yield
    native.set_threads(0)


def parse(kind: str) -> tuple[torch.dtype, bool]:
    """dtype of the queries, and whether pages are INT8."""
    return torch.float32 if "float32" in kind else torch.bfloat16, "int8" in kind


def reference(form: Form, q: Tensor, pages: list[Tensor], queries: attention.PagedQueries) -> Tensor:
    if form.rank:
        return ref.mla_decode(q, pages[0], queries, SCALE, form.rank)
    return ref.gqa_decode(q, pages[0], pages[1], queries, SCALE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_hostile_cases(instruction_set: str, form: Form, dtype: torch.dtype) -> None:
    for name in SEGMENTS:
        case = make_case(name, form.q_width, form.heads, dtype, entry=form.entry)
        pages = [case.pages] if form.rank else [page.contiguous() for page in case.pages.unbind(2)]
        result = form.decode(case.q, pages, case.queries)
        both = [form.keys_values(context) for context in case.contexts]
        assert_attends(result, case, both, SCALE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_its_bits_alone_and_beside_others(instruction_set: str, form: Form, kind: str) -> None:
    dtype, int8 = parse(kind)
    sequences = [random_sequence(form, dtype, LENGTH, seed) for seed in (1, 2)]
    batch = partial(make_batch, form, sequences, int8=int8)
    ends = [1, 2, 33, 255, 256, 257, 300, 4095, 4096, 4097, 5120, 5121, LENGTH]
    alone = {end: batch([(0, end - 1, end)]).decode()[0] for end in ends}
    assert torch.cat(list(alone.values())).isfinite().all()

    for block_tokens, threads in ((16, 2), (7, 1), (1, 3)):  # all in one step, beside another sequence
        native.set_threads(threads)
        segments = [(0, end - 1, end) for end in ends]
        beside = [(1, max(0, end - 5), end) for end in ends]
        mixed = [segment for pair in zip(beside, segments, strict=True) for segment in pair]
        for end, row in zip(ends, batch(mixed, block_tokens).decode()[1::2], strict=True):
            assert torch.equal(row, alone[end]), (end, block_tokens)
    for first, last in [(0, 40), (250, 260), (4090, 4100), (LENGTH - 70, LENGTH)]:  # many rows of one segment
        rows = batch([(0, first, last)]).decode()[0]
        for end in (first + 1, (first + last) // 2, last):
            one = alone[end] if end in alone else batch([(0, end - 1, end)]).decode()[0]
            assert torch.equal(rows[end - 1 - first], one[0]), (first, end)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_long_contexts(instruction_set: str, form: Form, kind: str) -> None:
    dtype, int8 = parse(kind)
    sequences = [random_sequence(form, dtype, 2000, seed) for seed in (6, 7)]
    segments = [(0, 1999, 2000), (1, 0, 20), (0, 511, 517), (1, 1000, 1001)]
    batch = make_batch(form, sequences, segments, int8=int8)
    expected = segments_near(form, sequences, segments, int8)
    assert_near(torch.cat(batch.decode()), expected)
    assert_near(reference(form, batch.q, batch.pages, batch.queries), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "form",
    [
        Form(heads=16, rank=256, rope=64),
        Form(heads=1, rank=1, rope=1),
        Form(heads=2, rank=7, rope=2),
        Form(heads=128, rank=48, rope=16),
        Form(heads=17, rank=129, rope=31),
        Form(heads=16, kv_heads=8, width=128),
        Form(heads=9, kv_heads=3, width=64),
        Form(heads=5, kv_heads=1, width=7),
        Form(heads=2, kv_heads=2, width=34),
        Form(heads=34, kv_heads=2, width=80),
    ],
    ids=str,
)
def test_sizes_that_fit_no_tile(instruction_set: str, form: Form, kind: str) -> None:
    dtype, int8 = parse(kind)
    sequence = random_sequence(form, dtype, 301, seed=8)
    sequence = Sequence(sequence.q * 0.3, sequence.cached)  # the widest would attend to one token alone
    segments = [(0, 300, 301), (0, 65, 70), (0, 0, 1)]
    batch = make_batch(form, [sequence], segments, int8=int8)
    expected = segments_near(form, [sequence], segments, int8)
    assert_near(torch.cat(batch.decode()), expected)
    assert_near(reference(form, batch.q, batch.pages, batch.queries), expected)


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("form", [Form(heads=2, rank=8, rope=2), Form(heads=2, kv_heads=1, width=8)], ids=str)
def test_scores_whose_peak_moves_by_hundreds(instruction_set: str, form: Form, rising: bool) -> None:
    sequence = random_sequence(form, torch.float32, 700, seed=9)
    slope = torch.arange(700) / 700
    keys = (sequence.cached if form.rank else sequence.cached[:, 0]).view(700, -1)
    keys[:, -1] = (slope if rising else 1 - slope) * 1000  # scores from 0 to 300
    sequence.q[:, :, -1] = 1
    case = make_batch(form, [sequence], [(0, 695, 700)])
    context_keys, values = form.keys_values(sequence.cached.double())
    scores = torch.einsum("hd,chd->hc", sequence.q[-1].double(), context_keys) * SCALE
    expected = torch.einsum("hc,chd->hd", scores.softmax(-1), values)
    torch.testing.assert_close(case.decode()[0][-1], expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("poison", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_poison_stays_in_the_rows_that_see_it(instruction_set: str, form: Form, kind: str, poison: float) -> None:
    dtype, int8 = parse(kind)
    sequences = [random_sequence(form, dtype, 400, seed) for seed in (1, 2)]
    segments = [(0, 250, 300), (1, 395, 400), (0, 0, 1)]
    clean = make_batch(form, sequences, segments, int8=int8).decode()
    sequences[0].cached[270] = poison
    poisoned = make_batch(form, sequences, segments, int8=int8).decode()
    assert torch.equal(poisoned[0][:20], clean[0][:20])
    assert poisoned[0][20:].isnan().all()
    assert torch.equal(poisoned[1], clean[1])
    assert torch.equal(poisoned[2], clean[2])


def test_partial_results_past_their_limit_come_in_turns(instruction_set: str) -> None:
    """300 rows of 16 heads and 1024 values in three splits: more than is kept of partial results at a time."""
    form = Form(heads=16, rank=1024, rope=1)
    sequence = random_sequence(form, torch.bfloat16, 900, seed=3)
    native.set_threads(2)
    together = make_batch(form, [sequence], [(0, 600, 900)]).decode()[0]
    for end in (601, 700, 900):
        assert torch.equal(make_batch(form, [sequence], [(0, end - 1, end)]).decode()[0][0], together[end - 601])


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_written_rows_have_the_references_bytes(instruction_set: str, dtype: torch.dtype, int8: bool) -> None:
    rows, heads, width = 37, 3, 21
    values = hostile_values(rows, heads * width, dtype)
    other = values.flip(0)
    slots = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:rows]

    def write(module: ModuleType) -> list[Tensor]:
        kind = torch.uint8 if int8 else dtype
        latents = torch.zeros(12, 5, heads * width + 13 + 8 * int8, dtype=kind)
        keys, memory = torch.zeros(2, 12, 5, heads, width + 4 * int8, dtype=kind)
        module.write_latents(latents, slots, values, other[:, :13])
        heads_of = (values.unflatten(1, (heads, width)), other.unflatten(1, (heads, width)))
        module.write_keys_values(keys, memory, slots, *heads_of)
        return [page.view(torch.uint8) for page in (latents, keys, memory)]

    native.set_threads(2)
    for got, expected in zip(write(attention), write(ref), strict=True):  # type: ignore[arg-type]
        assert torch.equal(got, expected)


def hostile_values(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Normal values in strided rows; some rows zero, tiny, huge, or with values that are not finite."""
    wide = torch.randn(rows, width + 3, generator=torch.Generator().manual_seed(7))
    values = wide[:, :width]
    values[1] = 0
    values[2] *= 1e-44
    values[3] *= 1e38
    values[4, 5] = NAN
    values[5, width - 1] = float("inf")
    values[6, 0] = -float("inf")
    values[7] = torch.arange(width) - width // 2 + 0.5  # ties
    return wide.to(dtype)[:, :width]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "nope", "rope", "rank"), [(3, 6, 4, 10), (16, 64, 64, 256), (1, 1, 1, 1)])
def test_absorbing_and_expanding(
    instruction_set: str, heads: int, nope: int, rope: int, rank: int, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(4)
    w_uk_t = (torch.randn(heads, rank, nope, generator=random) * nope**-0.5).to(dtype)
    w_uv = (torch.randn(heads, nope + 3, rank, generator=random) * rank**-0.5).to(dtype)
    q = torch.randn(30, heads + 1, nope + rope + 2, generator=random).to(dtype)[:, :heads, 1:-1]
    mixed = torch.randn(30, heads, rank + 5, generator=random).to(dtype)[..., :rank]
    for door, x, weight in ((attention.mla_absorb, q, w_uk_t), (attention.mla_unabsorb, mixed, w_uv)):
        native.set_threads(2)
        result, k = door(x, weight), weight.shape[2]
        for head in range(heads):
            expected = rounded(product(exact(x[:, head, :k]), weight[head]), dtype)
            assert_near(result[:, head, : weight.shape[1]], expected)
        native.set_threads(1)
        for row in (0, 11, 29):
            assert torch.equal(door(x[row : row + 1], weight)[0], result[row])
    assert torch.equal(attention.mla_absorb(q, w_uk_t)[..., rank:], q[..., nope:])


def test_a_step_without_rows() -> None:
    for form in (MLA, GQA):
        empty = make_batch(form, [random_sequence(form, torch.bfloat16, 9, 1)], [(0, 9, 9)])
        assert empty.decode()[0].shape == (0, form.heads, form.rank or form.width)
    assert attention.mla_absorb(torch.zeros(0, 2, 5), torch.zeros(2, 4, 3)).shape == (0, 2, 6)
    assert bound.mla_unabsorb(torch.zeros(0, 2, 4), torch.zeros(2, 3, 4)).shape == (0, 2, 3)
