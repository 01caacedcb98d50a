"""transformers, whose `generate` is the engine that everybody has. It has no server of its own worth the name.

In float32 it also says whether an engine computes this model: next-token distributions are compared with its own.
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

from cierzo.bench.peers.engine import AGREEMENT, Engine, Logprobs, Measured, Session, kept
from cierzo.bench.peers.environments import python
from cierzo.bench.peers.process import Worker
from cierzo.bench.workload import random_prompt
from cierzo.engine.model.read_config import read_model_config

COUNT = 20
NEAR_NATS = 0.1
SEED = 765_432
FILE = "logprobs.npy"
Table = NDArray[np.float32]


class Transformers(Engine, frozen=True):
    """`generate` as it comes: sdpa attention, grouped_mm experts."""

    peer: str = "transformers"

    def offline(self, checkpoint: Path, folder: Path) -> Worker:
        """`generate` in a worker, in an environment of its own."""
        return Worker(self, checkpoint, folder, python(self.peer, folder))


ENGINES = (Transformers(name="transformers"),)
REFERENCE = Transformers(name="reference", options={"dtype": "float32"})


def sequences(checkpoint: Path) -> list[list[int]]:
    """Sequences of random tokens that are forced upon the engines."""
    vocab_size = read_model_config(checkpoint).vocab_size
    return [random_prompt(index, AGREEMENT.prompt_tokens, vocab_size, SEED) for index in range(AGREEMENT.batch)]


def reference(checkpoint: Path, folder: Path) -> Table:
    """transformers' log-probabilities in fp32, [sequence, position, vocabulary]; made once. Raises EngineFailed."""

    def make(target: Path) -> None:
        with REFERENCE.offline(checkpoint, folder) as worker:
            worker.ask("save_logprobs", sequences=sequences(checkpoint), path=str(target / FILE))

    made = kept(checkpoint, folder, REFERENCE.name, [msgspec.to_builtins(AGREEMENT), SEED], make)
    return np.load(made / FILE, mmap_mode="r")


def agreement(session: Session, checkpoint: Path, folder: Path) -> Measured:
    """How well an engine agrees with transformers. Raises EngineFailed."""
    table = reference(checkpoint, folder)
    return compare(session.top_logprobs(sequences(checkpoint), COUNT), table)


def compare(found: Logprobs, table: Table) -> Measured:
    """The share of equal first choices in percent; raw: the near ones too, and the RMS in nats."""
    if [len(sequence) for sequence in found] != [table.shape[1]] * table.shape[0]:
        raise ValueError(f"{[len(sequence) for sequence in found]} positions instead of {table.shape[:2]}")
    top = np.array(found)  # [sequence, position, rank, (token, log-probability)]
    tokens = top[..., 0].astype(np.int64)
    theirs = np.take_along_axis(table, tokens, axis=-1)
    behind = table.max(axis=-1) - theirs[..., 0]  # what transformers gives its own choice more than the engine's
    top1_percent = 100 * float(np.mean(tokens[..., 0] == table.argmax(axis=-1)))
    raw = {
        "top1_percent": top1_percent,
        "near_percent": 100 * float(np.mean(behind <= NEAR_NATS)),
        "rms_logprob": float(np.sqrt(np.mean((top[..., 1] - theirs) ** 2))),
        "positions": behind.size,
    }
    return Measured(top1_percent, raw)
