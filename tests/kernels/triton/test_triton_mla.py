"""Multi-head latent attention in Triton: hostile cases, a row's own bits, splits, rounds, FP8 pages."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from paged_cases import SEGMENTS, Pair, assert_attends, attend, expanded, make_case, make_queries
from paged_sequences import SCALE, Batch, Form, Sequence, make_batch, random_sequence, segments_near
from rounding import assert_near
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.formats import kv_fp8
from cierzo.kernels.pack import pack
from cierzo.kernels.ref import attention as ref
from cierzo.kernels.triton import flash, mla, split
from cierzo.kernels.triton.split import Splits

FORM = Form(heads=3, rank=12, rope=4)  # 21 tokens and a third of another share a tile of 64 rows
NOPE, VALUE = 8, 10
SMALL = Splits(192, 1, 256, walked=(3, 2))  # a program each for parts of 64 tokens, then of 128
LENGTH = 470  # three short splits, two long ones, and part of a third


@pytest.fixture(autouse=True)
def _small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "WALKED", SMALL)
    monkeypatch.setattr(flash, "WORKSPACE_TOKENS", 2 * flash.TOKENS)


def decode(batch: Batch, scale: float = SCALE) -> list[Tensor]:
    """One result per segment."""
    result = mla.mla_decode(batch.q, batch.pages[0], batch.queries, scale, batch.form.rank)
    return list(result.split(batch.queries.query_lengths))


def weights(
    dtype: torch.dtype, heads: int = 3, nope: int = NOPE, rank: int = 12, value: int = VALUE
) -> list[Tensor]:
    random = torch.Generator().manual_seed(5)
    shapes = (heads, nope, rank), (heads, value, rank)
    return [(torch.randn(shape, generator=random) * 0.3).to(dtype) for shape in shapes]


def prefill(batch: Batch, *w: Tensor) -> list[Tensor]:
    """One result per segment; queries are as wide as the absorbed form's, the last of them rotated."""
    result = mla.mla_prefill(batch.q, batch.pages[0], *w, batch.queries, SCALE)
    return list(result.split(batch.queries.query_lengths))


def check_prefill(name: str, dtype: torch.dtype) -> None:
    case = make_case(name, NOPE + 4, 3, dtype, entry=(16,), margin=8)
    w_uk, w_uv = weights(dtype)
    result = mla.mla_prefill(case.q, case.pages, w_uk, w_uv, case.queries, SCALE)
    assert_attends(result, case, [expanded(context, w_uk, w_uv, dtype) for context in case.contexts], SCALE)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *((torch.float32, name) for name in SEGMENTS if name != "long_context"),
        *((torch.bfloat16, name) for name in ("mixed", "decode_unequal")),
    ],
)
def test_hostile_cases(dtype: torch.dtype, name: str) -> None:
    case = make_case(name, FORM.q_width, FORM.heads, dtype, entry=FORM.entry, margin=8)
    result = mla.mla_decode(case.q, case.pages, case.queries, SCALE, FORM.rank)
    both = [FORM.keys_values(context) for context in case.contexts]
    assert_attends(result, case, both, SCALE)
    check_prefill(name, dtype)


@pytest.mark.parametrize("kind", ["float32", "fp8 pages"])
def test_a_row_has_its_bits_alone_and_beside_others(kind: str) -> None:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    sequences = [random_sequence(FORM, dtype, LENGTH, seed) for seed in (1, 2)]
    batch = partial(make_batch, FORM, sequences, fp8=kind == "fp8 pages")
    ends = [1, 2, 64, 65, 192, 193, 321, LENGTH]
    alone = {end: decode(batch([(0, end - 1, end)]))[0] for end in ends}
    assert torch.cat(list(alone.values())).isfinite().all()
    for block_tokens in (16, 7):  # in one step, beside another sequence
        segments = [(0, end - 1, end) for end in ends]
        beside = [(1, max(0, end - 1 - i % 3), end) for i, end in enumerate(ends)]
        mixed = [segment for pair in zip(beside, segments, strict=True) for segment in pair]
        for end, row in zip(ends, decode(batch(mixed, block_tokens))[1::2], strict=True):
            assert torch.equal(row, alone[end]), (end, block_tokens)
    lengths = range(1, 9)  # rows that share a tile, and splits that not all of them see
    for length, rows in zip(lengths, decode(batch([(0, 193 - n, 193) for n in lengths])), strict=True):
        assert torch.equal(rows[-1], alone[193][0])
        assert length == 1 or torch.equal(rows[-2], alone[192][0])
    rows = decode(batch([(0, 180, 210)]))[0]  # two tiles
    assert torch.equal(rows[192 - 181], alone[192][0])
    assert torch.equal(rows[193 - 181], alone[193][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompts_row_has_its_bits_however_it_is_cut(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    form = Form(heads=2, rank=12, rope=4)
    w = weights(dtype, heads=2, nope=12)
    sequences = [random_sequence(form, dtype, LENGTH, seed) for seed in (1, 2)]
    for sequence in sequences:
        assert sequence.q.shape[2] == 16
    monkeypatch.setattr(flash, "WORKSPACE_TOKENS", 4096)  # one round
    whole = prefill(make_batch(form, sequences, [(0, 0, LENGTH)]), *w)[0]
    assert whole.isfinite().all()
    monkeypatch.setattr(flash, "WORKSPACE_TOKENS", 2 * flash.TOKENS)  # rounds that begin in the midst of segments
    segments = [(1, 30, 200), (0, 0, 1), (0, 1, 131), (1, 400, 401), (0, 131, LENGTH)]
    pieces = prefill(make_batch(form, sequences, segments, block_tokens=7), *w)
    assert torch.equal(torch.cat([pieces[1], pieces[2], pieces[4]]), whole)
    alone = prefill(make_batch(form, sequences, [(0, LENGTH - 1, LENGTH)]), *w)[0]
    assert torch.equal(alone, whole[LENGTH - 1 :])


@pytest.mark.parametrize(("fp8", "block_tokens"), [(False, 32), (True, 64), (False, 128)])
def test_small_4s_sizes(fp8: bool, block_tokens: int) -> None:
    """Pages of half a tile of tokens, of one, and of two."""
    form = Form(heads=32, rank=256, rope=64)
    sequence = random_sequence(form, torch.bfloat16, 150, seed=8)
    sequence = Sequence(sequence.q * 0.2, sequence.cached)  # as they are, each would attend to one token alone
    segments = [(0, 149, 150), (0, 65, 68), (0, 0, 1)]
    batch = make_batch(form, [sequence], segments, block_tokens, fp8=fp8)
    assert_near(torch.cat(decode(batch)), segments_near(form, [sequence], segments, fp8=fp8))
    q = batch.q[:, :2, :128].contiguous()
    w = weights(torch.bfloat16, heads=2, nope=64, rank=256, value=128)
    w = [part * 0.3 for part in w]
    read = form.read(form.pages_of(sequence.cached, int8=False, fp8=fp8)).value
    both: list[Pair] = [expanded(read[:last], *w, torch.bfloat16) for _, _, last in segments]
    got = mla.mla_prefill(q, batch.pages[0], *w, batch.queries, SCALE)
    assert_near(got, attend(q, batch.queries, both, SCALE))


def test_a_nan_stays_in_its_sequence() -> None:
    sequences = [random_sequence(FORM, torch.bfloat16, 300, seed) for seed in (1, 2)]
    segments = [(0, 250, 251), (0, 299, 300), (1, 290, 300)]
    clean = make_batch(FORM, sequences, segments)
    w = weights(torch.bfloat16, nope=12)
    before = decode(clean), prefill(clean, *w)
    sequences[0].cached[270] = float("nan")
    poisoned = make_batch(FORM, sequences, segments)
    for got, was in zip((decode(poisoned), prefill(poisoned, *w)), before, strict=True):
        assert torch.equal(got[0], was[0])
        assert got[1].isnan().all()
        assert torch.equal(got[2], was[2])


@pytest.mark.parametrize("rising", [True, False])
def test_scores_whose_peak_moves_by_hundreds(rising: bool) -> None:
    sequence = random_sequence(FORM, torch.float32, 400, seed=9)
    slope = torch.arange(400) / 400
    sequence.cached[:, -1] = (slope if rising else 1 - slope) * 1000  # scores from 0 to 300
    sequence.q[:, :, -1] = 1
    keys, values = FORM.keys_values(sequence.cached.double())
    scores = torch.einsum("hd,chd->hc", sequence.q[-1].double(), keys) * SCALE
    expected = torch.einsum("hc,chd->hd", scores.softmax(-1), values)
    got = decode(make_batch(FORM, [sequence], [(0, 395, 400)]))[0][-1]
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-5)


def test_partials_past_their_limit_come_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [random_sequence(FORM, torch.float32, LENGTH, seed) for seed in (1, 2)]
    batch = partial(make_batch, FORM, sequences, [(0, LENGTH - 24, LENGTH), (1, 100, 101), (1, 5, 9)])
    together = decode(batch())
    monkeypatch.setattr(split, "PARTIAL_BYTES", 1)
    assert all(torch.equal(a, b) for a, b in zip(decode(batch()), together, strict=True))


def test_bounds_change_nothing_and_the_device_has_the_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a captured graph: the host's lists are those of the capture, the device's those of the step."""
    sequences = [random_sequence(FORM, torch.bfloat16, LENGTH, seed) for seed in (1, 2)]
    batch = make_batch(FORM, sequences, [(0, LENGTH - 1, LENGTH), (1, 199, 200), (1, 0, 0)])
    expected = decode(batch)
    queries = batch.queries
    longer = make_queries([(1, 900), (1, 900), (0, 0)], queries.table_rows, queries.block_tables)
    lists = dataclasses.replace(queries, query_lengths=longer.query_lengths, contexts=longer.contexts)
    bounded = Batch(
        batch.form, batch.q, batch.pages, dataclasses.replace(lists, total_context=sum(queries.contexts))
    )
    assert all(torch.equal(a, b) for a, b in zip(decode(bounded), expected, strict=True))
    # by the lists alone, in one round, and in many
    bounded = Batch(batch.form, batch.q, batch.pages, lists)
    assert all(torch.equal(a, b) for a, b in zip(decode(bounded), expected, strict=True))
    monkeypatch.setattr(split, "PARTIAL_BYTES", 1)
    bounded = Batch(batch.form, batch.q, batch.pages, dataclasses.replace(lists))
    assert all(torch.equal(a, b) for a, b in zip(decode(bounded), expected, strict=True))


@pytest.fixture
def far_pages() -> Tensor:
    """More than 2^31 values, most of them never touched."""
    return torch.empty((2**31 + 2**24) // (16 * 32), 32, 16, dtype=torch.float8_e4m3fn)


def test_addresses_past_32_bits(far_pages: Tensor) -> None:
    sequence = random_sequence(FORM, torch.float32, 40, seed=3)
    last = len(far_pages) - 2
    far_pages[last:].view(-1, 16)[:40].view(torch.uint8).copy_(kv_fp8.quantise(sequence.cached).view(torch.uint8))
    tables = torch.tensor([[last, last + 1]], dtype=torch.int32)
    queries = make_queries([(1, 40)], torch.tensor([0]), tables)
    got = mla.mla_decode(sequence.q[39:], far_pages, queries, SCALE, FORM.rank)
    expected = ref.mla_decode(sequence.q[39:], far_pages, queries, SCALE, FORM.rank)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_no_row_of_a_prompt_before_it(wrong: float) -> None:
    """Not even one of its own tile of tokens, whose weight for it is 0."""
    sequences = [random_sequence(FORM, torch.bfloat16, 90, seed) for seed in (1, 2)]
    w = weights(torch.bfloat16, nope=12)
    batch = make_batch(FORM, sequences, [(0, 60, 90), (1, 70, 90)])
    clean = prefill(batch, *w)
    sequences[0].cached[80].view(-1)[3] = wrong
    batch = make_batch(FORM, sequences, [(0, 60, 90), (1, 70, 90)])
    got = prefill(batch, *w)
    assert torch.equal(got[0][:20], clean[0][:20])
    assert not got[0][20:].isfinite().any()
    assert torch.equal(got[1], clean[1])


def test_misuse_is_refused_by_name() -> None:
    sequence = random_sequence(FORM, torch.bfloat16, 9, seed=1)
    batch = make_batch(FORM, [sequence], [(0, 8, 9)], int8=True)
    with pytest.raises(ArgumentError, match=r"mla_decode: pages has dtype torch.uint8; on a GPU pages are .*e4m3"):
        decode(batch)
    batch = make_batch(FORM, [sequence], [(0, 8, 9)])
    w_uk, w_uv = weights(torch.bfloat16, nope=12)
    with pytest.raises(ArgumentError, match="mla_prefill: w_uv is packed; on a GPU it must be a tensor"):
        mla.mla_prefill(batch.q, batch.pages[0], w_uk, pack(w_uv, "bf16"), batch.queries, SCALE)
    wide = torch.zeros(1, 3, 17, dtype=torch.bfloat16)[..., 1:]
    with pytest.raises(ArgumentError, match="mla_attend: q_ptr starts 2 bytes past a multiple of 16"):
        mla.mla_decode(wide, batch.pages[0], batch.queries, SCALE, FORM.rank)
