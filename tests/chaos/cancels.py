"""Random cancels, at any moment of a request: nothing is left in tables, cache, processes."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

from tqdm import tqdm

from .report import Report
from .server import Server, idle_descriptors, more_descriptors, resident_kb, serving
from .talk import Body, Talk

CONNECTIONS, STREAMS = 4, 16  # streams of a connection
IDLE_S = 10.0
KEPT_S = 1.0  # for which an answer that has ended is kept: of a minute, tens of thousands would count as a leak
MORE_KB = 32 * 1024  # that memory may have grown by, whatever the number


async def _cancel_many(address: str, count: int, rng: random.Random, reasons: Counter[str]) -> float:
    """Ask and cancel; the longest wait for the end after a cancel, in seconds."""
    left, longest_s = count, 0.0
    bar = tqdm(total=count, desc="cancels", disable=None, delay=2.0)

    async def worker(talk: Talk) -> None:
        nonlocal left, longest_s
        while left > 0:
            left -= 1
            stream = talk.start(_body(rng))
            if (deltas := rng.choice((0, 0, 1, 4))) or rng.random() < 0.3:
                await talk.deltas(stream, deltas)
                await asyncio.sleep(rng.random() * 0.002)
            began_s = time.monotonic()
            if rng.random() < 0.02:
                talk.say({"type": "cancel", "stream": stream + 1_000_000})  # nobody's
            talk.cancel(stream)
            answer = await talk.finished(stream)
            reasons[answer.reason] += 1
            longest_s = max(longest_s, time.monotonic() - began_s)
            bar.update()

    talks = [await Talk.connect(address) for _ in range(CONNECTIONS)]
    await asyncio.gather(*(worker(talk) for talk in talks for _ in range(STREAMS)))
    for talk in talks:
        talk.close()
    return longest_s


def _body(rng: random.Random) -> Body:
    prompt = [rng.randrange(3, 300) for _ in range(rng.choice((1, 30, 200)))]
    sampling = {"max_tokens": rng.choice((1, 30, 1000)), "n": rng.choice((1, 1, 3)), "ignore_eos": True}
    return {"token_ids": prompt, "sampling": sampling, "deltas": rng.random() < 0.9}


async def _idle(server: Server) -> dict[str, int]:
    """The server's gauges, once nothing runs and the last connection is gone."""
    until_s = time.monotonic() + IDLE_S
    while True:
        stats = server.stats()
        gauges = {
            "streams": stats.streams,
            "running": stats.core.running,
            "waiting": stats.core.waiting,
            "blocks in use": stats.core.total_blocks - stats.core.free_blocks,
        }
        if not any(gauges.values()) or time.monotonic() > until_s:
            return gauges
        await asyncio.sleep(0.1)


def run(count: int = 100_000, seed: int = 0) -> bool:
    """The whole of it; whether all was well."""
    reasons: Counter[str] = Counter()
    rng, report = random.Random(seed), Report("cancels")
    with serving(runner="fake", max_cancels_per_s=1_000_000, orphan_s=KEPT_S) as server:
        core = server.core
        assert core is not None
        asyncio.run(_cancel_many(server.address, min(2000, count), rng, Counter()))  # what is made once is made
        asyncio.run(_idle(server))
        pids = [server.front_end, core]
        before = idle_descriptors(pids)
        memory_kb = [resident_kb(server.front_end), resident_kb(core)]
        longest_s = asyncio.run(_cancel_many(server.address, count, rng, reasons))
        left = asyncio.run(_idle(server))
        more = more_descriptors(pids, before)
        grown_kb = [
            now - then
            for now, then in zip([resident_kb(server.front_end), resident_kb(core)], memory_kb, strict=True)
        ]
        report.need("core process", server.core, core)
    report.say(", ".join(f"{number:,} {reason}" for reason, number in sorted(reasons.items())))
    report.say(f"the slowest cancel took {longest_s * 1e3:.0f} ms")
    report.need("ended", sum(reasons.values()), count)
    report.need("ways to end", sorted(set(reasons) - {"cancelled", "length"}), [])
    report.need("left", {name: value for name, value in left.items() if value}, {})
    report.need("more descriptors of front end and core", more, [0, 0])
    report.at_most("memory of the front end grew by", grown_kb[0], MORE_KB, "KiB")
    report.at_most("memory of the core grew by", grown_kb[1], MORE_KB, "KiB")
    return report.verdict()
