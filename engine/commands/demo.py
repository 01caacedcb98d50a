"""`cierzo demo`: the demo model on a server of its own, which answers one question."""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

from cierzo.engine.checkpoint import DEMO, checkpoint_folder
from cierzo.engine.commands.chat import turn
from cierzo.engine.errors import ConnectionLost, CoreFailed
from cierzo.engine.frontend.client import SyncClient
from cierzo.engine.messages import ChatMessage
from cierzo.engine.options import add_sampling, sampling, text

POLL_S = 0.05
STOP_TIMEOUT_S = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the question and the sampling parameters."""
    parser.add_argument("--prompt", type=text, default="Why is the sky blue?", metavar="TEXT", help="the question")
    add_sampling(parser)
    # what SmolLM2's makers recommend for chatting; at higher temperatures a model this small loses the thread
    parser.set_defaults(temperature=0.2, top_p=0.9)


def run(arguments: argparse.Namespace) -> int:
    """Start a server of the demo model, ask it one question over the RPC, stop it."""
    checkpoint, prompt = checkpoint_folder(DEMO), arguments.prompt
    turns = [ChatMessage(role="user", content=prompt)]
    signal.signal(signal.SIGTERM, _terminated)  # the server must not outlive the demo
    with tempfile.TemporaryDirectory(prefix="cierzo-demo-") as folder:
        address = f"unix:{Path(folder) / 'rpc.sock'}"
        server = subprocess.Popen(
            [sys.executable, "-m", "cierzo", "serve", checkpoint, "--rpc", address], start_new_session=True
        )
        try:
            with _connect(address, server) as client:
                print(f"\n> {prompt}\n", flush=True)
                turn(client, turns, sampling(arguments))
        finally:
            server.terminate()
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    return 0


def _terminated(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _connect(address: str, server: subprocess.Popen[bytes]) -> SyncClient:
    """Wait until the starting server is ready, and return a client of it."""
    while server.poll() is None:
        with contextlib.suppress(ConnectionLost):  # it does not listen yet, or has ended
            client = SyncClient(address)
            try:
                client.wait_ready()
            except BaseException:
                client.close()
                raise
            return client
        time.sleep(POLL_S)
    raise CoreFailed(f"the server ended before it was ready, with status {server.returncode}")
