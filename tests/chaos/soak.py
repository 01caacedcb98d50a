"""A real server for minutes at 80 % of its sustainable load: memory and descriptors flat, blocks exact at idle."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

from tqdm import tqdm

from .cancels import _idle
from .report import Report
from .server import Server, idle_descriptors, more_descriptors, resident_kb, serving
from .talk import Body, Talk

LOAD = 0.8  # of what a closed loop gets
CONNECTIONS = 4
CAPACITY_S, CLIENTS = 5.0, 32
SAMPLE_S = 2.0
WARM_UP = 0.25  # of the time: pools fill, tables reach their size
MOST_WARM_UP_S = 300.0
SLOPE_KB_PER_MINUTE = 256.0
NOISE_KB = 16 * 1024  # of a short run, over all of it
CANCELLED = 0.1
HELD = 0.1  # of the answers, to a grammar


def _body(rng: random.Random) -> Body:
    body: Body = {
        "token_ids": [rng.randrange(64, 300) for _ in range(rng.choice((5, 50, 400)))],
        "sampling": {"max_tokens": rng.choice((1, 16, 64, 200)), "n": rng.choice((1, 1, 1, 2)), "ignore_eos": True},
    }
    if rng.random() < 0.3:
        body["sampling"]["logprobs"] = 3
    if rng.random() < 0.2:
        body["deltas"] = False
    if rng.random() < HELD:  # a new grammar nearly each time: what is known of them has a bound
        body["grammar"] = {"kind": "regex", "value": f"[a-z]{{1,{rng.randrange(1, 100_000)}}}"}
    return body


async def _capacity(address: str, rng: random.Random) -> float:
    """Answers a second of a closed loop."""
    talk, count = await Talk.connect(address), 0
    until_s = time.monotonic() + CAPACITY_S

    async def client() -> None:
        nonlocal count
        while time.monotonic() < until_s:
            await talk.finished(talk.start(_body(rng)))
            count += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    talk.close()
    return count / CAPACITY_S


async def _load(address: str, seconds: float, rate: float, rng: random.Random, ends: Counter[str]) -> None:
    """An open loop; a tenth of the requests are cancelled, and connections come and go."""
    tasks: set[asyncio.Task[None]] = set()

    async def one(talk: Talk) -> None:
        stream = talk.start(_body(rng))
        if rng.random() < CANCELLED:
            await talk.deltas(stream, rng.choice((0, 2)))
            talk.cancel(stream)
        ends[(await talk.finished(stream)).reason] += 1

    talks = [await Talk.connect(address) for _ in range(CONNECTIONS)]
    due_s = began_s = time.monotonic()
    while due_s < began_s + seconds:
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        if rng.random() < 0.001 and not talks[0].answers:
            talks.pop(0).close()
            talks.append(await Talk.connect(address))
        task = asyncio.create_task(one(rng.choice(talks)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        due_s += rng.expovariate(rate)
    await asyncio.gather(*tasks)
    for talk in talks:
        talk.close()


async def _sampled(pids: list[int], seconds: float, samples: list[tuple[float, list[int]]]) -> None:
    began_s = time.monotonic()
    with tqdm(total=round(seconds), unit="s", disable=None, delay=2.0) as bar:
        while (now_s := time.monotonic() - began_s) < seconds:
            samples.append((now_s, [resident_kb(pid) for pid in pids]))
            bar.update(int(now_s) - bar.n)
            await asyncio.sleep(SAMPLE_S)


def slope_per_minute(points: list[tuple[float, float]]) -> float:
    """Least squares over (seconds, value)."""
    count = len(points)
    mean_x, mean_y = (sum(values) / count for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return 60.0 * sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def run(minutes: float = 30.0, seed: int = 0) -> bool:
    """The whole of it; whether all was well."""
    rng, report, ends = random.Random(seed), Report("soak"), Counter[str]()
    samples: list[tuple[float, list[int]]] = []
    seconds = 60.0 * minutes

    async def all_of_it(server: Server, pids: list[int]) -> dict[str, int]:
        rate = LOAD * await _capacity(server.address, rng)
        report.say(f"{rate:.0f} requests a second for {minutes:g} minutes")
        await asyncio.gather(_load(server.address, seconds, rate, rng, ends), _sampled(pids, seconds, samples))
        return await _idle(server)

    with serving(words=True, runner="fake", max_cancels_per_s=100_000, kv_cache_gib=0.02) as server:
        core = server.core
        assert core is not None
        pids = [server.front_end, core]
        before = idle_descriptors(pids)
        left = asyncio.run(all_of_it(server, pids))
        more = more_descriptors(pids, before)
    report.say(", ".join(f"{number:,} {reason}" for reason, number in sorted(ends.items())))
    report.need("ways to end", sorted(set(ends) - {"cancelled", "length", "stop"}), [])
    report.need("left", {name: value for name, value in left.items() if value}, {})
    report.need("more descriptors of front end and core", more, [0, 0])
    from_s = min(WARM_UP * seconds, MOST_WARM_UP_S)
    limit = max(SLOPE_KB_PER_MINUTE, NOISE_KB / minutes)
    for index, name in enumerate(("front end", "core")):
        points = [(at, float(values[index])) for at, values in samples if at >= from_s]
        report.say(
            f"{name}: {points[0][1] / 1024:.0f} MiB after the warm-up, {points[-1][1] / 1024:.0f} at the end"
        )
        report.at_most(f"memory of the {name} grows by", slope_per_minute(points), limit, "KiB a minute")
    return report.verdict()
