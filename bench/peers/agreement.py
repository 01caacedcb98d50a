"""Does an engine compute this model? Its next-token distributions against transformers' in float32.

Sequences of random tokens are forced upon every engine. At each position three things are compared:
- top 1: whether its likeliest next token is the one that transformers has there. Random weights give flat logits,
  and bf16 rounds the two best ones to a tie now and then, so no engine in bf16 reaches 100 %;
- clear: the same over the positions where transformers' best is ahead of its second by more than `CLEAR_NATS`;
- RMS: of the difference in log-probability, over the engine's `COUNT` likeliest tokens of every position.
The softmax scale is the makers' (`apply_scale` false) on both sides.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cierzo.bench.peers.cells import Cell
from cierzo.bench.peers.engine import Checkpoint, Logprobs, Measured
from cierzo.bench.peers.kept import kept
from cierzo.bench.peers.transformers import worker
from cierzo.bench.traces import random_prompt

COUNT = 20
CLEAR_NATS = 0.05
LIMIT_PERCENT = 95.0
SEED = 765_432
FILE = "logprobs.npy"
Table = NDArray[np.float32]


class Agreement(msgspec.Struct, frozen=True):
    """Percent, percent and nats; `positions` in all, `clear_positions` among them."""

    top1_percent: float
    clear_percent: float
    rms_logprob: float
    positions: int
    clear_positions: int


def sequences(cell: Cell, vocab_size: int) -> list[list[int]]:
    """What is forced upon the engines."""
    return [random_prompt(index, cell.prompt_tokens, vocab_size, SEED) for index in range(cell.batch)]


def reference(checkpoint: Checkpoint, cell: Cell, folder: Path) -> Table:
    """transformers' log-probabilities in fp32, [sequence, position, vocabulary]; made once. Raises EngineFailed."""
    target = folder / "converted" / f"reference-{checkpoint.name}"
    recipe: Any = [msgspec.to_builtins(cell), SEED]
    path = kept(target, checkpoint.path, recipe, functools.partial(_make, checkpoint, cell, folder)) / FILE
    table: Table = np.load(path, mmap_mode="r")
    return table


def _make(checkpoint: Checkpoint, cell: Cell, folder: Path, target: Path) -> None:
    log = folder / "logs" / f"reference-{checkpoint.name}.log"
    session = worker(checkpoint, {"dtype": "float32"}, folder, log)
    try:
        session.ask("save_logprobs", sequences=sequences(cell, checkpoint.vocab_size), path=str(target / FILE))
    finally:
        session.close()


def compare(found: Logprobs, table: Table) -> Measured:
    """The share of equal first choices in percent, with the rest of `Agreement` as its raw value."""
    if [len(sequence) for sequence in found] != [table.shape[1]] * table.shape[0]:
        raise ValueError(f"{[len(sequence) for sequence in found]} positions instead of {table.shape[:2]}")
    top = np.array(found)  # [sequence, position, rank, (token, log-probability)]
    tokens = top[..., 0].astype(np.int64)
    difference = top[..., 1] - np.take_along_axis(table, tokens, axis=-1)
    second, best = np.sort(np.partition(table, -2, axis=-1)[..., -2:], axis=-1).transpose(2, 0, 1)
    equal = tokens[..., 0] == table.argmax(axis=-1)
    clear = best - second > CLEAR_NATS
    agreement = Agreement(
        top1_percent=100 * float(equal.mean()),
        clear_percent=100 * float(equal[clear].mean()) if clear.any() else 100.0,
        rms_logprob=float(np.sqrt(np.mean(difference**2))),
        positions=int(equal.size),
        clear_positions=int(clear.sum()),
    )
    return Measured(agreement.top1_percent, agreement)
