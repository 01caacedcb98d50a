"""Clients that do not read: what each costs in memory, and what the others feel of them."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

from .report import Report, percentile
from .server import resident_kb, serving
from .talk import Body, Talk

READERS = 16
EACH_KB = 1024
SLOWER = 1.05
SETTLE_S = 1.0
JUDGED_ROUNDS = 3  # fewer pairs say nothing
STALLED: Body = {
    "token_ids": [5, 6, 7],
    "sampling": {"max_tokens": 4000, "n": 1, "ignore_eos": True, "logprobs": 20, "seed": 1},
}
READ: Body = {"token_ids": [9, 9], "sampling": {"max_tokens": 2000, "ignore_eos": True, "seed": 2}}


async def _gaps_s(address: str, seconds: float) -> list[float]:
    """Times between two deltas of a stream, of clients that read, for a while."""
    talk = await Talk.connect(address)
    gaps: list[float] = []

    async def reader(until_s: float) -> None:
        while time.monotonic() < until_s:
            stream = talk.start(READ)
            while time.monotonic() < until_s and talk.answers[stream].end is None:
                await talk.deltas(stream, len(talk.answers[stream].times) + 50)
            talk.cancel(stream)
            times = (await talk.finished(stream)).times
            gaps.extend(later - earlier for earlier, later in pairwise(times))

    until_s = time.monotonic() + seconds
    await asyncio.gather(*(reader(until_s) for _ in range(READERS)))
    talk.close()
    return gaps


async def _stall(address: str, count: int) -> list[Talk]:
    """Clients that ask for much and read nothing."""
    talks = []
    for _ in range(count):
        talk = await Talk.connect(address, receive_bytes=4096)
        talk.pause()
        talk.start(STALLED)
        talks.append(talk)
    return talks


async def _settled(pid: int) -> int:
    """Resident KiB, once it does not grow any more."""
    last, now = -1, resident_kb(pid)
    while now > last + 64:
        await asyncio.sleep(SETTLE_S)
        last, now = now, resident_kb(pid)
    return now


def run(count: int = 1000, rounds: int = 5, seconds: float = 4.0) -> bool:
    """The whole of it; whether all was well."""
    report, ratios = Report("readers"), []
    options = {"runner": "fake", "slow_reader_s": 3600.0, "max_open_samples": 2 * count + READERS}

    async def paired() -> None:
        """Alternate: without them, with them."""
        await _gaps_s(server.address, 1.0)
        before_kb = resident_kb(server.front_end)
        for number in range(rounds):
            without = await _gaps_s(server.address, seconds)
            talks = await _stall(server.address, count)
            now_kb = await _settled(server.front_end)
            if not number:
                report.at_most(f"each of {count:,} costs", (now_kb - before_kb) / count, EACH_KB, "KiB")
            with_them = await _gaps_s(server.address, seconds)
            ratios.append(percentile(with_them, 99) / percentile(without, 99))
            for talk in talks:
                talk.close()
            await _settled(server.front_end)

    with serving(**options) as server:
        asyncio.run(paired())
    ratios.sort()
    report.say(f"p99 between tokens of others, with / without: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    if rounds >= JUDGED_ROUNDS:
        report.at_most("median ratio", ratios[len(ratios) // 2], SLOWER)
    return report.verdict()
