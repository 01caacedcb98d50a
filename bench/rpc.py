"""`make bench-rpc`: what the RPC carries on this machine, client and server sharing its cores.

The server runs with the fake runner, which computes next tokens without a model: what is measured is sockets,
frames, scheduling and streams. Two closed loops: short answers (requests per second) and long ones (streamed
tokens per second). Exit status 1 if a figure is below its limit.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import uvloop

from cierzo.bench.latency import LoadResult, result_table
from cierzo.bench.load import LoadSettings, run_load
from cierzo.bench.report import make_report, write_report
from cierzo.engine.errors import ConnectionLost
from cierzo.engine.frontend.client import Client

MIN_REQUESTS_PER_S = 1500.0
MIN_STREAMED_TOKENS_PER_S = 30_000.0
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
CIERZO = (sys.executable, "-m", "cierzo")


class RpcResults(msgspec.Struct, frozen=True):
    """The two loads."""

    short: LoadResult
    long: LoadResult


def main() -> int:
    """Serve a tiny checkpoint, load it twice, print the verdicts."""
    parser = argparse.ArgumentParser(description="RPC throughput with a fake model.", allow_abbrev=False)
    parser.add_argument("--rpc", choices=("tcp", "unix"), default="tcp", help="kind of socket")
    parser.add_argument("--port", type=int, default=7079, metavar="N", help="loopback port for tcp")
    parser.add_argument("--concurrency", type=int, default=64, metavar="C", help="requests open at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and raw samples here")
    arguments = parser.parse_args()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix="cierzo-bench-") as folder:
        checkpoint = str(Path(folder) / "tiny")
        make = [*CIERZO, "make-checkpoint", checkpoint, "--like", "small4", "--scale", "tiny"]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        rpc = f"unix:{folder}/rpc.sock" if arguments.rpc == "unix" else f"127.0.0.1:{arguments.port}"
        short = LoadSettings(rpc=rpc, requests=20_000, concurrency=arguments.concurrency, output_tokens=16)
        long = LoadSettings(rpc=rpc, requests=2_000, concurrency=arguments.concurrency, output_tokens=256)
        with _server(checkpoint, rpc, Path(folder) / "server.log"):
            results = RpcResults(_load("short answers", short), _load("long answers", long))
    if arguments.json is not None:
        command = " ".join(["python -m cierzo.bench.rpc", *sys.argv[1:]])
        report = make_report("rpc", command=command, started=started, settings=(short, long), results=results)
        write_report(report, arguments.json)
    verdicts = [
        _verdict("requests/s of 16 tokens", results.short.requests_per_s, MIN_REQUESTS_PER_S),
        _verdict("streamed tokens/s", results.long.output_tokens_per_s, MIN_STREAMED_TOKENS_PER_S),
    ]
    return 0 if all(verdicts) and not results.short.errors and not results.long.errors else 1


def _load(name: str, settings: LoadSettings) -> LoadResult:
    print(f"\n{name}: {settings.requests} requests of {settings.output_tokens} tokens, {settings.concurrency} open")
    result = uvloop.run(run_load(settings))
    print(result_table(result))
    return result


def _verdict(what: str, figure: float, limit: float) -> bool:
    holds = figure >= limit
    print(f"{'holds' if holds else 'BELOW THE LIMIT'}: {figure:,.0f} {what} (limit {limit:,.0f})")
    return holds


@contextmanager
def _server(checkpoint: str, rpc: str, log: Path) -> Iterator[None]:
    """A server with the fake runner, ready; its log is printed if it does not get so far."""
    command = [*CIERZO, "serve", checkpoint, "--runner", "fake", "--rpc", rpc]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        if not uvloop.run(_ready(process, rpc)):
            raise SystemExit(f"the server did not start:\n{log.read_text(encoding='utf-8')}")
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _ready(process: subprocess.Popen[bytes], rpc: str) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            client = await Client.connect(rpc)
        except ConnectionLost:
            await asyncio.sleep(0.05)
            continue
        try:
            if (await client.health()).state == "ready":
                return True
        finally:
            await client.close()
        await asyncio.sleep(0.05)
    return False


if __name__ == "__main__":
    raise SystemExit(main())
