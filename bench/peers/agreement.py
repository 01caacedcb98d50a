"""Does an engine compute this model? Its next-token distributions against transformers' in float32.

Sequences of random tokens are forced upon every engine. At each position three things are compared:
- top 1: whether its likeliest next token is the one that transformers has there. Random weights give flat logits
  (on small4-mini the best token leads the second by less than 0.1 nats at half of the positions), so that rounding
  to bf16 alone changes the first place now and then: transformers' own bf16 reaches 89 % there;
- near: whether transformers gives that token at most `NEAR_NATS` less than its best, which tells ties from errors;
- RMS: of the difference in log-probability, over the engine's `COUNT` likeliest tokens of every position.
The softmax scale is the makers' (`apply_scale` false) on both sides. With the one that transformers has by itself,
first choices on small4-mini agree at 42 % of the positions, 68 % are near, and the RMS is 0.17 nats, not 0.03.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from cierzo.bench.peers import transformers
from cierzo.bench.peers.cells import Cell
from cierzo.bench.peers.engine import Checkpoint, Logprobs, Measured, kept
from cierzo.bench.workload import random_prompt

COUNT = 20
NEAR_NATS = 0.1
SEED = 765_432
FILE = "logprobs.npy"
REFERENCE = msgspec.structs.replace(transformers.DEFAULTS, name="reference", options={"dtype": "float32"})
Table = NDArray[np.float32]


class Agreement(msgspec.Struct, frozen=True):
    """Two shares of the positions in percent, and the RMS in nats."""

    top1_percent: float
    near_percent: float
    rms_logprob: float
    positions: int


def sequences(cell: Cell, vocab_size: int) -> list[list[int]]:
    """Sequences of random tokens that are forced upon the engines."""
    return [random_prompt(index, cell.prompt_tokens, vocab_size, SEED) for index in range(cell.batch)]


def reference(checkpoint: Checkpoint, cell: Cell, folder: Path) -> Table:
    """transformers' log-probabilities in fp32, [sequence, position, vocabulary]; made once. Raises EngineFailed."""

    def make(target: Path) -> None:
        forced = sequences(cell, checkpoint.vocab_size)
        with transformers.offline(REFERENCE, checkpoint, folder) as worker:
            worker.ask("save_logprobs", sequences=forced, path=str(target / FILE))

    made = kept(checkpoint, folder, REFERENCE.name, [msgspec.to_builtins(cell), SEED], make)
    return np.load(made / FILE, mmap_mode="r")


def compare(found: Logprobs, table: Table) -> Measured:
    """The share of equal first choices in percent, with the rest of `Agreement` as its raw value."""
    if [len(sequence) for sequence in found] != [table.shape[1]] * table.shape[0]:
        raise ValueError(f"{[len(sequence) for sequence in found]} positions instead of {table.shape[:2]}")
    top = np.array(found)  # [sequence, position, rank, (token, log-probability)]
    tokens = top[..., 0].astype(np.int64)
    theirs = np.take_along_axis(table, tokens, axis=-1)
    behind = table.max(axis=-1) - theirs[..., 0]  # what transformers gives its own choice more than the engine's
    agreement = Agreement(
        top1_percent=100 * float(np.mean(tokens[..., 0] == table.argmax(axis=-1))),
        near_percent=100 * float(np.mean(behind <= NEAR_NATS)),
        rms_logprob=float(np.sqrt(np.mean((top[..., 1] - theirs) ** 2))),
        positions=behind.size,
    )
    return Measured(agreement.top1_percent, agreement)
