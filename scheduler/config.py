"""Limits of the scheduler."""

from __future__ import annotations

import msgspec


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resolved limits; every one is enforced, shown at start and tested.

    `priority_aging_s` is what one level of priority is worth in seconds of waiting: a request of priority p
    that arrived at t is ordered by t + p * priority_aging_s, so a lower level runs first and no level starves.
    `max_step_s` is the target for a step's predicted seconds, which chunks of prompts are cut to; 0: tokens alone.
    `image_cache_tokens` bounds the embeddings of images that are kept, in image tokens; `image_stages`: parts that
    a vision tower's work on an image can be cut into, one or a few for a step.
    """

    budget_tokens: int = 1024
    max_chunk_tokens: int = 512
    max_step_s: float = 0.0
    max_running: int = 256
    max_waiting: int = 4096
    max_model_len: int = 8192
    priority_aging_s: float = 30.0
    image_cache_tokens: int = 16_384
    image_stages: int = 1

    def require(self, capacity_tokens: int) -> None:
        """Raise ValueError for limits with which a step could stall, beside a cache of `capacity_tokens`: every
        running sequence gets a token, any one request fits."""
        if not 1 <= self.max_running <= self.budget_tokens:
            raise ValueError(
                f"max_running={self.max_running} must be 1 to budget_tokens={self.budget_tokens}: "
                f"each running sequence may need a token in the same step"
            )
        if self.max_chunk_tokens < 1:
            raise ValueError(f"max_chunk_tokens={self.max_chunk_tokens} must be >= 1")
        if not self.max_step_s >= 0:
            raise ValueError(f"max_step_s={self.max_step_s} must be >= 0")
        if not 1 <= self.max_model_len <= capacity_tokens:
            raise ValueError(
                f"max_model_len={self.max_model_len} must be 1 to {capacity_tokens}, the tokens the cache holds"
            )
