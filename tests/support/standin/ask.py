"""Runs cases on the stand-in, for tests whose own process has Triton's interpreter: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def environment() -> dict[str, str]:
    """Environment of such a process: no interpreter, and this folder's modules."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join([*filter(None, sys.path), str(Path(__file__).resolve().parents[1])])
    return variables


def ask(*arguments: str) -> Any:
    """Output of `python -m standin`, read as JSON."""
    command = [sys.executable, "-m", "standin", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])
