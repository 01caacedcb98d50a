"""Processes of engines: a worker that answers questions, a server under load, a tool that prints and ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Self

import uvloop

from cierzo.bench.latency import LoadResult
from cierzo.bench.load import Connect, LoadSettings, run_load
from cierzo.bench.peers.engine import (
    SERVED_LOAD,
    SERVED_MEMORY,
    Cell,
    Engine,
    EngineFailed,
    Logprobs,
    Measured,
    Session,
)
from cierzo.bench.workload import random_prompt
from cierzo.engine.errors import CierzoError, ConnectionLost
from cierzo.engine.model.read_config import read_model_config

WORKERS = Path(__file__).with_name("workers")
HOST = "127.0.0.1"
ANSWER_TIMEOUT_S = 1200.0
START_TIMEOUT_S = 600.0
LOAD_TIMEOUT_S = 1800.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.05
LOG_TAIL_LINES = 6
WARM_UP_TOKENS = 3
WARM_UP_SEED = 987_654
FIRST = Cell(name="first", kind="served", unit="req/s", batch=1, requests=1, prompt_tokens=16, new_tokens=1)
WARM_UP = Cell(name="warm-up", kind="served", unit="req/s", batch=4, requests=4, prompt_tokens=16, new_tokens=4)
GB = 1e9


class Process(Session):
    """A process in a group of its own; stderr, and stdout unless it goes elsewhere, are appended to a log."""

    def __init__(self, command: Sequence[str], log: Path, **streams: Any) -> None:
        """Start it; `streams` are those of Popen."""
        self.command, self.log, self.began = shlex.join(command), log, time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(f"\n$ {self.command}\n".encode())
            file.flush()
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, **streams}
            self.popen = subprocess.Popen(command, stderr=file, start_new_session=True, **streams)

    def failed(self, why: object) -> EngineFailed:
        """An error that says where the log is, and how it ends."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return EngineFailed(f"{why}, see {self.log}: {' | '.join(line.strip() for line in lines if line.strip())}")

    def peak_memory_gb(self) -> float:
        """Sum over the process and its descendants of each one's largest resident size (VmHWM)."""
        return sum(_peak_kb(pid) for pid in _tree(self.popen.pid)) * 1024 / GB

    def cpu_s(self) -> float:
        """Sum over the process and its descendants of the processor time that each has used, in seconds."""
        return sum(_cpu_ticks(pid) for pid in _tree(self.popen.pid)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process, and what it left in its group."""
        if self.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):  # it has ended
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text(encoding="utf-8").split():
                yield from _tree(int(child))


def _peak_kb(pid: int) -> int:
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
            return int(found[1])
    return 0


def _cpu_ticks(pid: int) -> int:
    with contextlib.suppress(OSError):
        after_name = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
        return int(after_name[11]) + int(after_name[12])  # utime and stime, fields 14 and 15 of proc_pid_stat(5)
    return 0


def run_tool(command: Sequence[str], log: Path, timeout_s: float = ANSWER_TIMEOUT_S) -> tuple[str, float]:
    """Run a tool: what it prints to stdout, and its largest resident size in GB. Raises EngineFailed."""
    with tempfile.TemporaryFile() as output, Process(command, log, stdout=output) as process:
        pid = process.popen.pid
        while not (ended := os.wait4(pid, os.WNOHANG))[0]:
            if time.monotonic() > process.began + timeout_s:
                raise EngineFailed(f"no end after {timeout_s:.0f} s: {process.command}")
            time.sleep(POLL_S)
        process.popen.returncode = os.waitstatus_to_exitcode(ended[1])
        if process.popen.returncode:
            raise process.failed(f"exit status {process.popen.returncode}")
        output.seek(0)
        return output.read().decode("utf-8", errors="replace"), ended[2].ru_maxrss * 1024 / GB


class Worker(Process):
    """An engine that is a Python library, loaded by `workers/loop.py`, with the backend of its peer's name."""

    def __init__(
        self, engine: Engine, checkpoint: Path, folder: Path, python: Sequence[str], /, **options: Any
    ) -> None:
        """Start and load. `python`: command of the interpreter; options: those of the backend beside the engine's.

        Raises EngineFailed.
        """
        asked = json.dumps({"checkpoint": str(checkpoint), **engine.options, **options})
        self._vocab_size = read_model_config(checkpoint).vocab_size
        self._pipe, theirs = Pipe()
        with theirs:
            command = [*python, str(WORKERS / "loop.py"), f"{engine.peer}_backend", asked]
            super().__init__(command, engine.log(checkpoint, folder), stdin=theirs)
        self.ask("load")
        self.load_s = time.monotonic() - self.began

    def ask(self, op: str, **arguments: Any) -> Any:
        """The result of one request. Raises EngineFailed, and ends a worker that does not answer."""
        try:
            self._pipe.send((op, arguments))
            if not self._pipe.poll(ANSWER_TIMEOUT_S):
                raise TimeoutError(f"no answer after {ANSWER_TIMEOUT_S:.0f} s")
            result, error = self._pipe.recv()
        except (OSError, EOFError) as lost:
            self.close()
            raise self.failed(f"{op}: {lost if isinstance(lost, TimeoutError) else 'it ended'}") from lost
        if error:
            if op == "load":  # nobody else can end it: the memory is the next engine's
                self.close()
            raise EngineFailed(f"{op}: {error}")
        return result

    def measured(self, cell: Cell, seed: int) -> Measured:
        """A decode or prefill cell, after a short run of the same batch. Prompts differ from seed to seed."""
        vocab_size, batch, new_tokens = self._vocab_size, max(cell.batch, 1), max(cell.new_tokens, 1)
        warm_up = [random_prompt(i, 16, vocab_size, WARM_UP_SEED + seed) for i in range(batch)]
        self.ask("generate", prompts=warm_up, new_tokens=WARM_UP_TOKENS)
        prompts = [random_prompt(i, cell.prompt_tokens, vocab_size, seed) for i in range(batch)]
        times_s = self.ask("generate", prompts=prompts, new_tokens=new_tokens)
        if any(len(times) != new_tokens for times in times_s):
            raise EngineFailed(f"tokens given: {[len(times) for times in times_s]}, asked for: {new_tokens}")
        rate = decode_rate(times_s) if cell.kind == "decode" else cell.prompt_tokens / times_s[0][0]
        return Measured(rate, times_s)

    def top_logprobs(self, sequences: list[list[int]], count: int) -> Logprobs:
        """Ask the backend."""
        return self.ask("top_logprobs", sequences=sequences, count=count)


def decode_rate(times_s: Sequence[Sequence[float]]) -> float:
    """Tokens per second of all requests together, from each one's token times.

    Counted from the moment at which every request has its first token, so that no prefill is in it, to that of the
    first request's last token, so that all of them decode all the time. Raises ValueError where no such time is.
    """
    start = max(times[0] for times in times_s)
    end = min(times[-1] for times in times_s)
    tokens = sum(start < time <= end for times in times_s for time in times)
    if tokens == 0:
        raise ValueError(f"no step in which all {len(times_s)} requests decode: raise the number of new tokens")
    return tokens / (end - start)


class RunningServer(Process):
    """A server that is warm. `load_s` is the time from its start to the answer to its first request."""

    cells = SERVED_LOAD, SERVED_MEMORY

    def __init__(self, command: Sequence[str], connect: Connect, log: Path) -> None:
        """Start it. `connect` raises ConnectionLost until it takes requests.

        Raises EngineFailed if it ends, or is not ready in time.
        """
        self.connect = connect
        super().__init__(command, log)
        try:
            uvloop.run(self._ready())
            self.measured(FIRST, WARM_UP_SEED)
            self.load_s = time.monotonic() - self.began
            self.measured(WARM_UP, WARM_UP_SEED)
        except BaseException:
            self.close()
            raise

    def measured(self, cell: Cell, seed: int) -> Measured:
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
        result = self.load(settings)
        return Measured(result.requests_per_s, result)

    def load(self, settings: LoadSettings) -> LoadResult:
        """Run a load.

        Raises EngineFailed if the server cannot be reached, takes too long, or gives no answer or one of another
        length than was asked for.
        """
        try:
            result = uvloop.run(asyncio.wait_for(run_load(settings, self.connect), LOAD_TIMEOUT_S))
        except (CierzoError, OSError, TimeoutError) as error:
            raise self.failed(error or "timeout") from error
        short = sum(one.num_tokens != settings.output_tokens for one in result.samples if one.error is None)
        if short or not result.answered:
            raise EngineFailed(f"{short} answers of a wrong length, errors: {result.errors or 'none'}")
        return result

    async def _ready(self) -> None:
        while time.monotonic() < self.began + START_TIMEOUT_S:
            if self.popen.poll() is not None:
                raise self.failed("the server ended")
            with contextlib.suppress(ConnectionLost):
                await (await self.connect("")).close()
                return
            await asyncio.sleep(POLL_S)
        raise self.failed(f"not ready after {START_TIMEOUT_S:.0f} s")


def words(flags: Mapping[str, Any]) -> list[str]:
    """Flags and their values for a command line."""
    return [str(word) for flag in flags.items() for word in flag]


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
