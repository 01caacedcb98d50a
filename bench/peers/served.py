"""A server of an engine under the one load client: started, waited for, loaded, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

import uvloop

from cierzo.bench.latency import LoadResult
from cierzo.bench.load import LoadClient, LoadSettings, run_load
from cierzo.bench.peers.cells import Cell
from cierzo.bench.peers.engine import EngineFailed, Measured, Server
from cierzo.bench.peers.process import log_tail, peak_memory_gb, spawn, stop
from cierzo.engine.errors import CierzoError, ConnectionLost

START_TIMEOUT_S = 600.0
LOAD_TIMEOUT_S = 1800.0
POLL_S = 0.05
FIRST = Cell(name="first", kind="served", unit="req/s", batch=1, requests=1, prompt_tokens=16, new_tokens=1)
WARM_UP = Cell(name="warm-up", kind="served", unit="req/s", batch=4, requests=4, prompt_tokens=16, new_tokens=4)
WARM_UP_SEED = 876_543


class RunningServer:
    """A server process that is warm. `load_s` is the time from its start to the answer to its first request."""

    def __init__(self, server: Server, log: Path) -> None:
        """Start it. Raises EngineFailed if it ends, or is not ready in time."""
        self._server = server
        self._log = log
        self.load_s: float | None = None
        self.command = shlex.join(server.command)
        start = time.monotonic()
        self._process = spawn(server.command, log, stdin=subprocess.DEVNULL)
        try:
            uvloop.run(self._ready())
            self.measure(FIRST, WARM_UP_SEED)
            self.load_s = time.monotonic() - start
            self.measure(WARM_UP, WARM_UP_SEED)
        except BaseException:
            self.close()
            raise

    def measure(self, cell: Cell, seed: int) -> Measured:
        """Requests per second of a served cell. Requests that failed are told in `raw`. Raises EngineFailed."""
        settings = LoadSettings(
            rpc="",
            requests=cell.requests,
            concurrency=cell.batch,
            input_tokens=cell.prompt_tokens,
            shared_tokens=cell.shared_tokens,
            output_tokens=cell.new_tokens,
            seed=seed,
        )
        result = self.whole_load(settings)
        return Measured(result.requests_per_s, result)

    def whole_load(self, settings: LoadSettings) -> LoadResult:
        """One load whose answers all have the length that was asked for. Raises EngineFailed."""
        result = self.load(settings)
        short = sum(one.num_tokens != settings.output_tokens for one in result.samples if one.error is None)
        if short or not result.answered:
            raise EngineFailed(f"{short} answers of a wrong length, errors: {result.errors or 'none'}")
        return result

    def load(self, settings: LoadSettings) -> LoadResult:
        """One load. Raises EngineFailed if the server cannot be reached, or takes too long."""
        try:
            return uvloop.run(asyncio.wait_for(run_load(settings, self._connect), LOAD_TIMEOUT_S))
        except (CierzoError, OSError, TimeoutError) as error:
            raise EngineFailed(f"{error or 'timeout'}, see {self._log}: {log_tail(self._log)}") from error

    def peak_memory_gb(self) -> float:
        """Of the server and its children."""
        return peak_memory_gb(self._process.pid)

    def close(self) -> None:
        """Stop it."""
        stop(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _connect(self, _: str) -> LoadClient:
        return await self._server.connect()

    async def _ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise EngineFailed(f"the server ended, see {self._log}: {log_tail(self._log)}")
            with contextlib.suppress(ConnectionLost):
                await (await self._server.connect()).close()
                return
            await asyncio.sleep(POLL_S)
        raise EngineFailed(f"not ready after {START_TIMEOUT_S:.0f} s, see {self._log}: {log_tail(self._log)}")


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
