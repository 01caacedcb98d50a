"""Sizes that decode steps are recorded for (engine/worker/graphs.py): numbers of sequences, bounds. No torch."""

from __future__ import annotations

# Between powers of two a step of many sequences would compute up to twice what it must.
MOST_DOUBLED = 16
STEP = 16
LEAST_BOUND = 8192  # tokens
BOUND_FACTOR = 4
# Tokens of a bound for each sequence, at least. They add one program to the 17 that a sequence has anyway
# (triton/split.py): a lower bound would save next to nothing.
BOUND_PER_SEQUENCE = 1024


def buckets(most: int) -> list[int]:
    """Numbers of sequences that graphs are recorded for: 1, 2, 4, 8, 16, 32, 48 .. up to `most`."""
    doubled = [1 << power for power in range(MOST_DOUBLED.bit_length()) if 1 << power < most]
    stepped = range(MOST_DOUBLED + STEP, most, STEP)
    return [*doubled, *stepped, most]


def bounds(size: int, max_model_len: int, cached_tokens: int) -> list[int]:
    """Bounds that graphs of so many sequences are recorded for, the least first: 8192, 32768, 131072 .. from what
    they have usually; the last is what they can have at most, or what the cache holds.

    More than the cache holds they have where prefixes are shared: such steps are launched.
    """
    last = max(LEAST_BOUND, min(size * max_model_len, cached_tokens))
    found, bound = [], LEAST_BOUND
    while bound < last:
        if bound >= size * BOUND_PER_SEQUENCE:
            found.append(bound)
        bound *= BOUND_FACTOR
    return [*found, last]


def pairs(most: int, max_model_len: int, cached_tokens: int) -> list[tuple[int, int]]:
    """(number of sequences, bound) of all graphs, the largest first: the others' memory lies in its own."""
    return [(size, bound) for size in buckets(most) for bound in bounds(size, max_model_len, cached_tokens)][::-1]
