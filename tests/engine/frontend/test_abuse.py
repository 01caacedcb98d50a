"""The abuse suite in reduced form: nothing that clients send holds the loop, or fills the memory."""

from __future__ import annotations

import asyncio

import abuse

# Of processor time, so what runs beside it does not count but for cold caches. The long form demands 20 ms.
MOST_TURN_MS = 40.0
MOST_PEAK_MB = 400.0


def test_no_attack_holds_the_loop_or_fills_the_memory():
    found = asyncio.run(abuse.run(scale=0.02))
    assert len(found) == len(abuse.ATTACKS)
    for name, figures in found.items():
        assert figures["turn_ms"] < MOST_TURN_MS, name
        assert figures["peak_mb"] < MOST_PEAK_MB, name
        assert figures["open"] == figures["unencoded"] == 0, name
