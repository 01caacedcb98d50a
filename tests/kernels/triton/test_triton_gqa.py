"""Grouped-query attention in Triton: hostile cases, a row's own bits, FP8 pages."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from paged_cases import SEGMENTS, assert_attends, make_case
from paged_sequences import SCALE, Batch, Form, Sequence, make_batch, random_sequence, segments_near
from rounding import assert_near
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.triton import flash, gqa, split
from cierzo.kernels.triton.split import Splits

FORM = Form(heads=6, kv_heads=2, width=8)
LENGTH = 470  # three short splits, two long ones, and part of a third


@pytest.fixture(autouse=True)
def _small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "SPLITS", Splits(64, 3, 128))
    monkeypatch.setattr(flash, "WORKSPACE_TOKENS", 2 * flash.TOKENS)


def decode(batch: Batch) -> list[Tensor]:
    """One result per segment."""
    result = gqa.gqa_decode(batch.q, *batch.pages, batch.queries, SCALE)  # type: ignore[misc]
    return list(result.split(batch.queries.query_lengths))


def prefill(batch: Batch) -> list[Tensor]:
    """One result per segment."""
    result = gqa.gqa_prefill(batch.q, *batch.pages, batch.queries, SCALE)  # type: ignore[misc]
    return list(result.split(batch.queries.query_lengths))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *((torch.float32, name) for name in SEGMENTS if name != "long_context"),
        *((torch.bfloat16, name) for name in ("mixed", "decode_unequal")),
    ],
)
def test_hostile_cases(dtype: torch.dtype, name: str) -> None:
    case = make_case(name, FORM.q_width, FORM.heads, dtype, entry=FORM.entry, margin=8)
    pages = [page.contiguous() for page in case.pages.unbind(2)]
    both = [FORM.keys_values(context) for context in case.contexts]
    for result in (
        gqa.gqa_decode(case.q, pages[0], pages[1], case.queries, SCALE),
        gqa.gqa_prefill(case.q, pages[0], pages[1], case.queries, SCALE),
    ):
        assert_attends(result, case, both, SCALE)


@pytest.mark.parametrize("kind", ["float32", "fp8 pages"])
def test_a_row_has_its_bits_alone_and_beside_others(kind: str) -> None:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    sequences = [random_sequence(FORM, dtype, LENGTH, seed) for seed in (1, 2)]
    batch = partial(make_batch, FORM, sequences, fp8=kind == "fp8 pages")
    ends = [1, 64, 65, 193, LENGTH]
    alone = {end: decode(batch([(0, end - 1, end)]))[0] for end in ends}
    assert torch.cat(list(alone.values())).isfinite().all()
    segments = [(0, end - 1, end) for end in ends]
    beside = [(1, max(0, end - 1 - i % 3), end) for i, end in enumerate(ends)]
    mixed = [segment for pair in zip(beside, segments, strict=True) for segment in pair]
    for end, row in zip(ends, decode(batch(mixed, 7))[1::2], strict=True):
        assert torch.equal(row, alone[end]), end
    lengths = range(1, 9)
    for rows in decode(batch([(0, 193 - n, 193) for n in lengths])):
        assert torch.equal(rows[-1], alone[193][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompts_row_has_its_bits_however_it_is_cut(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [random_sequence(FORM, dtype, 300, seed) for seed in (1, 2)]
    monkeypatch.setattr(flash, "WORKSPACE_TOKENS", 4096)  # one round
    whole = prefill(make_batch(FORM, sequences, [(0, 0, 300)]))[0]
    assert whole.isfinite().all()
    monkeypatch.setattr(flash, "WORKSPACE_TOKENS", 2 * flash.TOKENS)
    segments = [(1, 30, 200), (0, 0, 1), (0, 1, 131), (1, 299, 300), (0, 131, 300)]
    pieces = prefill(make_batch(FORM, sequences, segments, block_tokens=7))
    assert torch.equal(torch.cat([pieces[1], pieces[2], pieces[4]]), whole)


@pytest.mark.parametrize("fp8", [False, True])
def test_the_sizes_of_a_shard_of_small_3(fp8: bool) -> None:
    form = Form(heads=8, kv_heads=2, width=128)
    sequence = random_sequence(form, torch.bfloat16, 150, seed=8)
    sequence = Sequence(sequence.q * 0.2, sequence.cached)  # as they are, each would attend to one token alone
    segments = [(0, 149, 150), (0, 65, 68), (0, 0, 1)]
    batch = make_batch(form, [sequence], segments, block_tokens=32, fp8=fp8)
    expected = segments_near(form, [sequence], segments, fp8=fp8)
    assert_near(torch.cat(decode(batch)), expected)
    assert_near(torch.cat(prefill(batch)), expected)


def test_a_nan_stays_in_its_sequence() -> None:
    sequences = [random_sequence(FORM, torch.bfloat16, 300, seed) for seed in (1, 2)]
    segments = [(0, 250, 251), (0, 299, 300), (1, 290, 300)]
    clean = make_batch(FORM, sequences, segments)
    before = decode(clean), prefill(clean)
    sequences[0].cached[270] = float("nan")
    poisoned = make_batch(FORM, sequences, segments)
    for got, was in zip((decode(poisoned), prefill(poisoned)), before, strict=True):
        assert torch.equal(got[0], was[0])
        assert got[1].isnan().all()
        assert torch.equal(got[2], was[2])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_no_row_of_a_prompt_before_it(wrong: float) -> None:
    """Not even one of its own tile of tokens, whose weight for it is 0."""
    sequences = [random_sequence(FORM, torch.bfloat16, 90, seed) for seed in (1, 2)]
    batch = make_batch(FORM, sequences, [(0, 60, 90), (1, 70, 90)])
    clean = prefill(batch)
    sequences[0].cached[80].view(-1)[-1] = wrong
    batch = make_batch(FORM, sequences, [(0, 60, 90), (1, 70, 90)])
    got = prefill(batch)
    assert torch.equal(got[0][:20], clean[0][:20])
    assert not got[0][20:, 3:].isfinite().any()
    assert torch.equal(got[0][:, :3], clean[0][:, :3])  # the other key-value head's
    assert torch.equal(got[1], clean[1])


def test_misuse_is_refused_by_name() -> None:
    batch = make_batch(FORM, [random_sequence(FORM, torch.bfloat16, 9, seed=1)], [(0, 8, 9)], int8=True)
    for call, name in ((decode, "gqa_decode"), (prefill, "gqa_prefill")):
        with pytest.raises(ArgumentError, match=rf"{name}: k_pages has dtype torch.uint8; on a GPU pages are "):
            call(batch)
