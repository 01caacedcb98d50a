"""A step's plan laid out as flat numpy arrays, in buffers that are kept from step to step. No torch here.

`BatchBuilder` owns the buffers and the `Batch` that it makes of them; step_rows.py makes tensors of that.

Rows of a batch: all expanded segments (prompt tokens), then all absorbed segments (generated tokens), each
group in plan order. A sequence that crosses from its prompt into its output within one step has one of both.

    rows        0 ............. num_expanded ............... T
                | seq 0 | seq 3 | seq 1 | seq 2 | seq 3 |
                   expanded         absorbed        ^ seq 3 crosses

The block table stays between steps: row = slot of a sequence, entry j = its block of positions j*S .. j*S+S-1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from cierzo.scheduler.images import Image
from cierzo.scheduler.plan import PENDING, SeqPlan, StepPlan

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

_NOTHING = np.zeros(0, np.int64)


@dataclass(slots=True, frozen=True)
class Segments:
    """The host's side of kernels' PagedQueries: N runs of query rows, one sequence each, in the builder's buffers.

    `query_starts` int32[N+1] counts from the group's first row; `context_lengths` int32[N] include the segment's
    own tokens; `table_rows` int32[N] are rows of the block table. The lists are the same numbers for host code.
    """

    query_starts: Int32
    context_lengths: Int32
    table_rows: Int32
    query_lengths: list[int]
    contexts: list[int]


@dataclass(slots=True, frozen=True)
class Batch:
    """A step's plan as arrays. All are views of the builder's buffers: valid until its next `build`.

    `token_ids`, `positions`, `cache_slots` int64[T], where a cache slot is block * S + offset in the block.
    `sample_rows` int64[M]: row in T whose logits are wanted; `sample_seqs` list[M]: index in `plan.seqs`.
    `block_tables` int32[max_running, W]; entries beyond a sequence's blocks may be anything. `changed_rows`: those
    that differ from the batch before. `pending_rows`, `pending_slots` int64[J]: rows in T whose token is the one
    that the step before chose for the sequence in a slot; `token_ids` holds nothing of use there. `image_rows`
    int64[I]: rows in T that take an embedding of an image in the place of their token's, those of `image_parts` one
    after the other: (image, first, last + 1), of its embeddings.
    """

    token_ids: Int64
    positions: Int64
    cache_slots: Int64
    num_expanded: int
    expanded: Segments
    absorbed: Segments
    sample_rows: Int64
    sample_seqs: list[int]
    block_tables: Int32
    changed_rows: list[int]
    pending_rows: Int64
    pending_slots: Int64
    image_rows: Int64 = field(default_factory=lambda: _NOTHING)
    image_parts: list[tuple[Image, int, int]] = field(default_factory=list)


class _Group:
    """Segments of one form while they are collected, and the buffers they end in."""

    def __init__(self, max_running: int) -> None:
        self.query_starts = np.zeros(max_running + 1, np.int32)
        self.context_lengths = np.zeros(max_running, np.int32)
        self.table_rows = np.zeros(max_running, np.int32)
        self.clear()

    def clear(self) -> None:
        self.tokens: list[int] = []
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.contexts: list[int] = []
        self.slots: list[int] = []

    def add(self, slot: int, start: int, tokens: list[int]) -> None:
        length = len(tokens)
        self.tokens += tokens
        self.starts.append(start)
        self.lengths.append(length)
        self.contexts.append(start + length)
        self.slots.append(slot)

    def finish(self) -> Segments:
        count = len(self.slots)
        self.query_starts[1 : count + 1] = list(accumulate(self.lengths))
        self.context_lengths[:count] = self.contexts
        self.table_rows[:count] = self.slots
        return Segments(
            query_starts=self.query_starts[: count + 1],
            context_lengths=self.context_lengths[:count],
            table_rows=self.table_rows[:count],
            query_lengths=self.lengths,
            contexts=self.contexts,
        )


class BatchBuilder:
    """Owns the batch buffers and the block tables.

    `max_tokens` bounds T, `max_running` the sequences of a step and their slots, `max_blocks` the blocks of one
    sequence (W); `block_tokens` is S.
    """

    def __init__(self, max_tokens: int, max_running: int, max_blocks: int, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._token_ids = np.zeros(max_tokens, np.int64)
        self._positions = np.zeros(max_tokens, np.int64)
        self._cache_slots = np.zeros(max_tokens, np.int64)
        self._sample_rows = np.zeros(max_running, np.int64)
        self._expanded = _Group(max_running)
        self._absorbed = _Group(max_running)
        self._block_tables = np.zeros((max_running, max_blocks), np.int32)
        self._num_blocks = [0] * max_running  # filled entries of each block table row

    def build(self, plan: StepPlan) -> Batch:
        """Lay out `plan`, and bring the block tables up to date with it."""
        expanded, absorbed = self._expanded, self._absorbed
        expanded.clear()
        absorbed.clear()
        changed_rows, with_images = [], []
        for seq in plan.seqs:
            if seq.new_block_ids or seq.admission is not None:
                self._extend_table(seq)
                changed_rows.append(seq.slot)
            start, tokens = seq.start, seq.token_ids
            prompt_tokens = seq.num_prompt_tokens - start
            if prompt_tokens <= 0:  # no image is in an answer
                absorbed.add(seq.slot, start, tokens)
                continue
            if seq.images:
                with_images.append((seq, len(expanded.tokens)))
            if prompt_tokens >= len(tokens):
                expanded.add(seq.slot, start, tokens)
            else:
                expanded.add(seq.slot, start, tokens[:prompt_tokens])
                absorbed.add(seq.slot, seq.num_prompt_tokens, tokens[prompt_tokens:])
        segments = expanded.finish(), absorbed.finish()
        num_expanded = len(expanded.tokens)
        num_tokens = num_expanded + len(absorbed.tokens)
        self._fill_rows(num_tokens)
        sample_rows, sample_seqs = self._samples(plan, segments, num_expanded)
        pending = self._pending(num_tokens) if plan.ahead else (_NOTHING, _NOTHING)
        image_rows, image_parts = _images(with_images) if with_images else (_NOTHING, [])
        return Batch(
            token_ids=self._token_ids[:num_tokens],
            positions=self._positions[:num_tokens],
            cache_slots=self._cache_slots[:num_tokens],
            num_expanded=num_expanded,
            expanded=segments[0],
            absorbed=segments[1],
            sample_rows=sample_rows,
            sample_seqs=sample_seqs,
            block_tables=self._block_tables,
            changed_rows=changed_rows,
            pending_rows=pending[0],
            pending_slots=pending[1],
            image_rows=image_rows,
            image_parts=image_parts,
        )

    def extend_table(self, slot: int, block_ids: list[int]) -> None:
        """Append to the row of a sequence that goes on."""
        held = self._num_blocks[slot]
        self._block_tables[slot, held : held + len(block_ids)] = block_ids
        self._num_blocks[slot] = held + len(block_ids)

    def _extend_table(self, seq: SeqPlan) -> None:
        """Write new blocks to the place that their tokens give: a plan may be built again after a failure."""
        num_blocks = -(-(seq.start + len(seq.token_ids)) // self._block_tokens)
        held = 0 if seq.admission is not None else num_blocks - len(seq.new_block_ids)
        self._num_blocks[seq.slot] = held
        self.extend_table(seq.slot, seq.new_block_ids)

    def _fill_rows(self, num_tokens: int) -> None:
        """Token ids, positions and cache slots of all rows, each in a few array operations."""
        expanded, absorbed = self._expanded, self._absorbed
        self._token_ids[:num_tokens] = expanded.tokens + absorbed.tokens
        starts = np.array(expanded.starts + absorbed.starts, np.int64)
        slots = np.array(expanded.slots + absorbed.slots, np.int64)
        positions = self._positions[:num_tokens]
        if len(starts) == num_tokens:  # one token each: at one sequence, every array operation counts
            positions[:] = starts
        else:
            lengths = np.array(expanded.lengths + absorbed.lengths, np.int64)
            first_rows = np.cumsum(lengths) - lengths
            np.add(np.arange(num_tokens), np.repeat(starts - first_rows, lengths), out=positions)
            slots = np.repeat(slots, lengths)
        block_indices, offsets = np.divmod(positions, self._block_tokens)
        blocks = self._block_tables[slots, block_indices]
        np.multiply(blocks, self._block_tokens, out=self._cache_slots[:num_tokens], dtype=np.int64)
        self._cache_slots[:num_tokens] += offsets

    def _pending(self, num_tokens: int) -> tuple[Int64, Int64]:
        """Rows whose token is pending, and the slots of their sequences."""
        groups = (self._expanded, self._absorbed)
        slots, lengths = (
            np.array(groups[0].slots + groups[1].slots, np.int64),
            groups[0].lengths + groups[1].lengths,
        )
        rows = np.flatnonzero(self._token_ids[:num_tokens] == PENDING)
        return rows, np.repeat(slots, lengths)[rows]

    def _samples(
        self, plan: StepPlan, segments: tuple[Segments, Segments], num_expanded: int
    ) -> tuple[Int64, list[int]]:
        """The last row of every sampling sequence: in the absorbed group if it has computed any output there."""
        expanded_ends = iter(segments[0].query_starts[1:].tolist())
        absorbed_ends = iter(segments[1].query_starts[1:].tolist())
        rows: list[int] = []
        seqs: list[int] = []
        for index, seq in enumerate(plan.seqs):
            end, row = seq.start + len(seq.token_ids), 0
            if seq.start < seq.num_prompt_tokens:
                row = next(expanded_ends) - 1
            if end > seq.num_prompt_tokens:
                row = num_expanded + next(absorbed_ends) - 1
            if seq.samples:
                rows.append(row)
                seqs.append(index)
        sample_rows = self._sample_rows[: len(rows)]
        sample_rows[:] = rows
        return sample_rows, seqs


def _images(seqs: list[tuple[SeqPlan, int]]) -> tuple[Int64, list[tuple[Image, int, int]]]:
    """Rows that take embeddings, and which. seqs: each with the row of its first token."""
    rows: list[Int64] = []
    parts: list[tuple[Image, int, int]] = []
    for seq, first_row in seqs:
        for image in seq.images:
            first, last = image.embeddings(seq.start, seq.start + len(seq.token_ids))
            numbers = np.arange(first, last)
            row_ends = numbers // image.columns  # tokens that end a row, before each
            rows.append(numbers + row_ends + (image.offset - seq.start + first_row))
            parts.append((image, first, last))
    return np.concatenate(rows), parts
