"""The batch builder: exact arrays."""

from __future__ import annotations

import numpy as np

from cierzo.engine.worker.batch import Batch, BatchBuilder, Segments
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import Admission, SeqPlan, StepPlan

ADMISSION = Admission(SamplingParams(), (), (), ())


def seq(
    slot: int,
    start: int,
    tokens: list[int],
    *,
    prompt: int,
    blocks: list[int] | None = None,
    samples: bool = True,
    admitted: bool = False,
) -> SeqPlan:
    admission = ADMISSION if admitted else None
    return SeqPlan((slot, 0), slot, 0, start, tokens, prompt, blocks or [], samples, admission)


def build(builder: BatchBuilder, *seqs: SeqPlan) -> Batch:
    return builder.build(StepPlan(1, list(seqs), sum(len(s.token_ids) for s in seqs)))


def numbers(group: Segments) -> tuple[list[int], ...]:
    arrays = (group.query_starts, group.context_lengths, group.table_rows)
    assert all(array.dtype == np.int32 for array in arrays)
    return (*(array.tolist() for array in arrays), group.query_lengths, group.contexts)


def test_expanded_rows_come_first_and_a_chunk_across_the_boundary_is_in_both_groups() -> None:
    builder = BatchBuilder(max_tokens=16, max_running=4, max_blocks=3, block_tokens=4)
    batch = build(
        builder,
        seq(2, 5, [50], prompt=5, blocks=[7, 1], admitted=True),  # generated
        seq(0, 0, [10, 11, 12], prompt=6, blocks=[3], samples=False, admitted=True),  # prompt, more to come
        seq(1, 2, [20, 21, 22, 23], prompt=4, blocks=[9, 5], admitted=True),  # crosses into its output
        seq(3, 1, [30, 31], prompt=3, blocks=[4], admitted=True),  # ends its prompt
    )
    assert batch.token_ids.tolist() == [10, 11, 12, 20, 21, 30, 31, 50, 22, 23]
    assert batch.positions.tolist() == [0, 1, 2, 2, 3, 1, 2, 5, 4, 5]
    assert batch.cache_slots.tolist() == [12, 13, 14, 38, 39, 17, 18, 5, 20, 21]
    assert batch.num_expanded == 7
    assert numbers(batch.expanded) == ([0, 3, 5, 7], [3, 4, 3], [0, 1, 3], [3, 2, 2], [3, 4, 3])
    assert numbers(batch.absorbed) == ([0, 1, 3], [6, 6], [2, 1], [1, 2], [6, 6])
    assert batch.sample_rows.tolist() == [7, 9, 6]
    assert batch.sample_seqs == [0, 2, 3]
    for array in (batch.token_ids, batch.positions, batch.cache_slots, batch.sample_rows):
        assert array.dtype == np.int64
    assert batch.block_tables.dtype == np.int32


def test_blocks_are_appended_until_an_admission_replaces_the_row() -> None:
    builder = BatchBuilder(max_tokens=8, max_running=2, max_blocks=3, block_tokens=2)
    build(
        builder,
        seq(0, 0, [1, 2], prompt=2, blocks=[5], admitted=True),
        seq(1, 0, [9], prompt=1, blocks=[0], admitted=True),
    )
    batch = build(builder, seq(0, 2, [3], prompt=2, blocks=[4]), seq(1, 1, [8], prompt=1))
    assert batch.cache_slots.tolist() == [8, 1]
    batch = build(builder, seq(0, 3, [4], prompt=2))
    assert batch.cache_slots.tolist() == [9]
    batch = build(builder, seq(0, 4, [5], prompt=2, blocks=[6]))
    assert batch.block_tables[0].tolist() == [5, 4, 6]
    batch = build(
        builder, seq(0, 1, [7], prompt=2, blocks=[2], admitted=True)
    )  # another sequence, half of it cached
    assert batch.cache_slots.tolist() == [5]
    batch = build(builder, seq(0, 2, [7], prompt=2, blocks=[3]))
    assert batch.block_tables[0].tolist()[:2] == [2, 3]
    assert batch.block_tables[1].tolist()[:1] == [0]


def test_groups_may_be_empty_and_buffers_are_reused() -> None:
    builder = BatchBuilder(max_tokens=4, max_running=2, max_blocks=1, block_tokens=4)
    first = build(builder, seq(0, 0, [1, 2], prompt=2, blocks=[1], samples=False, admitted=True))
    assert numbers(first.absorbed) == ([0], [], [], [], [])
    assert first.sample_rows.tolist() == []
    second = build(builder, seq(0, 2, [3], prompt=2))
    assert numbers(second.expanded) == ([0], [], [], [], [])
    assert second.num_expanded == 0
    assert np.shares_memory(first.token_ids, second.token_ids)
    assert first.block_tables is second.block_tables
