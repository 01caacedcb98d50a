"""A server on the stand-in: `python -m standin server FOLDER ADDRESS REPORT` is `cierzo serve` of a toy model, but
that its core process has the stand-in for a card. What it did before it was ready, and in all, it writes to REPORT,
JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import triton
import uvloop
from msgspec.structs import replace

from cierzo.engine import launch
from cierzo.engine.config import EngineConfig
from cierzo.engine.frontend import core_link
from cierzo.engine.frontend.child import Child
from cierzo.engine.worker import core, process
from cierzo.kernels.cuda.launch import device
from cierzo.kernels.cuda.launch.launcher import running_on
from cierzo.kernels.triton import widths
from standin.driver import Machine, on_card
from standin.engines import make_config
from standin.machine import Backend, Graph, torch_cuda

STOP_TIMEOUT_S = 50.0  # the core reports at its end, however long that takes on a busy machine
STARTED = ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec")  # audit events: a compiler is a process


class Activity:
    """Counts of what must be done before a server is ready."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._counts: Counter[str] = Counter()
        sys.addaudithook(self._heard)
        triton.knobs.compilation.listener = lambda *_, **__: self._counts.update(["compiled or looked up"])

    def _heard(self, event: str, _: tuple[Any, ...]) -> None:
        if event in STARTED:
            self._counts["processes started"] += 1
        elif event == "ctypes.dlopen":
            self._counts["libraries opened"] += 1

    def so_far(self) -> dict[str, int]:
        """By what was done, how often."""
        library = self._machine.library
        driver = {"launches": library.raw("standin_count", 0), "modules loaded": library.raw("standin_count", 1)}
        return dict(self._counts) | driver | {"recordings": Graph.recordings, "replays": Graph.replays}


def serve_core(socket: str, report: str) -> int:
    """The core process."""
    device.require = lambda: None  # CUDA C++ runs on fibers, without CuPy
    widths.TOKENS, widths.ROWS, widths.COLUMNS = 16, 64, 256
    found: dict[str, dict[str, int]] = {}
    with on_card() as machine, torch_cuda(machine.card), running_on(Backend(machine.card.stream)):
        activity, make_runner = Activity(machine), core.make_runner

        def make(config: EngineConfig) -> core.Runner:
            with machine.card.loading():
                runner = make_runner(config)
            found["before"] = activity.so_far()
            return runner

        core.make_runner = make
        status = process.run(socket)
        found["in all"] = activity.so_far()
    Path(report).write_text(json.dumps(found), encoding="utf-8")
    return status


def main(folder: str, *arguments: str) -> int:
    """The server; with FOLDER "core", its core process."""
    if folder == "core":
        return serve_core(*arguments)
    address, report = arguments
    config = make_config(Path(folder), "small4")
    config = replace(config, frontend=replace(config.frontend, address=address))

    core_link.STOP_TIMEOUT_S = STOP_TIMEOUT_S

    async def spawn(socket: str) -> Child:
        command = (sys.executable, "-m", "standin", "server", "core", socket, report)
        return await asyncio.create_subprocess_exec(*command)

    with contextlib.suppress(KeyboardInterrupt):
        return uvloop.run(launch._serve(config, spawn))
    return 1
