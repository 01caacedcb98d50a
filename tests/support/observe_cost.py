"""What telling costs, in this process: `python tests/support/observe_cost.py`.

Prints the time that a page of metrics takes with 1,024 open streams and with 64 tenants; and, paired, what counting
costs for a token and what the record of a request costs, written to a file.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.observe.tallies import Pace
from cierzo.engine.frontend.observe.web import MetricsServer
from cierzo.engine.frontend.stream import Stream
from cierzo.engine.frontend.tenants import EVERYBODY, Access, Tenant
from cierzo.engine.messages import CoreStats, Finish, Generate, SamplingParams, StepOutput, TokenDelta
from cierzo.engine.testing.local_encoders import local_encoders
from cierzo.engine.testing.words import fake_model
from cierzo.engine.text.prompt import PromptEncoder

STREAMS, TENANTS = 1024, 64
BATCH = 64  # requests that end in a step
TOKENS = 2000
FINISH = Finish("length", "", None, 3, 16, 0, 0, 0.1, 0.2, 0.3, 19, 0, 16, 1.5)
CORE_STATS = CoreStats(
    running=3,
    waiting=2,
    free_blocks=6,
    cached_blocks=4,
    total_blocks=10,
    prompt_tokens=100,
    cached_tokens=40,
    output_tokens=30,
    preemptions=5,
)


class NoCore:
    """Takes commands, and answers none."""

    def send(self, command: object) -> None:
        """Forget it."""


class Sink:
    """A connection whose reader takes all."""

    features: frozenset[str] = frozenset()
    is_paused = False
    num_taken = 0

    def __init__(self, access: Access = EVERYBODY) -> None:
        self.access, self.peer = access, "127.0.0.1:5"

    def put(self, message: object) -> None:
        """Forget it."""


def front_end(clock: Callable[[], float] = time.monotonic, **given: Any) -> Frontend:
    """A front end that is ready."""
    config, model, prompts = FrontendConfig(**given), fake_model(), PromptEncoder()
    frontend = Frontend(config, model, prompts, NoCore(), local_encoders(prompts, config, model), clock)
    frontend.core.ready()
    return frontend


def opened(frontend: Frontend, count: int, tenants: int = 1) -> list[Stream]:
    """Open so many streams, of so many tenants."""
    frontend.tenancy.arrange(Tenant(name=f"tenant-{number}") for number in range(tenants))
    for number in range(count):
        sink = Sink(Access(tenant=Tenant(name=f"tenant-{number % tenants}")))
        frontend.connect(sink)
        sampling = SamplingParams(seed=1, max_tokens=4000)
        frontend.generate(sink, Generate(stream=number, token_ids=[1, 2, 3], sampling=sampling))
    return [*frontend.streams]


def step(frontend: Frontend, streams: list[Stream], finish: Finish | None = None) -> None:
    """A token for each."""
    frontend.core.step(StepOutput(deltas=[TokenDelta(stream.run_id, 0, [7], None, finish) for stream in streams]))


def page_s(streams: int, tenants: int) -> float:
    """Seconds that a page takes, the median of some."""
    frontend = front_end()
    opened_streams = opened(frontend, streams, tenants)
    for _ in range(3):
        step(frontend, opened_streams)
    server = MetricsServer(FrontendConfig(), frontend, lambda: 0.0)
    taken = []
    for _ in range(9):
        server._page_until = float("-inf")
        began = time.perf_counter()
        server.metrics()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def token_s() -> float:
    """Seconds that counting costs for a token, by loops with and without it."""

    class Thing:
        last_s = -1.0

    def counted(pace: Pace, things: list[Thing]) -> float:
        began = time.perf_counter()
        for number in range(TOKENS):
            pace.step(float(number))
            for sample in things:
                if sample.last_s == pace.before_s:
                    pace.num_shared += 1
                else:
                    pace.apart(sample)  # type: ignore[arg-type]
                sample.last_s = pace.now_s
        return time.perf_counter() - began

    def bare(things: list[Thing]) -> float:
        began = time.perf_counter()
        for _ in range(TOKENS):
            for _sample in things:
                pass
        return time.perf_counter() - began

    things = [Thing() for _ in range(64)]
    return statistics.median(counted(Pace(), things) - bare(things) for _ in range(7)) / TOKENS / len(things)


async def request_s(**given: Any) -> float:
    """Seconds that a request costs more than where nobody is told of it, its line in the file included."""
    taken: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(7):
        for tells in (True, False):
            frontend = front_end(**(given if tells else {}))
            if not tells:
                frontend.observer.ended = lambda stream: None  # type: ignore[method-assign]
                frontend.observer.first_token = lambda stream, seconds: None  # type: ignore[method-assign]
            streams = opened(frontend, STREAMS)
            began = time.perf_counter()
            step(frontend, streams)
            for some in (streams[index : index + BATCH] for index in range(0, STREAMS, BATCH)):
                step(frontend, some, FINISH)
                await asyncio.sleep(0)  # the turn in which the file is written
            taken[tells].append(time.perf_counter() - began)
            await frontend.close()
    return (statistics.median(taken[True]) - statistics.median(taken[False])) / STREAMS


async def main() -> None:
    """Measure and print."""
    print(f"/metrics, {STREAMS} streams, 1 tenant: {1e3 * page_s(STREAMS, 1):.2f} ms")
    print(f"/metrics, {STREAMS} streams, {TENANTS} tenants: {1e3 * page_s(STREAMS, TENANTS):.2f} ms")
    print(f"a token: {1e9 * token_s():.0f} ns")
    print(f"a request, metrics alone: {1e6 * await request_s():.2f} us")
    with tempfile.TemporaryDirectory() as folder:
        each_s = await request_s(usage_file=str(Path(folder) / "usage.jsonl"))
    print(f"a request, metrics and its cost record: {1e6 * each_s:.2f} us")


if __name__ == "__main__":
    asyncio.run(main())
