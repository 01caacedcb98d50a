"""Log-probabilities of prompts: of each token behind a row of a step, and of the likeliest ones at its place.

Logits of a long prompt would be gigabytes, so they are made BLOCK_ROWS rows at a time, and only what is wanted of
them stays. No row's arithmetic depends on the rows beside it: where a prompt is cut changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cierzo.engine.worker.batch import Batch
from cierzo.engine.worker.staging import Staging
from cierzo.kernels.ops import sampling as ops
from cierzo.scheduler.plan import Scoring, SeqPlan, TokenLogprobs, packed_entry

BLOCK_ROWS = 128  # of logits at a time

Head = Callable[[Tensor], Tensor]  # rows of a step, int64 [M] -> their logits, fp32 [M,N]
Scores = Callable[[], dict[int, list[msgspec.Raw] | None]]  # by sequence of the plan; None: logits not finite


class Scorer:
    """Scores the prompts of steps.

    staging: how rows get to a device of its own and results back, used by nobody else; without it the device is
    the host.
    """

    def __init__(self, staging: Staging | None = None) -> None:
        self._staging = staging

    def launch(self, seqs: Sequence[SeqPlan], batch: Batch, head: Head) -> Scores:
        """Score without waiting for the device; the function waits, and gives the entries."""
        scorings = {index: seq.scoring for index, seq in enumerate(seqs) if seq.scoring is not None}
        token_ids = np.array([token for one in scorings.values() for token in one.token_ids], np.int64)
        rows, ids = self._on_device([_rows(seqs, batch), token_ids])
        count = max(one.count for one in scorings.values())
        blocks = [
            _score(head(rows[start : start + BLOCK_ROWS]), ids[start : start + BLOCK_ROWS], count)
            for start in range(0, len(token_ids), BLOCK_ROWS)
        ]
        results = self._on_host([torch.cat(column) for column in zip(*blocks, strict=True)])
        return lambda: _entries(scorings, *results())

    def _on_device(self, arrays: list[NDArray[np.int64]]) -> list[Tensor]:
        if self._staging is None:
            return [torch.from_numpy(array) for array in arrays]
        return self._staging.to_device(arrays)

    def _on_host(self, tensors: list[Tensor]) -> Callable[[], list[NDArray[Any]]]:
        if self._staging is None:
            return lambda: [tensor.numpy() for tensor in tensors]
        return self._staging.to_host(tensors)


def _rows(seqs: Sequence[SeqPlan], batch: Batch) -> NDArray[np.int64]:
    """The rows that score, in the order of the plan. All are of prompts, whose segments lie in that order too."""
    first_rows = iter(batch.expanded.query_starts.tolist())
    rows = []
    for seq in seqs:
        if seq.start >= seq.num_prompt_tokens:
            continue
        first = next(first_rows)
        if seq.scoring is not None:
            offset = first + seq.scoring.start - seq.start
            rows.append(np.arange(offset, offset + len(seq.scoring.token_ids)))
    return np.concatenate(rows)


def _score(logits: Tensor, token_ids: Tensor, count: int) -> tuple[Tensor, ...]:
    """fp32 [M], the largest logits; fp32 [M], the tokens' log-probabilities; fp32 [M,C], the largest of these;
    int64 [M,C], whose those are."""
    scores = ops.log_probabilities(logits)
    own = scores.gather(1, token_ids[:, None])[:, 0]
    return ops.peaks(logits)[0], own, *ops.top_tokens(scores, count)


def _entries(
    scorings: dict[int, Scoring],
    peaks: NDArray[np.float32],
    own: NDArray[np.float32],
    top: NDArray[np.float32],
    top_ids: NDArray[np.int64],
) -> dict[int, list[msgspec.Raw] | None]:
    """Entries of each sequence; None where a row's logits are not finite."""
    finite = np.isfinite(peaks) & np.isfinite(own)
    entries: dict[int, list[msgspec.Raw] | None] = {}
    start = 0
    for index, scoring in scorings.items():
        end = start + len(scoring.token_ids)
        columns = own[start:end], top_ids[start:end, : scoring.count], top[start:end, : scoring.count]
        rows = zip(scoring.token_ids, *(column.tolist() for column in columns), strict=True)
        entries[index] = [packed_entry(TokenLogprobs(*row)) for row in rows] if finite[start:end].all() else None
        start = end
    return entries
