"""The course of a load: the steps taken, and where in them requests begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from cierzo.engine.cost.step_model import FloatArray
from cierzo.engine.cost.work import StepShape


@dataclass(slots=True)
class Row:
    """A step, or `repeat` steps in a row that differ by one token per decoding sequence.

    decodes, context: sequences that decode, and the tokens that they attend to together. running: sequences that
    hold a slot. prompts: those that have a chunk. The rest is of these chunks, as in StepShape; what a preemption
    lost of generated tokens is computed in absorbed form.
    """

    decodes: int
    context: int
    running: int
    repeat: int = 1
    prompts: int = 0
    expanded_tokens: int = 0
    expanded_pairs: float = 0.0
    expanded_context: int = 0
    absorbed_tokens: int = 0
    absorbed_pairs: float = 0.0
    absorbed_context: int = 0
    sampled: int = 0

    def chunk(self, start: int, count: int, input_tokens: int, samples: bool) -> None:
        """Add a chunk: tokens `start` to `start + count` of a sequence whose prompt has `input_tokens`."""
        prompt = max(0, min(count, input_tokens - start))
        again = count - prompt
        if prompt:
            self.expanded_tokens += prompt
            self.expanded_pairs += prompt * (start + (prompt + 1) / 2)
            self.expanded_context += start + prompt
        if again:
            self.absorbed_tokens += again
            self.absorbed_pairs += again * (start + prompt + (again + 1) / 2)
            self.absorbed_context += start + count
        self.prompts += 1
        self.sampled += samples


@dataclass(slots=True)
class Course:
    """The steps of a load as rows, in order, and where its requests are in them.

    first, last, arrival: steps [N] with whose end came a request's first token, its last one, and in a closed loop
    the request itself (-1: the start). pauses: (request, step of the token before a preemption, step of the token
    after it). idle_s: step -> idle seconds before it.
    """

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    arrival: NDArray[np.int64]
    rows: list[Row] = field(default_factory=list)
    pauses: list[tuple[int, int, int]] = field(default_factory=list)
    idle_s: dict[int, float] = field(default_factory=dict)
    most_running: int = 0
    most_waiting: int = 0
    preemptions: int = 0
    kv_room_reached: bool = False
    max_running_reached: bool = False


_FIELDS = attrgetter(*Row.__slots__)


def expand(rows: Sequence[Row]) -> tuple[StepShape, FloatArray]:
    """Shapes of each of the rows' steps by itself, and the sequences in them; arrays [S]."""
    table = np.array([_FIELDS(row) for row in rows], dtype=np.float64)
    repeats = table[:, Row.__slots__.index("repeat")].astype(np.int64)
    of = dict(zip(Row.__slots__, np.repeat(table, repeats, axis=0).T, strict=True))
    decodes = of["decodes"]
    earlier = np.arange(len(decodes)) - np.repeat(np.cumsum(repeats) - repeats, repeats)  # steps of the same row
    context = of["context"] + decodes * earlier
    for name, more in {
        "absorbed_tokens": decodes,
        "absorbed_pairs": context,
        "absorbed_context": context,
        "sampled": decodes,
    }.items():
        of[name] = of[name] + more
    return StepShape(**{name: of[name] for name in StepShape.__slots__}), decodes + of["prompts"]
