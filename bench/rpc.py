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

from cierzo.bench.latency import result_table
from cierzo.bench.load import LoadSettings
from cierzo.bench.peers.engine import find_checkpoint
from cierzo.bench.peers.ours import CierzoServer

CLIENTS = 64
SHORT = LoadSettings(rpc="", requests=20_000, concurrency=CLIENTS, output_tokens=16)
LONG = msgspec.structs.replace(SHORT, requests=2_000, output_tokens=256)
# What is loaded, the figure of its result that has a limit, and the limit.
LIMITS = ((SHORT, "requests_per_s", 1500.0), (LONG, "output_tokens_per_s", 30_000.0))


def main() -> int:
    """Serve a tiny checkpoint, load it twice, print the verdicts. There are no options but --help."""
    argparse.ArgumentParser(prog="cierzo.bench.rpc", description=__doc__).parse_args()
    is_good = True
    with tempfile.TemporaryDirectory(prefix="cierzo-bench-") as folder:
        checkpoint = find_checkpoint("small4", Path(folder), "tiny")
        with CierzoServer(checkpoint, {"runner": "fake"}, Path(folder) / "server.log") as server:
            for settings, name, limit in LIMITS:
                result = server.load(settings)
                figure = getattr(result, name)
                print(f"\n{settings.requests} requests of {settings.output_tokens} tokens, {CLIENTS} open")
                print(result_table(result))
                told = "holds" if figure >= limit else "BELOW THE LIMIT"
                print(f"{told}: {figure:,.0f} {name.replace('_', ' ')} (limit {limit:,.0f})")
                is_good = is_good and figure >= limit and not result.errors
    return 0 if is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
