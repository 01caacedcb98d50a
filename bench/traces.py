"""What a load consists of: when requests arrive, and what their prompts are. Pure functions of a seed."""

from __future__ import annotations

import random


def poisson_arrivals(num_requests: int, rate: float, seed: int) -> list[float]:
    """Arrival times in seconds from the start, ascending: independent arrivals, `rate` per second on average."""
    random_gaps = random.Random(f"arrivals {seed}")
    times, now = [], 0.0
    for _ in range(num_requests):
        now += random_gaps.expovariate(rate)
        times.append(now)
    return times


def random_prompt(index: int, num_tokens: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids of request `index`, uniform over the vocabulary: no two prompts share a beginning worth caching."""
    return random.Random(f"prompt {seed} {index}").choices(range(vocab_size), k=num_tokens)
