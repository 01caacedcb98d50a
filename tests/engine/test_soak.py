"""The first worlds of `make soak`, so that it still runs when somebody wants it."""

from __future__ import annotations

from collections import Counter

from soak import World

WORLDS = 24
HAPPENS = {"abort", "breaks", "bad_row", "death", "preemptions", "of tenants", "overloaded", "stop", "length"}


def test_first_worlds() -> None:
    counts: Counter[str] = Counter()
    for seed in range(WORLDS):
        world = World(seed)
        world.run()
        counts += world.counts
    assert not (missing := HAPPENS - set(counts)), f"the worlds do not try {missing}"
