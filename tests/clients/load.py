"""aiperf on the HTTP door of a server with the fake runner: a load of streams, all of them answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from clients.served import MODEL, Failed, Served, run

REQUESTS, CLIENTS, OUTPUT_TOKENS = 300, 16, 32
ENDPOINTS = ("chat", "completions")


def measure(environment: Path, checkpoint: Path, folder: Path) -> Iterator[str]:
    """Run it on both endpoints; lines that tell what it measured. Raises Failed where its counts are wrong."""
    with Served(checkpoint, folder / "server.log", runner="fake") as server:
        for endpoint in ENDPOINTS:
            output = folder / endpoint
            command = [
                *(environment / "bin" / "aiperf", "profile", "--model", MODEL, "--url", server.url),
                *("--endpoint-type", endpoint, "--streaming", "--tokenizer", checkpoint, "--random-seed", "1"),
                *("--concurrency", CLIENTS, "--request-count", REQUESTS, "--synthetic-input-tokens-mean", 64),
                *("--output-tokens-mean", OUTPUT_TOKENS, "--extra-inputs", "ignore_eos:true"),
                *("--use-server-token-count", "--ui", "none", "--artifact-dir", output),
                *(["--per-chunk-usage"] if endpoint == "chat" else []),
            ]
            run(command, folder / f"{endpoint}.log", cwd=folder, HF_HOME=str(folder / "huggingface"))
            yield _read(endpoint, output)


def _read(endpoint: str, output: Path) -> str:
    """The figures of a run. Raises Failed."""
    told = json.loads((output / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    counts = {
        "request_count": REQUESTS,
        "error_summary": [],
        "total_usage_completion_tokens": REQUESTS * OUTPUT_TOKENS,
        "was_cancelled": False,
    }
    for name, expected in counts.items():
        found = told[name]["avg"] if isinstance(told[name], dict) else told[name]
        if found != expected:
            raise Failed(f"{endpoint}: {name} is {found}, and should be {expected}")
    metrics = json.loads((output / "server_metrics_export.json").read_text(encoding="utf-8"))["summary"]
    if not metrics["endpoints_successful"]:
        raise Failed(f"{endpoint}: /metrics was not read: {metrics}")
    first = told["time_to_first_token"]
    return (
        f"/v1/{endpoint}: {told['request_throughput']['avg']:.0f} requests/s, "
        f"{told['output_token_throughput']['avg']:,.0f} tokens/s, time to first token "
        f"{first['p50']:.0f} ms p50, {first['p99']:.0f} ms p99 ({REQUESTS} streams, {CLIENTS} at a time)"
    )
