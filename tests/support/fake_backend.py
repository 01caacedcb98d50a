"""A backend for bench/peers/workers/loop.py, in place of an engine: token k of request i is there at once, but says
(k + 1) * seconds_a_token."""

from __future__ import annotations

import os
from typing import Any


class Backend:
    """`checkpoint` "missing" cannot be loaded; a prompt that begins with `poison` ends the process."""

    def __init__(self, checkpoint: str, seconds_a_token: float = 0.5, poison: int = -1) -> None:
        if checkpoint.endswith("missing"):
            raise FileNotFoundError("no such checkpoint")
        print("libraries print to stdout when they load")
        self.seconds_a_token = seconds_a_token
        self.poison = poison
        self.seen: list[Any] = []

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        if any(prompt[0] == self.poison for prompt in prompts):
            os._exit(3)
        self.seen.append([len(prompts), len(prompts[0]), new_tokens])
        return [[(k + 1) * self.seconds_a_token for k in range(new_tokens)] for _ in prompts]

    def top_logprobs(self, sequences: list[list[int]], count: int) -> list[list[list[list[float]]]]:
        return [[[[token, -0.5]] * count for token in sequence] for sequence in sequences]

    def history(self) -> list[Any]:
        return self.seen
