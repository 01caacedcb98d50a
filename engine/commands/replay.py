"""`cierzo replay`: run again what a core that died had written down."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile

from cierzo.engine.errors import refusal
from cierzo.engine.signs import SignsPage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file."""
    parser.add_argument("file", metavar="FILE", help="flight record that a server has kept")


def run(arguments: argparse.Namespace) -> int:
    """Replay the file in a process of its own, which may die of it as the core did, and say where."""
    try:
        open(arguments.file, "rb").close()
    except OSError as error:
        raise refusal("file", "a flight record", arguments.file, error.strerror or str(error)) from error
    with tempfile.TemporaryDirectory(prefix="cierzo-replay-") as folder:
        signs = SignsPage.create(folder)
        command = [sys.executable, "-m", "cierzo.engine.worker.replay", arguments.file]
        status = subprocess.run([*command, "--socket", os.path.join(folder, "none")], check=False).returncode
    if status >= 0:
        return status
    step = signs.read().turns
    print(f"step {step:,} ended the replay: killed by {signal.Signals(-status).name}", flush=True)
    return 1
