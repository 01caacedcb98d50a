"""Decode steps recorded once as CUDA graphs and replayed: no launch of a kernel waits for Python.

A graph has fixed sizes: it is recorded for a number of sequences and an upper bound of the sum of their contexts,
each from a short list, and serves every step that fits. Rows beyond a step's own are padding: segments without rows
(so that attention gives zeros for them), whose cache entries go to a block that no sequence owns.

    a step of 5 sequences and 13,287 tokens of context -> the graph of (8 sequences, 32,768 tokens)
    query_starts  0 1 2 3 4 5 5 5 5       context_lengths  120 9000 7 64 4096 0 0 0

Kernels take their grids from the bound, and the lengths that count from the device (the plain-torch reference does
not, and runs without graphs). As no kernel's arithmetic
depends on the number of rows or the grid, a replayed step has the bits of a launched one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from cierzo.cache.pool import KVPool
from cierzo.kernels.fault import kernels_since, note
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ops.block import StepRows

# Between powers of two a step of many sequences would compute up to twice what it must.
MOST_DOUBLED = 16
STEP = 16
LEAST_BOUND = 8192  # tokens
BOUND_FACTOR = 4


class Recording(Protocol):
    """Work that was recorded."""

    def replay(self) -> None:
        """Do it again, on what now lies in the memory that it read."""
        ...


Recorder = Callable[[Callable[[], None]], Recording]


class Model(Protocol):
    """A model, as far as whoever runs its steps needs it."""

    def logits(self, rows: StepRows, kv: KVPool, logit_rows: Tensor | None) -> Tensor:
        """fp32 [M,N] of the rows `logit_rows`, None: of all; every token's cache entry is written to `kv`."""
        ...


def buckets(most: int) -> list[int]:
    """Numbers of sequences that graphs are recorded for: 1, 2, 4, 8, 16, 32, 48 .. up to `most`."""
    doubled = [1 << power for power in range(MOST_DOUBLED.bit_length()) if 1 << power < most]
    stepped = range(MOST_DOUBLED + STEP, most, STEP)
    return [*doubled, *stepped, most]


def bound_of(tokens: int) -> int:
    """The least of 8192, 32768, 131072 .. that is not below `tokens`."""
    bound = LEAST_BOUND
    while bound < tokens:
        bound *= BOUND_FACTOR
    return bound


@dataclass(frozen=True, slots=True)
class _Graph:
    rows: StepRows
    recording: Recording
    name: str  # what a CUDA error calls a replay


class DecodeGraphs:
    """Graphs of one model, each recorded at its first use: kernels are compiled for sizes that are no graph's own,
    so that takes no longer than a few steps. All write their logits to one buffer: one for each would be gigabytes.

    padding_slot: cache slot that nobody reads. record: torch's CUDA graphs on a GPU.
    """

    def __init__(
        self,
        model: Model,
        kv: KVPool,
        *,
        max_running: int,
        max_model_len: int,
        padding_slot: int,
        device: torch.device,
        record: Recorder,
    ) -> None:
        self._model, self._kv = model, kv
        self._buckets, self._longest = buckets(max_running), max_model_len
        self._padding_slot = padding_slot
        self._device = device
        self._record = record
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._logits: Tensor | None = None  # [largest number of sequences, vocabulary], made by the first step

    def fits(self, rows: StepRows) -> bool:
        """Tell whether the step is one generated token for each of its sequences."""
        count = len(rows.token_ids)
        return rows.num_expanded == 0 and 0 < count == len(rows.absorbed.contexts) <= self._buckets[-1]

    def logits(self, rows: StepRows) -> Tensor:
        """fp32 [T,N] of a step that fits; valid until the next replay."""
        count = len(rows.token_ids)
        size = next(size for size in self._buckets if size >= count)
        bound = bound_of(sum(rows.absorbed.contexts))
        graph = self._graphs.get((size, bound))
        if graph is None:
            graph = self._graphs[size, bound] = self._new_graph(size, bound, rows)
        self._load(graph.rows, rows, count)
        note(graph.name)
        graph.recording.replay()
        if rows.expert_ids is not None and graph.rows.expert_ids is not None:
            rows.expert_ids.copy_(graph.rows.expert_ids[:, :count])
        assert self._logits is not None
        return self._logits[:count]

    def _new_graph(self, size: int, bound: int, like: StepRows) -> _Graph:
        block_tables, expert_ids = like.absorbed.block_tables, like.expert_ids
        if expert_ids is not None:
            layers, _, top_k = expert_ids.shape
            expert_ids = expert_ids.new_empty((layers, size, top_k))

        none, nothing = [0] * size, PagedQueries.of([], [], [], block_tables)
        queries = replace(
            PagedQueries.of(none, none, none, block_tables),
            query_lengths=[1] * size,
            contexts=[self._longest] * size,
            total_context=bound,
        )
        # each in memory of its own, which begins where kernels want it
        token_ids, positions = (torch.zeros(size, dtype=torch.int64, device=self._device) for _ in range(2))
        cache_slots = torch.full((size,), self._padding_slot, dtype=torch.int64, device=self._device)
        rows = StepRows(token_ids, positions, cache_slots, 0, nothing, queries, expert_ids)

        def forward() -> None:
            # A copy, for which kernels derive anew: what they derived in an earlier run lies in memory that is not
            # the recording's.
            logits = self._model.logits(replace(rows, absorbed=replace(queries)), self._kv, None)
            if self._logits is None:
                self._logits = logits.new_empty(self._buckets[-1], logits.shape[1])
            self._logits[:size] = logits

        name = f"recorded step of {size} sequences, {bound} tokens"
        note(name)
        recording = self._record(forward)
        return _Graph(rows, recording, f"{name} {kernels_since(name)}")

    def _load(self, target: StepRows, source: StepRows, count: int) -> None:
        """The step's rows, and padding behind them."""
        target.token_ids[:count] = source.token_ids
        target.positions[:count] = source.positions
        target.cache_slots[:count] = source.cache_slots
        target.cache_slots[count:] = self._padding_slot
        into, queries = target.absorbed, source.absorbed
        into.query_starts[: count + 1] = queries.query_starts
        into.query_starts[count + 1 :] = count
        into.context_lengths[:count] = queries.context_lengths
        into.context_lengths[count:] = 0
        into.table_rows[:count] = queries.table_rows


def cuda_recorder() -> Recorder:
    """torch's CUDA graphs, all in one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], None]) -> Recording:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and workspaces made before the recording
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            work()
        return graph

    return record
