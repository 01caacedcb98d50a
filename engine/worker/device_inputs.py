"""A batch on a device of its own: one copy a step, beside the block tables that lie there.

What a step changes is small, but for the block tables: a table of 262,144 tokens in blocks of 32 is 32 KB, and 256
sequences have 8 MB. So the tables stay on the device, and only the rows that have changed are copied.

    staged   token_ids | positions | cache_slots | sample_rows | pending rows, slots
             | expanded: starts, contexts, rows | absorbed: the same | changed rows of the block tables
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cierzo.engine.model.inputs import ModelInputs
from cierzo.engine.worker.batch import Batch, Segments
from cierzo.engine.worker.staging import Staging
from cierzo.kernels.ops.attention import PagedQueries


class DeviceInputs:
    """Owns the block tables on the device. A batch's tensors are valid until the next but one (see Staging)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staging = Staging(device)
        self._tables: Tensor | None = None

    def load(self, batch: Batch, chosen: Tensor) -> tuple[ModelInputs, Tensor]:
        """The batch on the device, and its sample rows, int64 [M].

        chosen: int64 [max_running], on the device, the token that each slot's sequence was given last.
        """
        groups = (batch.expanded, batch.absorbed)
        arrays: list[NDArray[Any]] = [batch.token_ids, batch.positions, batch.cache_slots, batch.sample_rows]
        arrays += [batch.pending_rows, batch.pending_slots]
        for group in groups:
            arrays += [group.query_starts, group.context_lengths, group.table_rows]
        arrays += [np.array(batch.changed_rows, np.int64), batch.block_tables[batch.changed_rows]]
        copies = self._staging.to_device(arrays)
        token_ids, positions, cache_slots, sample_rows, pending_rows, pending_slots = copies[:6]
        if len(batch.pending_rows):
            token_ids[pending_rows] = chosen[pending_slots]
        tables = self._brought_up_to_date(batch, *copies[12:])
        expanded, absorbed = (
            _queries(group, copies[first : first + 3], tables) for group, first in zip(groups, (6, 9), strict=True)
        )
        inputs = ModelInputs(token_ids, positions, cache_slots, batch.num_expanded, expanded, absorbed)
        return inputs, sample_rows

    def _brought_up_to_date(self, batch: Batch, changed_rows: Tensor, entries: Tensor) -> Tensor:
        """The tables, int32 [max_running, W], as the batch has them. A sequence's row comes with its admission."""
        if self._tables is None:
            self._tables = torch.zeros(batch.block_tables.shape, dtype=torch.int32, device=self._device)
        if batch.changed_rows:
            self._tables[changed_rows] = entries.view(len(batch.changed_rows), -1)
        return self._tables


def _queries(group: Segments, tensors: list[Tensor], tables: Tensor) -> PagedQueries:
    query_starts, context_lengths, table_rows = tensors
    return PagedQueries(query_starts, context_lengths, table_rows, tables, group.lengths, group.contexts)
