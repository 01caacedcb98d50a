"""More requests than can be served: the answers that come in time do not get fewer, and a refusal comes at once."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from .report import Report, percentile
from .server import serving
from .talk import Body, Talk

FACTORS = (2, 5)
DEADLINE_S = 4.0
GOODPUT = 0.9  # of the peak
REFUSAL_S = 0.01
TOKENS = 64
CLIENTS = 16  # of the closed loop
CLIENTS = 16  # of the closed loop
REFUSALS = ("overloaded", "deadline_unreachable")
# A server that little load fills: what is measured is the server's rule, not how fast this machine's clients are.
OPTIONS = {"max_running": 4, "max_open_samples": 64, "device": "simulated:h200"}


@dataclass
class Seen:
    """What clients saw."""

    seconds: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    refusals_s: list[float] = field(default_factory=list)
    in_time: int = 0

    @property
    def goodput(self) -> float:
        """Whole answers within the deadline, a second."""
        return self.in_time / self.seconds


def _body(rng: random.Random) -> Body:
    prompt = [rng.randrange(3, 300) for _ in range(20)]
    return {
        "token_ids": prompt,
        "sampling": {"max_tokens": TOKENS, "ignore_eos": True},
        "deadline_s": DEADLINE_S,
        "deltas": False,
    }


async def _one(talk: Talk, rng: random.Random, seen: Seen) -> None:
    answer = await talk.finished(talk.start(_body(rng)))
    took_s = answer.end_s - answer.began_s
    seen.ends[answer.reason] += 1
    if answer.reason in REFUSALS:
        seen.refusals_s.append(took_s)
    seen.in_time += answer.reason == "length" and took_s <= DEADLINE_S


async def _peak(address: str, seconds: float, rng: random.Random) -> Seen:
    """A closed loop that keeps the server full, and no more."""
    seen, talk = Seen(), await Talk.connect(address)
    began_s = time.monotonic()

    async def client() -> None:
        while time.monotonic() < began_s + seconds:
            await _one(talk, rng, seen)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    seen.seconds = time.monotonic() - began_s
    talk.close()
    return seen


async def _open(address: str, seconds: float, rate: float, rng: random.Random) -> Seen:
    """Requests at random times, whatever becomes of those before."""
    seen, talk, tasks = Seen(), await Talk.connect(address), set()
    began_s = due_s = time.monotonic()
    while due_s < began_s + seconds:
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        tasks.add(asyncio.create_task(_one(talk, rng, seen)))
        due_s += rng.expovariate(rate)
    await asyncio.sleep(max(0.0, began_s + seconds - time.monotonic()))
    seen.seconds, in_time = time.monotonic() - began_s, seen.in_time
    await asyncio.gather(*tasks)
    seen.in_time = in_time  # those that came while requests came
    talk.close()
    return seen


def run(seconds: float = 30.0, seed: int = 0) -> bool:
    """The whole of it; whether all was well."""
    rng, report = random.Random(seed), Report("overload")

    async def loads() -> None:
        await _peak(server.address, min(2.0, seconds), rng)
        peak = (await _peak(server.address, seconds, rng)).goodput
        report.say(f"peak: {peak:.1f} answers a second")
        for factor in FACTORS:
            seen = await _open(server.address, seconds, factor * peak, rng)
            report.say(f"{factor} x: {', '.join(f'{count:,} {end}' for end, count in sorted(seen.ends.items()))}")
            report.at_least(f"goodput at {factor} x", seen.goodput, GOODPUT * peak, "answers a second")
            report.at_least("refusals", len(seen.refusals_s), 1)
            slowest_s = percentile(seen.refusals_s or [0.0], 99)
            report.at_most("99 of 100 refusals come within", slowest_s, REFUSAL_S, "s")
            await asyncio.sleep(DEADLINE_S)

    with serving(**OPTIONS) as server:
        asyncio.run(loads())
    return report.verdict()
