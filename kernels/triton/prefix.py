"""Shared prefixes in decoding: one program reads the blocks with which several sequences of a batch begin.

A tile has split.ROWS rows, and a sequence that decodes fills as many of them as it has heads: 32 of 64. For a split
that lies within the common prefix of two sequences, the rows of the second take the empty half of the tile of the
first, the leader, and the program of the second does nothing: latents of a shared prefix are read and multiplied
once.

    segments                       0        1        2        3        4        5
    first block                   17        4       17        4        4        9
    mates      int32 [N,3]       0 0 c    1 0 c   0 1 512  1 1 320   4 0 c    5 0 c
    members    int32 [N,M]        0 2      1 3      - -      - -      4 -      5 -

mates: a segment's leader, its place in the leader's tile, how many of its c tokens the two have in common. members:
the segment at each place of a leader's tile. Here M, the places of a tile, is 2. The partial results of all members
stay in the leader's tile, where `_combine` reads them.

A block that two tables hold is the same memory, hence the same values: a row meets the tokens that it would have
met, in the same tiles and splits, from another place in a tile of the same shape. Its bits are those that it has
alone if the place of a row in its tile changes none; segments of several rows rely on that too.

Sharing always pays: the tile is as large either way, and less is read. So it is used wherever a tile has room for
two sequences; one that is alone runs the same code. Leaders and members are found on the device, from the tables,
once a step: a captured graph finds them anew at each replay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from cierzo.kernels.derived import derived
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.triton.launch import Configuration, kept, kernel, launch

BLOCK = 512  # segments, or blocks of a table, that a program compares at a time


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Leaders and members (see above): mates int32 [N,3]; members int32 [N,M], -1 for an empty place."""

    mates: Tensor
    members: Tensor

    @property
    def together(self) -> int:
        """M, the sequences that a tile has room for."""
        return self.members.shape[1]


@kernel
def first_blocks(query_starts_ptr, table_rows_ptr, tables_ptr, table_stride, segments, live):
    """First blocks of segments; -1 for segments that have not exactly one row."""
    start = tl.load(query_starts_ptr + segments, mask=live, other=0)
    one = live & (tl.load(query_starts_ptr + segments + 1, mask=live, other=0) - start == 1)
    rows = tl.load(table_rows_ptr + segments, mask=one, other=0).to(tl.int64)
    return tl.load(tables_ptr + rows * table_stride, mask=one, other=-1)


@kernel
def _prefixes(
    query_starts_ptr, context_lengths_ptr, table_rows_ptr, tables_ptr, mates_ptr, members_ptr, table_stride,
    S: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    first = -2  # equal to no segment's first block
    if tl.load(query_starts_ptr + segment + 1) - tl.load(query_starts_ptr + segment) == 1:
        first = tl.load(tables_ptr + tl.load(table_rows_ptr + segment).to(tl.int64) * table_stride)
    rank = 0  # number of earlier segments that begin with the same block
    for base in range(0, segment, BLOCK):
        others = base + lanes
        theirs = first_blocks(query_starts_ptr, table_rows_ptr, tables_ptr, table_stride, others, others < segment)
        rank += tl.sum((theirs == first).to(tl.int32))
    leader, seen = segment, 0
    for base in range(0, segment, BLOCK):
        others = base + lanes
        theirs = first_blocks(query_starts_ptr, table_rows_ptr, tables_ptr, table_stride, others, others < segment)
        same = (theirs == first).to(tl.int32)
        leads = (same > 0) & (seen + tl.cumsum(same) - 1 == rank // M * M)
        leader = tl.minimum(leader, tl.min(tl.where(leads, others, segment)))
        seen += tl.sum(same)
    context = tl.load(context_lengths_ptr + segment)
    common = context
    if leader != segment:
        blocks = tl.minimum(context, tl.load(context_lengths_ptr + leader)) // S
        table = tables_ptr + tl.load(table_rows_ptr + segment).to(tl.int64) * table_stride
        leaders = tables_ptr + tl.load(table_rows_ptr + leader).to(tl.int64) * table_stride
        for base in range(0, blocks, BLOCK):
            indices = base + lanes
            live = indices < blocks
            ours = tl.load(table + indices, mask=live, other=0)
            differ = ours != tl.load(leaders + indices, mask=live, other=0)
            blocks = tl.minimum(blocks, tl.min(tl.where(differ, indices, blocks)))
        common = blocks * S
    tl.store(mates_ptr + segment * 3, leader)
    tl.store(mates_ptr + segment * 3 + 1, rank % M)
    tl.store(mates_ptr + segment * 3 + 2, common)
    tl.store(members_ptr + leader * M + rank % M, segment)


@kernel
def lent(mates_ptr, segment, segment_start, split_end):
    """Whether the rows of `segment` are in its leader's tile, for the split that ends at split_end, in a round of
    segments that begins at segment_start."""
    leader = tl.load(mates_ptr + segment * 3)
    return (leader != segment) & (leader >= segment_start) & (split_end <= tl.load(mates_ptr + segment * 3 + 2))


@kernel
def guests(mates_ptr, members_ptr, segment, segment_end, length, places, split_end, TOGETHER: tl.constexpr):
    """The segments at `places` of the tile of `segment`, and which of them are lent to it for the split that ends
    at split_end, in a round of segments that ends before segment_end."""
    taken = (places > 0) & (places < tl.where(length == 1, TOGETHER, 0))
    guest = tl.load(members_ptr + segment * TOGETHER + places, mask=taken, other=-1)
    taken = taken & (guest >= 0) & (guest < segment_end)
    return guest, taken & (split_end <= tl.load(mates_ptr + guest * 3 + 2, mask=taken, other=0))


@derived
def prefixes(queries: PagedQueries, block_tokens: int, together: int) -> Prefixes | None:
    """The prefixes that sequences of this step share, found once for all layers. together: M, sequences that a tile
    has room for; None where that is one."""
    segments = len(queries.query_lengths)
    if together < 2:
        return None
    device = queries.block_tables.device
    mates = torch.zeros(max(1, segments), 3, dtype=torch.int32, device=device)
    members = torch.full((segments, together), -1, dtype=torch.int32, device=device)
    if segments < 2:  # its own leader, with no member but itself: nothing is to be found
        return Prefixes(mates, members)
    launch(
        prefixes_configuration(block_tokens, together),
        (segments,),
        query_starts_ptr=queries.query_starts,
        context_lengths_ptr=queries.context_lengths,
        table_rows_ptr=queries.table_rows,
        tables_ptr=queries.block_tables,
        mates_ptr=mates,
        members_ptr=members,
        table_stride=queries.block_tables.stride(0),
    )
    return Prefixes(mates, members)


@kept
def prefixes_configuration(block_tokens: int, together: int) -> Configuration:
    """Configuration of the kernel that finds leaders and members."""
    pointers = ("query_starts", "context_lengths", "table_rows", "tables", "mates", "members")
    types = {f"{name}_ptr": "*i32" for name in pointers} | {"table_stride": "i32"}
    return Configuration(_prefixes, types, {"S": block_tokens, "M": together, "BLOCK": BLOCK})
