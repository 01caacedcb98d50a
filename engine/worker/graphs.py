"""Decode steps recorded once as CUDA graphs and replayed: no launch of a kernel waits for Python.

A graph has fixed sizes: it is recorded for a number of sequences and an upper bound of the sum of their contexts,
each from a short list, and serves every step that fits. Rows beyond a step's own are padding: segments without rows
(so that attention gives zeros for them), whose cache entries go to a block that no sequence owns.

    a step of 5 sequences and 13,287 tokens of context -> the graph of (8 sequences, 32,768 tokens)
    query_starts  0 1 2 3 4 5 5 5 5       context_lengths  120 9000 7 64 4096 0 0 0

Kernels take their grids from the bound, and the lengths that count from the device (the plain-torch reference does
not, and runs without graphs). As no kernel's arithmetic depends on the number of rows or the grid, a replayed step
has the bits of a launched one.

All are recorded before the first step: recording one takes as long as ten steps. What they leave in memory is one
pool (device_memory.py counts it). Torch gives memory that a recording let go of to later recordings in the same
pool, on the same stream: they never run at the same time. So the largest comes first, and what the others need lies
in its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from cierzo.cache.pool import KVPool
from cierzo.engine.graph_sizes import bounds, buckets
from cierzo.kernels.fault import kernels_since, note
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ops.block import StepRows


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

    def head(self, rows: StepRows, kv: KVPool) -> Callable[[Tensor], Tensor]:
        """Compute the same without logits; what makes them, of some rows: int64 [M] -> fp32 [M,N]."""
        ...


@dataclass(frozen=True, slots=True)
class _Graph:
    rows: StepRows
    recording: Recording
    name: str  # what a CUDA error calls a replay


class DecodeGraphs:
    """Graphs of one model, all recorded before its first step. All write their logits to one buffer: one for each
    would be gigabytes.

    cached_tokens: what the cache holds; the slot behind them is one that nobody reads. record: torch's CUDA graphs
    on a GPU.
    """

    def __init__(
        self,
        model: Model,
        kv: KVPool,
        *,
        max_running: int,
        max_model_len: int,
        cached_tokens: int,
        device: torch.device,
        record: Recorder,
    ) -> None:
        self._model, self._kv = model, kv
        self._bounds = {size: bounds(size, max_model_len, cached_tokens) for size in buckets(max_running)}
        self._most, self._longest = max_running, max_model_len
        self._padding_slot = cached_tokens
        self._device = device
        self._record = record
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._logits: Tensor | None = None  # [largest number of sequences, vocabulary], made by the first recording

    def __len__(self) -> int:
        """Number of graphs, recorded or to be recorded."""
        return sum(map(len, self._bounds.values()))

    @torch.inference_mode()
    def record_all(
        self, block_tables: Tensor, experts: tuple[int, int] | None, done: Callable[[], object] = lambda: None
    ) -> None:
        """Record all graphs. block_tables int32 [max_running,W], which stay where they are. experts: (MoE layers,
        experts per token), if those of a step are wanted. done: called after each. Raises what the model raises."""
        for size, of_size in reversed(self._bounds.items()):
            for bound in reversed(of_size):
                self._graphs[size, bound] = self._new_graph(size, bound, block_tables, experts)
                done()

    def fits(self, rows: StepRows) -> bool:
        """Tell whether the step is one generated token for each of its sequences, and was recorded."""
        count = len(rows.token_ids)
        one_each = rows.num_expanded == 0 and 0 < count == len(rows.absorbed.contexts) <= self._most
        return one_each and self._pair(rows) in self._graphs

    def _pair(self, rows: StepRows) -> tuple[int, int]:
        """(number of sequences, bound) of the graph that a step fits; bound 0 if it has more tokens than any."""
        size = next(size for size in self._bounds if size >= len(rows.token_ids))
        tokens = sum(rows.absorbed.contexts)
        return size, next((bound for bound in self._bounds[size] if bound >= tokens), 0)

    def logits(self, rows: StepRows) -> Tensor:
        """fp32 [T,N] of a step that fits; valid until the next replay."""
        count, graph = len(rows.token_ids), self._graphs[self._pair(rows)]
        self._load(graph.rows, rows, count)
        note(graph.name)
        graph.recording.replay()
        if rows.expert_ids is not None and graph.rows.expert_ids is not None:
            rows.expert_ids.copy_(graph.rows.expert_ids[:, :count])
        assert self._logits is not None
        return self._logits[:count]

    def _new_graph(self, size: int, bound: int, block_tables: Tensor, experts: tuple[int, int] | None) -> _Graph:
        expert_ids = None
        if experts is not None:
            layers, top_k = experts
            expert_ids = torch.empty((layers, size, top_k), dtype=torch.int64, device=self._device)
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
                self._logits = logits.new_empty(self._most, logits.shape[1])
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
    """torch's CUDA graphs, all in one pool of memory and on one stream: torch keeps what was let go of by stream,
    and a stream for each recording would leave a step's memory with every one of them."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record(work: Callable[[], None]) -> Recording:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # what torch makes at the first use of an operation is made before the recording
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            work()
        return graph

    return record
