"""A script: load an HTTP door and the RPC of one server in turns, and print the ratios of what they carry.

    python tests/support/http_load.py [--pairs 3] [--requests 4000]

The server runs with the fake runner. The client of HTTP is a socket and a scan for the end of an answer: what is
measured is the server. Closed loops of 64: answers of 16 tokens at once, and of 256 tokens in a stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import msgspec
import uvloop

from cierzo.bench.load import LoadSettings, run_load
from cierzo.bench.peers.engine import find_checkpoint
from cierzo.bench.peers.ours import CierzoServer
from cierzo.bench.peers.process import HOST, free_port
from cierzo.engine.frontend.client import Client

CLIENTS, SHORT_TOKENS, LONG_TOKENS = 64, 16, 256
LIMITS = {
    "ratio of requests": (0.2, math.inf),
    "ratio of tokens": (0.3, math.inf),
    "added ms to a token": (-math.inf, 2.0),
}
ALONE = 200  # requests one after the other, for the time to a first token
LONG_SHARE = 10  # as many times fewer long answers


async def http_loop(port: int, body: bytes, ends: bytes, count: int) -> tuple[float, list[float]]:
    """Seconds that `count` requests took, and seconds from each to the first byte of its body."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    left, firsts = count, []

    async def loop() -> None:
        nonlocal left
        reader, writer = await asyncio.open_connection(HOST, port)
        while left > 0:
            left -= 1
            began = time.perf_counter()
            writer.write(request)
            heard = await reader.read(1 << 16)
            firsts.append(time.perf_counter() - began)
            assert heard.startswith(b"HTTP/1.1 200"), heard
            tail = heard
            while not tail.endswith(ends):
                more = await reader.read(1 << 16)
                assert more
                tail = tail[-16:] + more
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(loop() for _ in range(CLIENTS)))
    return time.perf_counter() - began, firsts


async def first_tokens(rpc: str, port: int, body: bytes, prompt: list[int]) -> tuple[float, float]:
    """Seconds to a first token on an idle server, over the RPC and over HTTP: medians, in turns."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
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


async def one_turn(rpc: str, port: int, requests: int) -> dict[str, float]:
    """Figures of one turn of each."""
    prompt = {"prompt": [1, 2, 3, 4, 5, 6, 7, 8], "ignore_eos": True, "temperature": 0}
    few = max(CLIENTS, requests // LONG_SHARE)
    short = json.dumps(prompt | {"max_tokens": SHORT_TOKENS}).encode()
    long = json.dumps(prompt | {"max_tokens": LONG_TOKENS, "stream": True}).encode()
    settings = LoadSettings(rpc=rpc, requests=requests, concurrency=CLIENTS, output_tokens=SHORT_TOKENS)
    by_rpc = await run_load(settings)
    short_s, _ = await http_loop(port, short, b"}}", requests)
    long_by_rpc = await run_load(msgspec.structs.replace(settings, requests=few, output_tokens=LONG_TOKENS))
    long_s, _ = await http_loop(port, long, b"0\r\n\r\n", few)
    alone = json.dumps(prompt | {"max_tokens": 2, "stream": True}).encode()
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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cierzo-http-") as folder:
        checkpoint = find_checkpoint("small4", Path(folder), "tiny")
        port = free_port()
        options = {"runner": "fake", "http": f"{HOST}:{port}"}
        with CierzoServer(checkpoint, options, Path(folder) / "log") as server:
            asked = (server._address, port, arguments.requests)
            turns = [uvloop.run(one_turn(*asked)) for _ in range(arguments.pairs)]
    is_good = True
    for name in turns[0]:
        seen = [turn[name] for turn in turns]
        least, most = LIMITS.get(name, (0.0, math.inf))
        holds = least <= statistics.median(seen) <= most
        told = f"{'holds' if holds else 'MISSED'}: {least:g} to {most:g}" if name in LIMITS else ""
        print(f"{name:20} {statistics.median(seen):12,.2f}   {' '.join(f'{one:,.2f}' for one in seen)}   {told}")
        is_good = is_good and holds
    return 0 if is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
