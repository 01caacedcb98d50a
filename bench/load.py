"""`cierzo bench load`: load a running server over the RPC and report what its clients see.

Closed loop (`--concurrency C`): C clients, each sends its next request when the last one is answered; this
measures capacity. Open loop (`--rate R`): requests arrive as a Poisson process whether or not earlier ones are
answered, as they do from the world; this measures latency under a given load. In the open loop, latencies count
from the moment at which a request was due, so that a client that falls behind hides nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Protocol, Unpack

import uvloop
from msgspec import Meta

from cierzo.bench.latency import LoadResult, RequestSample, result_table, summarise_load
from cierzo.bench.report import Recording, progress
from cierzo.bench.workload import Count, Workload, poisson_arrivals, random_prompt
from cierzo.engine.errors import CierzoError, ConnectionLost, refusal
from cierzo.engine.frontend.client import Client, GenerateArguments
from cierzo.engine.messages import Delta
from cierzo.engine.options import MAX_SEED, Access, access, add_options, add_rpc, chosen, seed

READY_TIMEOUT_S = 600.0  # for weights to load
WHOLE = ("stop", "tool_calls", "length", "")  # reasons of an answer that came to its end; "": its server tells none
FEATURES = ("accounting", "batches", "credit", "keepalive")  # not resumed, and no prompt is longer than a frame
SHARED_INDEX = -1  # no request's: the random prompt that all others may begin with


class LoadClient(Protocol):
    """The part of a connection that a load needs; `Client` has it."""

    def generate(self, **request: Unpack[GenerateArguments]) -> AsyncIterator[Delta]:
        """Stream one answer. If the iterator has a `final` afterwards, that says how the answer ended."""
        ...

    async def model_info(self) -> Any:
        """An object with a `vocab_size`, and perhaps a `device` and a `max_model_len`. Raises ConnectionLost once
        the connection is lost for good."""
        ...

    async def close(self) -> None:
        """Let go of the connection."""
        ...


Connect = Callable[[str], Awaitable[LoadClient]]


class LoadSettings(Workload, frozen=True, kw_only=True):
    """Settings of a load: a closed or an open loop, and the server at `rpc`.

    Prompts are `prompt`, or else `input_tokens` random token ids, of which the first `shared_tokens` are the same
    in all, as a system prompt is. Every answer has exactly `output_tokens`, or what the server's context leaves.
    """

    rpc: str
    requests: Annotated[Count, Meta(description="requests in all")] = 100
    connections: Annotated[Count, Meta(description="connections that share the load")] = 1
    prompt: Annotated[str | None, Meta(description="the prompt of every request; default: random tokens")] = None
    temperature: Annotated[float, Meta(description="0: greedy")] = 0.0
    access: Access = Access()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the address, the number of requests, the loop, the prompts and the answers."""
    add_rpc(parser, "server to load")
    every = set(LoadSettings.__struct_fields__)
    apart = ({"concurrency", "rate"}, {"prompt", "input_tokens"})
    for names in apart:
        add_options(parser.add_mutually_exclusive_group(), LoadSettings, skip=every - names)
    add_options(parser, LoadSettings, skip={"rpc", "trace", "access"}.union(*apart), readers={"seed": seed})
    add_options(parser, Access)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and raw samples here")


def settings_of(arguments: argparse.Namespace) -> LoadSettings:
    """Settings as the options of `add_arguments` give them."""
    given = chosen(arguments, LoadSettings, skip={"trace", "access"})
    given["access"] = Access(**chosen(arguments, Access))
    return LoadSettings(**(given if "rate" in given else {"concurrency": 8} | given))


def run(arguments: argparse.Namespace) -> int:
    """Wait for the server, run the load, print the table; exit status 1 unless every request was answered.

    Raises CierzoError without a server that takes requests.
    """
    settings = settings_of(arguments)
    report = Recording("load", arguments.json)
    result = uvloop.run(_load_when_ready(settings))
    print(result_table(result))
    report.write(settings, result)
    return 0 if result.answered == settings.requests else 1


async def _load_when_ready(settings: LoadSettings) -> LoadResult:
    async with await Client.connect(settings.rpc, **access(settings.access)) as client:
        if (await client.health()).state == "loading":
            print(f"waiting: the server at {settings.rpc} loads its model", file=sys.stderr)
        await client.wait_ready(READY_TIMEOUT_S)
    return await run_load(settings)


async def run_load(
    settings: LoadSettings, connect: Connect | None = None, clock: Callable[[], float] = time.perf_counter
) -> LoadResult:
    """Connect, send every request, and gather what each of them saw.

    A request that was refused, that failed or that the server ended early is a sample with its error. Once a
    connection is lost, no more are sent. `connect` opens a connection to `settings.rpc` for a server that does not
    speak our RPC; `clock` tells seconds. Raises ConfigError for prompts that the server's context cannot hold,
    ConnectionLost where no server answers.
    """

    async def ours(address: str) -> LoadClient:
        options = access(settings.access)
        options["features"], options["reconnect"] = FEATURES, False
        return await Client.connect(address, **options)

    connect = connect or ours
    clients = [await connect(settings.rpc) for _ in range(settings.connections)]
    try:
        info = await clients[0].model_info()
        longest = getattr(info, "max_model_len", None)  # other engines need not say
        if longest is not None and settings.prompt is None and settings.input_tokens >= longest:
            why = f"max_model_len of the server is {longest}"
            raise refusal("input_tokens", f"at most {longest - 1}", settings.input_tokens, why)
        if info.vocab_size < 1:
            raise refusal("vocab_size", "at least 1", info.vocab_size, f"which {settings.rpc} tells")
        load = _Load(settings, clients, info.vocab_size, clock)
        await load.run()
        return summarise_load(
            load.samples,
            load.now_s,
            getattr(info, "device", ""),
            asked_tokens=settings.output_tokens,
            max_model_len=longest,
            unsent=settings.requests - len(load.samples),
        )
    finally:
        for client in clients:
            await client.close()


class _Load:
    """The state of a run: the clients, the clock's zero, the samples so far, and whether a connection was lost."""

    def __init__(
        self, settings: LoadSettings, clients: list[LoadClient], vocab_size: int, clock: Callable[[], float]
    ) -> None:
        self.settings, self.clients, self.vocab_size = settings, clients, vocab_size
        self.shared_ids = random_prompt(SHARED_INDEX, settings.shared_tokens, vocab_size, settings.seed)
        self.clock, self.zero = clock, clock()
        self.lost = False
        self.samples: list[RequestSample] = []
        self.progress = progress(total=settings.requests, unit="req")

    @property
    def now_s(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.zero

    async def run(self) -> None:
        """Send every request, and wait for the answers."""
        with self.progress:
            await (self._closed_loop() if self.settings.concurrency else self._open_loop())

    async def _closed_loop(self) -> None:
        indices = iter(range(self.settings.requests))  # shared: each client takes the next one

        async def client_loop() -> None:
            while not self.lost and (index := next(indices, None)) is not None:
                await self._request(index, self.now_s)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self.settings.concurrency or 1, self.settings.requests)):
                group.create_task(client_loop())

    async def _open_loop(self) -> None:
        assert self.settings.rate is not None
        arrivals = poisson_arrivals(self.settings.requests, self.settings.rate, self.settings.seed)
        async with asyncio.TaskGroup() as group:
            for index, due_s in enumerate(arrivals):
                await asyncio.sleep(max(0.0, due_s - self.now_s))
                if self.lost:
                    return
                group.create_task(self._request(index, due_s))

    async def _request(self, index: int, due_s: float) -> None:
        delta_s: list[float] = []
        delta_tokens: list[int] = []
        finish = message = ""
        error: str | None = None
        start_s = self.now_s
        client = self.clients[index % len(self.clients)]
        try:
            answer = self._generate(client, index)
            async for delta in answer:
                if delta.token_ids:
                    delta_s.append(self.now_s)
                    delta_tokens.append(len(delta.token_ids))
            final = getattr(answer, "final", None)  # None: the server does not tell how it ended
            if final is not None and final.samples:
                finish, message = final.samples[0].finish_reason, final.samples[0].message
            if finish not in WHOLE:
                error = finish
            elif final is not None and not final.samples:
                error, message = "failed", "the answer holds no sample"
            elif not delta_tokens:
                error, message = "failed", "the answer holds no token"
        except CierzoError as failure:
            error, message = failure.code, failure.message
        self.samples.append(
            RequestSample(due_s, start_s, delta_s, delta_tokens, self.now_s, error, message, finish)
        )
        self.progress.update()
        if error == ConnectionLost.code:
            try:  # other engines open a connection for each request
                await client.model_info()
            except ConnectionLost:
                self.lost = True

    def _generate(self, client: LoadClient, index: int) -> AsyncIterator[Delta]:
        settings = self.settings
        random_ids = None
        if settings.prompt is None:
            own_tokens = settings.input_tokens - settings.shared_tokens
            random_ids = self.shared_ids + random_prompt(index, own_tokens, self.vocab_size, settings.seed)
        return client.generate(
            text=settings.prompt,
            token_ids=random_ids,
            max_tokens=settings.output_tokens,
            ignore_eos=True,
            temperature=settings.temperature,
            seed=(settings.seed + index) % (MAX_SEED + 1),
        )
