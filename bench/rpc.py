"""`make bench-rpc`: requests and tokens a second over the RPC, client and server sharing this machine's cores.

The server runs with the fake runner, which computes next tokens without a model: what is measured is sockets,
frames, scheduling and streams. Two closed loops: short answers (requests per second) and long ones (streamed
tokens per second). Exit status 1 if a figure is below its limit.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import msgspec

from cierzo.bench.latency import LoadResult, result_table
from cierzo.bench.load import LoadSettings
from cierzo.bench.peers.engine import find_checkpoint
from cierzo.bench.peers.ours import CierzoServer
from cierzo.bench.report import Recording

MIN_REQUESTS_PER_S = 1500.0
MIN_STREAMED_TOKENS_PER_S = 30_000.0


class RpcResults(msgspec.Struct, frozen=True):
    """Results of the load of short answers and of that of long ones."""

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
    report = Recording("rpc", arguments.json, ("python", "-m", "cierzo.bench.rpc"))
    with tempfile.TemporaryDirectory(prefix="cierzo-bench-") as folder:
        checkpoint = find_checkpoint("small4", Path(folder), "tiny")
        rpc = f"unix:{folder}/rpc.sock" if arguments.rpc == "unix" else f"127.0.0.1:{arguments.port}"
        short = LoadSettings(rpc=rpc, requests=20_000, concurrency=arguments.concurrency, output_tokens=16)
        long = LoadSettings(rpc=rpc, requests=2_000, concurrency=arguments.concurrency, output_tokens=256)
        with CierzoServer(checkpoint, {"runner": "fake"}, Path(folder) / "server.log", rpc) as server:
            results = RpcResults(_load(server, "short answers", short), _load(server, "long answers", long))
    report.write((short, long), results)
    verdicts = [
        _verdict("requests/s of 16 tokens", results.short.requests_per_s, MIN_REQUESTS_PER_S),
        _verdict("streamed tokens/s", results.long.output_tokens_per_s, MIN_STREAMED_TOKENS_PER_S),
    ]
    return 0 if all(verdicts) and not results.short.errors and not results.long.errors else 1


def _load(server: CierzoServer, name: str, settings: LoadSettings) -> LoadResult:
    print(f"\n{name}: {settings.requests} requests of {settings.output_tokens} tokens, {settings.concurrency} open")
    result = server.load(settings)
    print(result_table(result))
    return result


def _verdict(what: str, figure: float, limit: float) -> bool:
    holds = figure >= limit
    print(f"{'holds' if holds else 'BELOW THE LIMIT'}: {figure:,.0f} {what} (limit {limit:,.0f})")
    return holds


if __name__ == "__main__":
    raise SystemExit(main())
