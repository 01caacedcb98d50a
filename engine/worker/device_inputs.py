"""A batch on a device of its own: one copy a step, from pinned memory, beside the block tables that lie there.

What a step changes is small, but for the block tables: a table of 262,144 tokens in blocks of 32 is 32 KB, and 256
sequences have 8 MB. So the tables stay on the device, and only the rows that have changed are copied.

    staging   [ token_ids | positions | cache_slots | sample_rows | expanded: starts, contexts, rows | absorbed ]
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cierzo.engine.model.inputs import ModelInputs
from cierzo.engine.worker.batch import Batch, Segments
from cierzo.kernels.ops.attention import PagedQueries

ALIGNMENT = 16  # bytes: where every array starts, as kernels want it


class DeviceInputs:
    """Owns the staging memory and its twin on the device. A batch's tensors are valid until the next but one: a
    step may be launched while the one before still runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._staging = deque((torch.empty(0, dtype=torch.uint8), torch.empty(0)) for _ in range(2))
        self._tables: Tensor | None = None

    def load(self, batch: Batch, chosen: Tensor) -> tuple[ModelInputs, Tensor]:
        """The batch on the device, and its sample rows, int64 [M].

        chosen: int64 [max_running], on the device, the token that each slot's sequence was given last.
        """
        tables = self.tables(batch)
        groups = (batch.expanded, batch.absorbed)
        arrays: list[NDArray[Any]] = [batch.token_ids, batch.positions, batch.cache_slots, batch.sample_rows]
        arrays += [batch.pending_rows, batch.pending_slots]
        for group in groups:
            arrays += [group.query_starts, group.context_lengths, group.table_rows]
        copies = self._copy(arrays)
        token_ids, positions, cache_slots, sample_rows, pending_rows, pending_slots = copies[:6]
        if len(batch.pending_rows):
            token_ids[pending_rows] = chosen[pending_slots]
        expanded, absorbed = (
            _queries(group, copies[first : first + 3], tables) for group, first in zip(groups, (6, 9), strict=True)
        )
        inputs = ModelInputs(token_ids, positions, cache_slots, batch.num_expanded, expanded, absorbed)
        return inputs, sample_rows

    def tables(self, batch: Batch) -> Tensor:
        """int32 [max_running, W] on the device, brought up to date with the batch's."""
        if self._tables is None or self._tables.shape != batch.block_tables.shape:
            self._tables = torch.from_numpy(batch.block_tables).to(self._device, copy=True)
        elif batch.changed_rows:
            rows = torch.tensor(batch.changed_rows)
            self._tables[rows.to(self._device)] = torch.from_numpy(batch.block_tables)[rows].to(self._device)
        return self._tables

    def _copy(self, arrays: list[NDArray[Any]]) -> list[Tensor]:
        """Twins of the arrays, through one copy."""
        starts = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)]).tolist()
        host, twin = self._staging.popleft()
        if host.numel() < starts[-1]:
            host = torch.empty(2 * starts[-1], dtype=torch.uint8, pin_memory=self._pinned)
            twin = torch.empty(2 * starts[-1], dtype=torch.uint8, device=self._device)
        self._staging.append((host, twin))
        staging = host.numpy()
        for array, start in zip(arrays, starts, strict=False):
            staging[start : start + array.nbytes] = array.view(np.uint8)
        # The copy may still run when this returns: this memory is written to again when the step's result has been
        # read, at the earliest.
        twin[: starts[-1]].copy_(host[: starts[-1]], non_blocking=True)
        return [
            twin[start : start + array.nbytes].view(_TORCH[array.dtype])
            for array, start in zip(arrays, starts, strict=False)
        ]


_TORCH = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}


def _queries(group: Segments, tensors: list[Tensor], tables: Tensor) -> PagedQueries:
    query_starts, context_lengths, table_rows = tensors
    return PagedQueries(query_starts, context_lengths, table_rows, tables, group.lengths, group.contexts)
