"""SIGKILL and SIGSTOP of the core under load: every stream comes to its end, with the tokens of an unbroken run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time

from tqdm import tqdm

from .report import Report
from .server import Server, serving
from .talk import Body, Talk

WORKERS = 8
REQUESTS = 24
READY_S = 60.0
Right = tuple[str, dict[int, list[int]]]  # why an answer ends, and the tokens of its samples
GRAMMARS: tuple[Body, ...] = (
    {"kind": "regex", "value": "([a-f]{2,9} ){3,90}"},
    {"kind": "json_schema", "value": '{"type":"array","items":{"type":"integer"},"minItems":20}'},
    {"kind": "lark", "value": 'start: word ("," word)*\nword: /[a-z]{1,8}/ | "(" start ")"'},
)


def bodies(rng: random.Random) -> list[Body]:
    """Requests that are asked again and again; a third are held to grammars."""
    asked: list[Body] = [
        {
            "token_ids": [rng.randrange(64, 300) for _ in range(rng.choice((3, 40, 150)))],
            "sampling": {"max_tokens": rng.choice((20, 100, 300)), "seed": i, "n": 1 + i % 2, "ignore_eos": True},
        }
        for i in range(REQUESTS)
    ]
    for number, body in enumerate(asked[::3]):
        body["grammar"] = GRAMMARS[number % len(GRAMMARS)]
    return asked


async def _unbroken(address: str, asked: list[Body]) -> list[Right]:
    talk = await Talk.connect(address)
    streams = [talk.start(body) for body in asked]
    answers = [await talk.finished(stream) for stream in streams]
    talk.close()
    assert all(answer.reason in ("length", "stop") for answer in answers), [answer.end for answer in answers]
    return [(answer.reason, answer.tokens) for answer in answers]


class _Load:
    """Workers that ask until told to stop, and compare."""

    def __init__(self, address: str, asked: list[Body], right: list[Right], seed: int) -> None:
        self._address = address
        self._asked = asked
        self._right = right
        self._rng = random.Random(seed)
        self.is_over = False
        self.num_answers = 0
        self.num_refused = 0
        self.wrongs: list[str] = []
        self.longest_s = 0.0

    async def worker(self) -> None:
        """One connection, one request at a time."""
        talk = await Talk.connect(self._address)
        while not self.is_over:
            index = self._rng.randrange(len(self._asked))
            answer = await talk.finished(talk.start(self._asked[index]))
            assert answer.end is not None
            if answer.reason in ("overloaded", "core_stalled") and not answer.tokens:
                self.num_refused += 1  # while there is no core, new requests may be refused
                await asyncio.sleep(0.05)
                continue
            self.num_answers += 1
            self.longest_s = max(self.longest_s, answer.end_s - answer.began_s)
            if (answer.reason, answer.tokens) != self._right[index]:
                self.wrongs.append(f"request {index} ended as {answer.end}, {answer.tokens}")
        talk.close()


async def _harm(server: Server, count: int, seed: int) -> tuple[int, int]:
    """Kill or stop the core, so many times, at random moments of its work."""
    rng, killed, stopped = random.Random(seed), 0, 0
    for _ in tqdm(range(count), desc="kills", disable=None, delay=2.0):
        victim = await _working_core(server)
        await asyncio.sleep(rng.random() ** 2)
        with contextlib.suppress(ProcessLookupError):
            if rng.random() < 0.3:
                os.kill(victim, signal.SIGSTOP)
                stopped += 1
            else:
                os.kill(victim, signal.SIGKILL)
                killed += 1
        while server.core == victim:
            await asyncio.sleep(0.02)
    await _working_core(server)
    return killed, stopped


async def _working_core(server: Server) -> int:
    """The process id of a core that is ready and has begun to step."""
    talk, until_s = await Talk.connect(server.address, ()), time.monotonic() + READY_S
    try:
        while time.monotonic() < until_s:
            if (await talk.ask("health"))["state"] == "ready" and (core := server.core) is not None:
                return core
            await asyncio.sleep(0.02)
        raise TimeoutError(f"no core is ready within {READY_S} s")
    finally:
        talk.close()


def run(count: int = 200, seed: int = 0) -> bool:
    """The whole of it; whether all was well."""
    asked = bodies(random.Random(seed))
    often = {"max_core_restarts": 100_000, "max_core_restarts_per_hour": 100_000}

    async def all_of_it(server: Server) -> tuple[_Load, tuple[int, int]]:
        right = await _unbroken(server.address, asked)
        load = _Load(server.address, asked, right, seed)
        workers = [asyncio.create_task(load.worker()) for _ in range(WORKERS)]
        harmed = await _harm(server, count, seed)
        load.is_over = True
        await asyncio.gather(*workers)
        return load, harmed

    with serving(words=True, **often) as server:
        load, (killed, stopped) = asyncio.run(all_of_it(server))
        stats = server.stats()
    report = Report("kills")
    report.say(f"{killed} SIGKILL, {stopped} SIGSTOP, {stats.core_restarts} restarts")
    report.say(
        f"{load.num_answers:,} answers, the longest took {load.longest_s:.1f} s; {load.num_refused:,} refused"
    )
    report.need("answers that are whole and exact", load.num_answers - len(load.wrongs), load.num_answers)
    report.need("restarts", stats.core_restarts, killed + stopped)
    report.say("\n".join(load.wrongs[:3]))
    return report.verdict()
