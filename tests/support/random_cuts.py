"""Chunks of prompts whose sizes are drawn by chance, within the scheduler's own limits."""

from __future__ import annotations

import contextlib
import random
from unittest.mock import patch

from cierzo.scheduler import policy


def random_cuts(seed: int | None) -> contextlib.AbstractContextManager[object]:
    """Patch the scheduler's choice of a chunk's tokens while the context lasts; with no seed, change nothing."""
    if seed is None:
        return contextlib.nullcontext()
    draw, longest = random.Random(seed), policy.chunk_tokens

    def chunk_tokens(num_missing: int, budget_tokens: int, max_chunk_tokens: int, contended: bool) -> int:
        return draw.randint(1, longest(num_missing, budget_tokens, max_chunk_tokens, contended))

    return patch.object(policy, "chunk_tokens", chunk_tokens)
