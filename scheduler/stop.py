"""When a sequence ends by itself. Stop strings are found where the text is, not here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cierzo.scheduler.params import SamplingParams

StopReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class StopRule:
    """The stop conditions of one sequence, in known tokens (prompt and output together).

    A stop token ends the sequence from `first_stop_tokens` known tokens on, itself counted; any token does at
    `limit_tokens`.
    """

    stop_token_ids: frozenset[int]
    first_stop_tokens: int
    limit_tokens: int

    def check(self, token_id: int, num_tokens: int) -> StopReason | None:
        """Whether `token_id`, the last of `num_tokens` known tokens, ends the sequence. A stop token wins."""
        if token_id in self.stop_token_ids and num_tokens >= self.first_stop_tokens:
            return "stop"
        if num_tokens >= self.limit_tokens:
            return "length"
        return None


def stop_rule(
    sampling: SamplingParams, eos_token_ids: tuple[int, ...], num_prompt_tokens: int, max_model_len: int
) -> StopRule:
    """The rule of a sequence: eos (unless ignored) and stop tokens after `min_tokens`, `max_tokens`, and the
    model's length, which cuts whatever `max_tokens` allows beyond it."""
    eos = () if sampling.ignore_eos else eos_token_ids
    return StopRule(
        stop_token_ids=frozenset((*eos, *sampling.stop_token_ids)),
        first_stop_tokens=num_prompt_tokens + sampling.min_tokens,
        limit_tokens=min(num_prompt_tokens + sampling.max_tokens, max_model_len),
    )
