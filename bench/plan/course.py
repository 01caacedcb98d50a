"""A load as single requests, and what becomes of it: steps in a row, and where in them requests begin and end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cierzo.engine.cost.step_model import FloatArray
from cierzo.engine.cost.work import StepShape

Price = Callable[["Steps"], FloatArray]  # seconds of each step


@dataclass(slots=True)
class Load:
    """Requests in order of arrival; arrays [N]. Open: they come at `arrival_s`. Closed: `clients` of them at once,
    each other one when one has ended."""

    input_tokens: Sequence[int]
    output_tokens: Sequence[int]
    shared_tokens: Sequence[int]
    arrival_s: Sequence[float] | None = None
    clients: int = 0


@dataclass(slots=True)
class Steps:
    """Steps in a row; arrays [S]. rows: sequences computed. running: those that hold a slot."""

    shape: StepShape
    rows: FloatArray
    running: FloatArray


@dataclass(slots=True)
class Course:
    """What happened. Arrays [N] of step numbers: the one that ended with a request's first token, and with its
    last; arrival: the step with whose end it came (-1: the start), of a closed loop. idle_s: before a step.

    runs: (request, first, last step) in which it decoded. pauses: (request, step of the token before a preemption,
    step of the one after it).
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
    """A step as it was planned, or `repeat` of them that differ by a token per decoding sequence. Chunks of
    prompts are computed in expanded form; `again_`: of generated tokens that a preemption lost, absorbed."""

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
        """Add tokens `start` to `start + count` of a sequence."""
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


def expand(rows: Sequence[Row]) -> Steps:
    """Each step by itself."""
    table = np.array(
        [
            (
                *(r.repeat, r.decodes, r.context, r.running, r.tokens, r.pairs, r.prompt_context),
                *(r.again_tokens, r.again_pairs, r.again_context, r.prompts, r.sampled),
            )
            for r in rows
        ],
        dtype=np.float64,
    )
    repeats = table[:, 0].astype(np.int64)
    columns = np.repeat(table, repeats, axis=0).T
    _, decodes, context, running, tokens, pairs, prompt_context, *rest = columns
    again_tokens, again_pairs, again_context, prompts, sampled = rest
    offset = np.arange(len(decodes)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    context = context + decodes * offset
    shape = StepShape(
        expanded_tokens=tokens,
        expanded_pairs=pairs,
        expanded_context=prompt_context,
        absorbed_tokens=decodes + again_tokens,
        absorbed_pairs=context + again_pairs,
        absorbed_context=context + again_context,
        sampled=decodes + sampled,
    )
    return Steps(shape, decodes + prompts, running)
