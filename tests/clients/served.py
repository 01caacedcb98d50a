"""A server with an HTTP door, and a program of somebody else's run against it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cierzo.bench.peers.ours import CierzoServer
from cierzo.bench.peers.process import HOST, free_port

MODEL = "demo"
LIMIT_S = 300


class Failed(Exception):
    """A program that ended badly, or measured what cannot be."""


class Served(CierzoServer):
    """`cierzo serve` of the demo model with RPC and HTTP; `rpc` and `url` are where."""

    def __init__(self, checkpoint: Path, log: Path, **options: Any) -> None:
        http = f"{HOST}:{free_port()}"
        self.url = f"http://{http}"
        super().__init__(checkpoint, {"http": http, "served_model_name": MODEL, **options}, log)

    @property
    def rpc(self) -> str:
        """Address of the RPC."""
        return self._address


def run(command: Sequence[str | Path], log: Path, *, cwd: Path, **variables: str) -> None:
    """Run a program that downloads nothing, and keep what it prints. Raises Failed if it does not end well."""
    words = [str(word) for word in command]
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # its packages are its own
    print("$", *words, flush=True)
    with log.open("w", encoding="utf-8") as file:
        try:
            status = subprocess.run(
                words,
                cwd=cwd,
                env={**ours, "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **variables},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=LIMIT_S,
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"none after {LIMIT_S} s"
    if status:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise Failed(f"{words[0]}: exit status {status}, see {log}:\n{tail}")
