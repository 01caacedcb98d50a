"""Sequences of a decoding batch that begin with the same blocks share programs: the same bits, whoever has them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from paged_cases import make_queries
from paged_sequences import SCALE, Batch, Form, Segment, make_batch, random_sequence
from torch import Tensor

from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.triton import mla, prefix, split
from cierzo.kernels.triton.split import Splits

FORM = Form(heads=20, rank=12, rope=4)  # three sequences in a tile of 64 rows, and 4 rows of nobody
BLOCK_TOKENS = 8
LENGTH = 330  # three short splits of 64, one long one of 128, and a token or two of another


@pytest.fixture(autouse=True)
def _small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "WALKED", Splits(192, 1, 256, walked=(3, 2)))


def shared_batch(segments: list[Segment], common: list[int], dtype: torch.dtype, fp8: bool = False) -> Batch:
    """Segments of sequences of which number i begins with the first common[i] tokens of number 0, in its blocks."""
    sequences = [random_sequence(FORM, dtype, LENGTH, seed) for seed in range(len(common))]
    for sequence, tokens in zip(sequences, common, strict=True):
        sequence.cached[:tokens] = sequences[0].cached[:tokens]
    batch = make_batch(FORM, sequences, segments, BLOCK_TOKENS, fp8=fp8)
    for row, tokens in enumerate(common):
        blocks = tokens // BLOCK_TOKENS
        batch.queries.block_tables[row, :blocks] = batch.queries.block_tables[0, :blocks]
    return batch


def decode(batch: Batch) -> Tensor:
    return mla.mla_decode(batch.q, batch.pages[0], batch.queries, SCALE, FORM.rank)


def found(batch: Batch) -> prefix.Prefixes:
    """What the call before has found."""
    shape = split.Shape(kv_heads=1, group=FORM.heads, width=FORM.rank)
    mates = prefix.prefixes(batch.queries, BLOCK_TOKENS, shape.rows // FORM.heads)
    assert mates is not None
    return mates


def renewed(batch: Batch, **changes: object) -> Batch:
    return dataclasses.replace(batch, queries=dataclasses.replace(batch.queries, **changes))


@pytest.mark.parametrize("kind", ["float32", "fp8 pages"])
def test_bits_are_those_of_programs_of_ones_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fp8 = kind == "fp8 pages"
    ends = [330, 300, 129, 328, 64, 63, 330, 330]
    common = [330, 192, 128, 327, 64, 56, 0, 64]
    segments = [(which, end - 1, end) for which, end in enumerate(ends)]
    segments.insert(3, (1, 297, 300))  # rows that share with nobody
    segments.insert(5, (2, 0, 0))
    batch = shared_batch(segments, common, torch.bfloat16 if fp8 else torch.float32, fp8)
    together = decode(batch)
    assert found(batch).mates.tolist() == [
        *([0, 0, 330], [0, 1, 192], [0, 2, 128], [3, 0, 300], [4, 0, 328], [5, 0, 0]),
        *([4, 1, 64], [4, 2, 56], [8, 0, 330], [9, 0, 330]),
    ]
    assert together.isfinite().all()
    monkeypatch.setattr(mla, "prefixes", lambda *_: None)
    assert torch.equal(decode(renewed(batch)), together)
    starts = batch.queries.query_starts.tolist()
    for index in (0, 1, 4, 9):  # and truly alone
        one = slice(index, index + 1)
        queries = make_queries(
            [(1, batch.queries.contexts[index])], batch.queries.table_rows[one].clone(), batch.queries.block_tables
        )
        rows = slice(starts[index], starts[index] + 1)
        assert torch.equal(decode(Batch(FORM, batch.q[rows].clone(), batch.pages, queries)), together[rows])


def test_in_rounds_and_within_the_bounds_of_a_recorded_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaders and guests in different rounds; the host's numbers those of the recording; padding."""
    segments = [(which, end - 1, end) for which, end in enumerate([330, 330, 300, 200])] + [(0, 0, 0)]
    batch = shared_batch(segments, [330, 328, 256, 192], torch.bfloat16)
    monkeypatch.setattr(mla, "prefixes", lambda *_: None)
    alone = decode(batch)
    monkeypatch.setattr(mla, "prefixes", prefix.prefixes)
    bounds = {"query_lengths": [1] * 5, "contexts": [LENGTH] * 5}
    for changes in ({}, bounds, bounds | {"total_context": 1160}):
        assert torch.equal(decode(renewed(batch, **changes)), alone)
    shape = split.Shape(kv_heads=1, group=FORM.heads, width=FORM.rank, cut=split.WALKED.apart())
    # Items of a round: none has two segments, some do, segment 0 without its last guest.
    for items, changes in ((1, {}), (8, {}), (8, bounds), (12, bounds)):
        monkeypatch.setattr(split, "PARTIAL_BYTES", items * shape.item_bytes)
        some = renewed(batch, **changes)
        assert torch.equal(decode(some), alone)
        assert len(split.plan(some.queries, shape, len(some.q)).rounds) > 1


def test_what_is_shared_is_found_in_the_leaders_tile() -> None:
    """Guests' own programs do nothing: with a leader whose members are taken away, their rows are nobody's."""
    batch = shared_batch([(0, 329, 330), (1, 329, 330)], [330, 128], torch.float32)
    before = decode(batch)
    found(batch).members[0, 1] = -1
    after = decode(batch)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def brute(queries: PagedQueries, block_tokens: int, together: int) -> tuple[list[list[int]], list[list[int]]]:
    """mates and members, by the rule's own words."""
    tables = queries.block_tables.tolist()
    mates, groups = [], {}
    members = [[-1] * together for _ in queries.contexts]
    for segment, (length, context) in enumerate(zip(queries.query_lengths, queries.contexts, strict=True)):
        table = tables[int(queries.table_rows[segment])]
        group = groups.setdefault(table[0] if length == 1 else ("none", segment), [])
        leader = segment if len(group) % together == 0 else group[len(group) // together * together]
        common = context
        if leader != segment:
            its = tables[int(queries.table_rows[leader])]
            common = 0
            while common + block_tokens <= min(context, queries.contexts[leader]) and (
                table[common // block_tokens] == its[common // block_tokens]
            ):
                common += block_tokens
        mates.append([leader, len(group) % together, common])
        members[leader][len(group) % together] = segment
        group.append(segment)
    return mates, members


@pytest.mark.parametrize("together", [2, 3, 16])
def test_prefixes_are_those_of_the_rule(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "BLOCK", 4)
    random = torch.Generator().manual_seed(together)
    for _ in range(6):
        count = int(torch.randint(2, 20, (), generator=random))
        tables = torch.zeros(count, 12, dtype=torch.int32)
        for row in range(1, count):  # the beginning of an earlier one, and blocks of its own
            kept = int(torch.randint(0, 12, (), generator=random))
            tables[row, :kept] = tables[int(torch.randint(0, row, (), generator=random)), :kept]
            tables[row, kept:] = torch.arange(12 - kept) + 100 * row
        contexts = torch.randint(1, 12 * 5 + 1, (count,), generator=random).tolist()
        lengths = [min(c, int(torch.randint(0, 4, (), generator=random)) or 1) for c in contexts]
        lengths[count // 2] = 0
        rows = torch.randperm(count, generator=random)
        queries = make_queries(list(zip(lengths, contexts, strict=True)), rows, tables)
        got = prefix.prefixes(queries, 5, together)
        assert got is not None
        mates, members = brute(queries, 5, together)
        assert got.mates.tolist() == mates
        assert got.members.tolist() == members


def test_it_is_left_alone_where_it_cannot_pay() -> None:
    queries = make_queries([(1, 9)], torch.arange(1), torch.zeros(1, 3, dtype=torch.int32))
    found = prefix.prefixes(queries, 5, 4)  # one sequence: its own leader, without a launch
    assert found is not None
    assert (found.mates.tolist(), found.members.tolist()) == ([[0, 0, 0]], [[-1] * 4])
    queries = make_queries([(1, 9)] * 2, torch.arange(2), torch.zeros(2, 3, dtype=torch.int32))
    assert prefix.prefixes(queries, 5, 1) is None  # no room for two
    assert prefix.prefixes(queries, 5, 2) is not None
