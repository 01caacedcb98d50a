"""Limits of the scheduler."""

from __future__ import annotations

import msgspec


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resolved limits; every one is enforced, shown at start and tested.

    `priority_aging_s` is what one level of priority is worth in seconds of waiting: a request of priority p
    that arrived at t is ordered by t + p * priority_aging_s, so a lower level runs first and no level starves.
    """

    budget_tokens: int = 1024
    max_chunk_tokens: int = 512
    max_running: int = 256
    max_waiting: int = 4096
    max_model_len: int = 8192
    priority_aging_s: float = 30.0
