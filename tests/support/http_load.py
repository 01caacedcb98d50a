"""A script: load an HTTP door and the RPC of one server in turns, and print the ratios of what they carry.

    python tests/support/http_load.py [--pairs 3] [--requests 4000] [--model CHECKPOINT]

The server runs with the fake runner. The client of HTTP is a socket and a look at the ends of answers: what is
measured is the server. Closed loops of 64: answers of 16 tokens at once, and of 256 tokens in a stream. With a
model, which the CPU computes ("demo" is one): closed loops of 8, of 64 tokens in a stream, behind prompts of 64.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import uvloop

from cierzo.bench.load import LoadSettings, run_load
from cierzo.bench.peers.engine import find_checkpoint
from cierzo.bench.peers.ours import CierzoServer
from cierzo.bench.peers.process import HOST, free_port
from cierzo.bench.workload import random_prompt
from cierzo.engine.frontend.client import Client

CLIENTS, SHORT_TOKENS, LONG_TOKENS = 64, 16, 256
LIMITS = {
    "ratio of requests": (0.2, math.inf),
    "ratio of tokens": (0.3, math.inf),
    "added ms to a token": (-math.inf, 2.0),
}
MODEL_LIMITS = {"ratio of tokens": (0.98, math.inf)}
MODEL_CLIENTS, MODEL_REQUESTS, MODEL_TOKENS = 8, 32, 64
ALONE = 200  # requests one after the other, for the time to a first token
LONG_SHARE = 10  # as many times fewer long answers


def request_of(body: dict[str, Any]) -> bytes:
    """The bytes of a request for a completion."""
    data = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(data) + data


class Asking(asyncio.Protocol):
    """A connection that asks one request after the other, and looks for the ends of the answers alone."""

    def __init__(self, requests: Iterator[bytes], ends: bytes) -> None:
        self._requests = requests
        self._ends = ends
        self._tail = b""
        self._transport: asyncio.Transport | None = None
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        """Take a part of an answer."""
        if not self._tail and not data.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(AssertionError(data))
        self._tail = data[-16:] if len(data) >= 16 else (self._tail + data)[-16:]
        if self._tail.endswith(self._ends):
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail, if it was not closed here."""
        if not self.done.done():
            self.done.set_exception(exc or AssertionError("the server has closed the connection"))

    def _ask(self) -> None:
        assert self._transport is not None
        self._tail = b""
        if (request := next(self._requests, None)) is not None:
            self._transport.write(request)
        elif not self.done.done():
            self.done.set_result(None)
            self._transport.close()


async def http_loop(port: int, requests: Sequence[bytes], ends: bytes, clients: int = CLIENTS) -> float:
    """Seconds that the requests took."""
    left, loop, began = iter(requests), asyncio.get_running_loop(), time.perf_counter()
    made = [await loop.create_connection(lambda: Asking(left, ends), HOST, port) for _ in range(clients)]
    await asyncio.gather(*(asking.done for _, asking in made))
    return time.perf_counter() - began


async def first_tokens(rpc: str, port: int, request: bytes, prompt: list[int]) -> tuple[float, float]:
    """Seconds to a first token on an idle server, over the RPC and over HTTP: medians, in turns."""
    seen: tuple[list[float], list[float]] = ([], [])
    reader, writer = await asyncio.open_connection(HOST, port)
    async with await Client.connect(rpc) as client:
        for _ in range(ALONE):
            began = time.perf_counter()
            async for _ in client.generate(token_ids=prompt, max_tokens=2, ignore_eos=True):
                seen[0].append(time.perf_counter() - began)
                break
            began = time.perf_counter()
            writer.write(request)
            heard = b""
            while b'"text"' not in heard:
                heard += await reader.read(1 << 16)
            seen[1].append(time.perf_counter() - began)
            while not heard.endswith(b"0\r\n\r\n"):
                heard += await reader.read(1 << 16)
    writer.close()
    return statistics.median(seen[0]), statistics.median(seen[1])


async def model_turn(rpc: str, port: int, number: int) -> dict[str, float]:
    """Figures of one turn of each with a model. No prompt comes twice: the cache would know it."""
    settings = LoadSettings(
        rpc=rpc,
        requests=MODEL_REQUESTS,
        concurrency=MODEL_CLIENTS,
        input_tokens=MODEL_TOKENS,
        output_tokens=MODEL_TOKENS,
        seed=2 * number,
    )
    async with await Client.connect(rpc) as client:
        await client.wait_ready()
        vocab_size = (await client.model_info()).vocab_size
    asked = {"ignore_eos": True, "temperature": 0, "max_tokens": MODEL_TOKENS, "stream": True}
    requests = [
        request_of(asked | {"prompt": random_prompt(index, MODEL_TOKENS, vocab_size, 2 * number + 1)})
        for index in range(MODEL_REQUESTS)
    ]

    async def by_rpc() -> float:
        return (await run_load(settings)).output_tokens_per_s

    async def by_http() -> float:
        return MODEL_REQUESTS * MODEL_TOKENS / await http_loop(port, requests, b"0\r\n\r\n", MODEL_CLIENTS)

    found = {}
    for name, load in (("RPC", by_rpc), ("HTTP", by_http))[
        :: -1 if number % 2 else 1
    ]:  # each is the first at times
        found[name] = await load()
    return {
        "RPC tokens/s": found["RPC"],
        "HTTP tokens/s": found["HTTP"],
        "ratio of tokens": found["HTTP"] / found["RPC"],
    }


async def one_turn(rpc: str, port: int, requests: int) -> dict[str, float]:
    """Figures of one turn of each."""
    prompt = {"prompt": [1, 2, 3, 4, 5, 6, 7, 8], "ignore_eos": True, "temperature": 0}
    few = max(CLIENTS, requests // LONG_SHARE)
    short = request_of(prompt | {"max_tokens": SHORT_TOKENS})
    long = request_of(prompt | {"max_tokens": LONG_TOKENS, "stream": True})
    settings = LoadSettings(rpc=rpc, requests=requests, concurrency=CLIENTS, output_tokens=SHORT_TOKENS)
    by_rpc = await run_load(settings)
    short_s = await http_loop(port, [short] * requests, b"}}")
    long_by_rpc = await run_load(msgspec.structs.replace(settings, requests=few, output_tokens=LONG_TOKENS))
    long_s = await http_loop(port, [long] * few, b"0\r\n\r\n")
    alone = request_of(prompt | {"max_tokens": 2, "stream": True})
    rpc_s, http_s = await first_tokens(rpc, port, alone, prompt["prompt"])
    return {
        "ms to a token, RPC": 1000 * rpc_s,
        "ms to a token, HTTP": 1000 * http_s,
        "added ms to a token": 1000 * (http_s - rpc_s),
        "RPC requests/s": by_rpc.requests_per_s,
        "HTTP requests/s": requests / short_s,
        "ratio of requests": requests / short_s / by_rpc.requests_per_s,
        "RPC tokens/s": long_by_rpc.output_tokens_per_s,
        "HTTP tokens/s": few * LONG_TOKENS / long_s,
        "ratio of tokens": few * LONG_TOKENS / long_s / long_by_rpc.output_tokens_per_s,
    }


def main() -> int:
    """Serve, load, print; 1 if a figure is beyond its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--model", metavar="CHECKPOINT", help="a folder, or demo")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cierzo-http-") as folder:
        port = free_port()
        options = {"http": f"{HOST}:{port}"} | ({} if arguments.model else {"runner": "fake"})
        checkpoint = Path(arguments.model) if arguments.model else find_checkpoint("small4", Path(folder), "tiny")
        limits = MODEL_LIMITS if arguments.model else LIMITS
        with CierzoServer(checkpoint, options, Path(folder) / "log") as server:
            turns = [
                uvloop.run(
                    model_turn(server._address, port, number)
                    if arguments.model
                    else one_turn(server._address, port, arguments.requests)
                )
                for number in range(arguments.pairs)
            ]
    is_good = True
    for name in turns[0]:
        seen = [turn[name] for turn in turns]
        least, most = limits.get(name, (0.0, math.inf))
        holds = least <= statistics.median(seen) <= most
        told = f"{'holds' if holds else 'MISSED'}: {least:g} to {most:g}" if name in limits else ""
        print(f"{name:20} {statistics.median(seen):12,.2f}   {' '.join(f'{one:,.2f}' for one in seen)}   {told}")
        is_good = is_good and holds
    return 0 if is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
