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


def bound_of(tokens: int) -> int:
    """The least of 8192, 32768, 131072 .. that is not below `tokens`."""
    bound = LEAST_BOUND
    while bound < tokens:
        bound *= BOUND_FACTOR
    return bound


def pairs(most: int, max_model_len: int, cached_tokens: int) -> list[tuple[int, int]]:
    """(number of sequences, bound) of all graphs, the largest first: for each number the bounds from what so many
    sequences have usually, to what they can have at most, or the cache holds.

    More than the cache holds they have where prefixes are shared: beyond the last bound such steps are launched.
    """
    found = []
    for size in buckets(most):
        bound, last = bound_of(size * BOUND_PER_SEQUENCE), bound_of(min(size * max_model_len, cached_tokens))
        found.append((size, bound))
        while bound < last:
            bound *= BOUND_FACTOR
            found.append((size, bound))
    return found[::-1]
