"""A batch as the model takes it: `StepRows` of tensors, views of the host's, or copies on a device of its own.

What a step changes is small, but for the block tables: a table of 262,144 tokens in blocks of 32 is 32 KB, and 256
sequences have 8 MB. So a device keeps the tables, and only the rows that have changed are copied, in one piece with
the batch:

    staged   token_ids | positions | cache_slots | sample_rows | image_rows | expanded: starts, contexts, rows
             | absorbed: the same | pending rows, slots | changed rows of the block tables
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cierzo.engine.worker.batch import Batch
from cierzo.engine.worker.staging import Staging
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ops.block import StepRows


def rows_in_place(batch: Batch) -> tuple[StepRows, Tensor]:
    """Views of the builder's buffers: the batch's rows, and its sample rows, int64 [M]."""
    tensors = [torch.from_numpy(array) for array in _arrays(batch)]
    return _rows(batch, tensors, torch.from_numpy(batch.block_tables))


def _arrays(batch: Batch) -> list[NDArray[Any]]:
    """The arrays that `_rows` takes as tensors."""
    arrays: list[NDArray[Any]] = [batch.token_ids, batch.positions, batch.cache_slots, batch.sample_rows]
    for group in (batch.expanded, batch.absorbed):
        arrays += [group.query_starts, group.context_lengths, group.table_rows]
    return [*arrays, batch.image_rows] if batch.image_parts else arrays


def _rows(batch: Batch, tensors: Sequence[Tensor], tables: Tensor) -> tuple[StepRows, Tensor]:
    token_ids, positions, cache_slots, sample_rows, *segments = tensors
    image_rows = segments[6] if batch.image_parts else None
    expanded, absorbed = (
        PagedQueries(starts, lengths, table_rows, tables, group.query_lengths, group.contexts)
        for group, (starts, lengths, table_rows) in (
            (batch.expanded, segments[:3]),
            (batch.absorbed, segments[3:6]),
        )
    )
    numbers = token_ids, positions, cache_slots
    return StepRows(*numbers, batch.num_expanded, expanded, absorbed, image_rows=image_rows), sample_rows


class DeviceRows:
    """Owns the block tables on the device. A step's tensors are valid until the next but one (see Staging)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staging = Staging(device)
        self._tables: Tensor | None = None

    def load(self, batch: Batch, chosen: Tensor) -> tuple[StepRows, Tensor]:
        """The batch's rows on the device, and its sample rows, int64 [M].

        chosen: int64 [max_running], on the device, the token that each slot's sequence was given last.
        """
        arrays = [*_arrays(batch), batch.pending_rows, batch.pending_slots]
        arrays += [np.array(batch.changed_rows, np.int64), batch.block_tables[batch.changed_rows]]
        *tensors, pending_rows, pending_slots, changed_rows, entries = self._staging.to_device(arrays)
        if len(batch.pending_rows):
            tensors[0][pending_rows] = chosen[pending_slots]
        return _rows(batch, tensors, self._brought_up_to_date(batch, changed_rows, entries))

    def tables(self, rows: int, blocks: int) -> Tensor:
        """The tables, int32 [rows, blocks], where they stay: of max_running sequences, of so many blocks each."""
        if self._tables is None:
            self._tables = torch.zeros((rows, blocks), dtype=torch.int32, device=self._device)
        return self._tables

    def _brought_up_to_date(self, batch: Batch, changed_rows: Tensor, entries: Tensor) -> Tensor:
        """The tables as the batch has them. A sequence's row comes with its admission."""
        tables = self.tables(*batch.block_tables.shape)
        if batch.changed_rows:
            tables[changed_rows] = entries.view(len(batch.changed_rows), -1)
        return tables
