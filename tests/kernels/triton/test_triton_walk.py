"""MLA decoding with several parts of a context in one program, and with a program for each: the same bits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from paged_sequences import SCALE, Batch, Form, make_batch, random_sequence, segments_near
from rounding import assert_near
from torch import Tensor

from cierzo.kernels.triton import mla, split
from cierzo.kernels.triton.split import Shape, Splits

FORM = Form(heads=3, rank=12, rope=4)
# Of 4 parts of 64 tokens, twice, then of 2 parts of 128.
WALKED = Splits(256, 2, 256, walked=(4, 2))
LENGTH = 1100


@pytest.fixture(autouse=True)
def _small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "WALKED", WALKED)


def decode(batch: Batch) -> Tensor:
    return mla.mla_decode(batch.q, batch.pages[0], batch.queries, SCALE, batch.form.rank)


def both(batch: Batch, again: Batch, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Results of programs that walk, and of a program for each part. Plans are kept with queries, hence two."""
    monkeypatch.setattr(split, "PROGRAMS", 1)
    walking = decode(batch)
    monkeypatch.setattr(split, "PROGRAMS", 1 << 30)
    return walking, decode(again)


def test_parts_lie_where_they_do_for_both() -> None:
    assert WALKED.apart() == Splits(64, 8, 128, joined=(4, 2))
    assert split.WALKED is WALKED
    shape = Shape(kv_heads=1, group=3, width=12, cut=WALKED)
    assert [shape.cut.count(context) for context in (1, 256, 257, 512, 513, 1100)] == [1, 1, 2, 2, 3, 5]
    assert [shape.cut.apart().count(context) for context in (1, 64, 65, 512, 513, 1100)] == [1, 1, 2, 8, 9, 13]


@pytest.mark.parametrize("kind", ["bfloat16", "fp8 pages"])
def test_a_row_has_the_same_bits_whoever_computes_its_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [random_sequence(FORM, torch.bfloat16, LENGTH, seed) for seed in (1, 2)]
    ends = [1, 64, 65, 128, 255, 256, 257, 320, 512, 513, 641, 768, 769, 1024, LENGTH]
    segments = [(i % 2, max(0, end - 1 - i % 4), end) for i, end in enumerate(ends)]
    batch = partial(make_batch, FORM, sequences, segments, fp8=kind == "fp8 pages")
    walking, apart = both(batch(), batch(), monkeypatch)
    assert walking.isfinite().all()
    assert torch.equal(walking, apart)
    assert_near(walking, segments_near(FORM, sequences, segments, fp8=kind == "fp8 pages"))


def test_rows_of_a_tile_that_end_in_different_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """21 tokens of a tile, of which some see a part that others do not; the last part may have no row at all."""
    sequences = [random_sequence(FORM, torch.float32, 600, 3)]
    batch = partial(make_batch, FORM, sequences, [(0, 300, 330), (0, 50, 70), (0, 250, 262), (0, 505, 530)])
    walking, apart = both(batch(), batch(), monkeypatch)
    assert torch.equal(walking, apart)


@pytest.mark.parametrize("rising", [True, False])
def test_peaks_that_move_by_hundreds_from_part_to_part(rising: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = random_sequence(FORM, torch.float32, 400, seed=9)
    slope = torch.arange(400) / 400
    sequence.cached[:, -1] = (slope if rising else 1 - slope) * 1000
    sequence.q[:, :, -1] = 1
    batch = partial(make_batch, FORM, [sequence], [(0, 395, 400)])
    walking, apart = both(batch(), batch(), monkeypatch)
    assert torch.equal(walking, apart)
    keys, values = FORM.keys_values(sequence.cached.double())
    scores = torch.einsum("hd,chd->hc", sequence.q[-1].double(), keys) * SCALE
    expected = torch.einsum("hc,chd->hd", scores.softmax(-1), values)
    torch.testing.assert_close(walking[-1], expected.float(), rtol=1e-4, atol=1e-5)


def test_a_prefix_is_shared_by_whole_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that walks reads what is common in the splits that it walks; bits are those of rows alone."""
    form, common = Form(heads=20, rank=12, rope=4), 300
    sequences = [random_sequence(form, torch.bfloat16, 400, seed) for seed in range(3)]
    for sequence in sequences:
        sequence.cached[:common] = sequences[0].cached[:common]
    segments = [(which, 399, 400) for which in range(3)]

    def shared() -> Batch:
        batch = make_batch(form, sequences, segments, 8)
        for row in (1, 2):
            batch.queries.block_tables[row, : common // 8] = batch.queries.block_tables[0, : common // 8]
        return batch

    walking, apart = both(shared(), shared(), monkeypatch)
    alone, alone_apart = both(*(make_batch(form, sequences, segments, 8) for _ in range(2)), monkeypatch)
    assert torch.equal(walking, apart)
    assert torch.equal(walking, alone)
    assert torch.equal(alone, alone_apart)


def test_rounds_of_few_items_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [random_sequence(FORM, torch.float32, 700, seed) for seed in (1, 2)]
    batch = partial(make_batch, FORM, sequences, [(0, 670, 700), (1, 600, 601), (1, 5, 9)])
    walking, apart = both(batch(), batch(), monkeypatch)
    monkeypatch.setattr(split, "PARTIAL_BYTES", 1)
    again = both(batch(), batch(), monkeypatch)
    assert all(torch.equal(one, walking) for one in (apart, *again))


def test_programs_walk_where_they_fill_a_card() -> None:
    """Queries of many sequences walk; of few, each part has its program. Bounds count as lengths do."""
    shape = Shape(kv_heads=1, group=32, width=256, cut=Splits(2048, 2, 4096, walked=(8, 4)))
    for sequences, context, walks in ((1, 131_072, False), (64, 4096, True), (63, 4096, False), (16, 32_768, True)):
        queries = _queries(sequences, context)
        assert (split.walked(queries, shape) is shape) == walks
        if not walks:
            assert split.walked(queries, shape).cut == Splits(256, 16, 1024, joined=(8, 4))


@pytest.mark.parametrize("context", [64, 131_072])
def test_the_host_counts_items_once_a_step(context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a loop over all sequences, for the first layer; the others find the number with the queries they share."""
    counts, counted = Shape.splits, list[int]()

    def noted(shape: Shape, length: int, context: int) -> int:
        counted.append(context)
        return counts(shape, length, context)

    monkeypatch.setattr(Shape, "splits", noted)
    queries, sums = _queries(3, context), []
    for _layer in range(4):
        shape = Shape(kv_heads=1, group=32, width=256, cut=Splits(2048, 2, 4096, walked=(8, 4)))
        split.plan(queries, split.walked(queries, shape), 3)
        sums.append(len(counted))
    assert sums[0] >= 3
    assert sums == sums[:1] * 4


def _queries(sequences: int, context: int) -> split.PagedQueries:
    table = torch.zeros(1, 1, dtype=torch.int32)
    return split.PagedQueries.of([1] * sequences, [context] * sequences, [0] * sequences, table)
