"""A load as single requests, and its course: the steps taken, and where in them requests begin and end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from cierzo.engine.cost.step_model import FloatArray
from cierzo.engine.cost.work import StepShape

Price = Callable[["Steps"], FloatArray]  # seconds of each step


@dataclass(slots=True)
class Load:
    """Requests in order of arrival; arrays [N]. An open load comes at `arrival_s`. In a closed one `clients`
    requests come at the start, and one more whenever one has ended."""

    input_tokens: Sequence[int]
    output_tokens: Sequence[int]
    shared_tokens: Sequence[int]
    arrival_s: Sequence[float] | None = None
    clients: int = 0


@dataclass(slots=True)
class Steps:
    """Steps in a row; arrays [S]. rows: sequences computed. running: sequences that hold a slot."""

    shape: StepShape
    rows: FloatArray
    running: FloatArray


@dataclass(slots=True)
class Course:
    """What became of each request. first, last, arrival: steps [N] with whose end came a request's first token,
    its last one, and in a closed loop the request itself (-1: the start). idle_s: step -> idle seconds before it.

    runs: (request, first, last) of the steps in which it decoded. pauses: (request, step of the token before a
    preemption, step of the token after it).
    """

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    arrival: NDArray[np.int64]
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    pauses: list[tuple[int, int, int]] = field(default_factory=list)
    idle_s: dict[int, float] = field(default_factory=dict)
    most_running: int = 0
    most_waiting: int = 0
    preemptions: int = 0
    kv_room_reached: bool = False
    max_running_reached: bool = False


@dataclass(slots=True)
class Row:
    """A step, or `repeat` steps in a row that differ by one token per decoding sequence.

    decodes, context: sequences that decode, and the tokens that they attend to together. tokens, pairs,
    prompt_context: of the prompts' chunks, which are computed in expanded form. again_tokens, ...: the same of
    generated tokens that a preemption lost, computed in absorbed form. prompts: sequences that have a chunk.
    """

    decodes: int
    context: int
    running: int
    repeat: int = 1
    tokens: int = 0
    pairs: float = 0.0
    prompt_context: int = 0
    again_tokens: int = 0
    again_pairs: float = 0.0
    again_context: int = 0
    prompts: int = 0
    sampled: int = 0

    def chunk(self, start: int, count: int, input_tokens: int, samples: bool) -> None:
        """Add a chunk: tokens `start` to `start + count` of a sequence whose prompt has `input_tokens`."""
        prompt = max(0, min(count, input_tokens - start))
        again = count - prompt
        if prompt:
            self.tokens += prompt
            self.pairs += prompt * (start + (prompt + 1) / 2)
            self.prompt_context += start + prompt
        if again:
            self.again_tokens += again
            self.again_pairs += again * (start + prompt + (again + 1) / 2)
            self.again_context += start + count
        self.prompts += 1
        self.sampled += samples


_FIELDS = attrgetter(*Row.__slots__)


def expand(rows: Sequence[Row]) -> Steps:
    """Each of the rows' steps by itself."""
    table = np.array([_FIELDS(row) for row in rows], dtype=np.float64)
    repeats = table[:, Row.__slots__.index("repeat")].astype(np.int64)
    columns = dict(zip(Row.__slots__, np.repeat(table, repeats, axis=0).T, strict=True))
    decodes = columns["decodes"]
    offset = np.arange(len(decodes)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    context = columns["context"]
    context = context + decodes * offset
    shape = StepShape(
        expanded_tokens=columns["tokens"],
        expanded_pairs=columns["pairs"],
        expanded_context=columns["prompt_context"],
        absorbed_tokens=decodes + columns["again_tokens"],
        absorbed_pairs=context + columns["again_pairs"],
        absorbed_context=context + columns["again_context"],
        sampled=decodes + columns["sampled"],
    )
    return Steps(shape, decodes + columns["prompts"], columns["running"])
