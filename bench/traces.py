"""Prompts of a load, as pure functions of a seed."""

from __future__ import annotations

import random


def random_prompt(index: int, num_tokens: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids of request `index`, uniform over the vocabulary: no two prompts share a beginning worth caching."""
    return random.Random(f"prompt {seed} {index}").choices(range(vocab_size), k=num_tokens)
