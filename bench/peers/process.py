"""Processes of engines: a worker that answers JSON lines, a tool that prints and ends; and their memory."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cierzo.bench.peers.cells import Cell, decode_rate
from cierzo.bench.peers.engine import EngineFailed, Logprobs, Measured
from cierzo.bench.workload import random_prompt

WORKERS = Path(__file__).with_name("workers")
STOP_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 1200.0
LOG_TAIL_LINES = 6
WARM_UP_TOKENS = 3
WARM_UP_SEED = 987_654
GB = 1e9


def spawn(command: Sequence[str], log: Path, **streams: Any) -> subprocess.Popen[bytes]:
    """Start `command` in a process group of its own, its stderr (and stdout, unless given) appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"\n$ {shlex.join(command)}\n".encode())
        file.flush()
        return subprocess.Popen(command, stderr=file, start_new_session=True, **{"stdout": file, **streams})


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that `spawn` started, and what it left in its group."""
    group = process.pid
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    process.wait()


def peak_memory_gb(root: int) -> float:
    """Sum over a process and its descendants of each one's largest resident size (VmHWM), 1e9 bytes."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            parents.setdefault(int(_status(entry, "PPid") or 0), []).append(int(entry.name))
    total, pending = 0, [root]
    while pending:
        pid = pending.pop()
        pending += parents.get(pid, [])
        total += int((_status(Path(f"/proc/{pid}"), "VmHWM") or "0 kB").split()[0]) * 1024
    return total / GB


def _status(process: Path, name: str) -> str:
    try:
        lines = (process / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # it has ended
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:")), "")


def log_tail(log: Path) -> str:
    """The last lines of a log, for an error message."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return " | ".join(line.strip() for line in lines[-LOG_TAIL_LINES:] if line.strip())


def run_tool(command: Sequence[str], log: Path, timeout_s: float = ANSWER_TIMEOUT_S) -> tuple[str, float]:
    """Run a tool: what it prints to stdout, and its largest resident size in GB. Raises EngineFailed."""
    process = spawn(command, log, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        output = _read_all(process.stdout.fileno(), time.monotonic() + timeout_s)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    except TimeoutError:
        raise EngineFailed(f"no end after {timeout_s:.0f} s: {shlex.join(command)}") from None
    finally:
        stop(process)
        process.stdout.close()
    if process.returncode:
        raise EngineFailed(f"exit status {process.returncode}, see {log}: {log_tail(log)}")
    return output.decode("utf-8", errors="replace"), usage.ru_maxrss * 1024 / GB


def _read_all(descriptor: int, deadline: float) -> bytes:
    """Everything up to the end of the stream. Raises TimeoutError."""
    parts: list[bytes] = []
    while True:
        if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        part = os.read(descriptor, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)


class Worker:
    """An engine behind `workers/loop.py`, loaded; `Offline` of every engine that is a Python library."""

    def __init__(
        self,
        command: list[str],
        backend: str,
        checkpoint: Path,
        options: dict[str, Any],
        *,
        vocab_size: int,
        log: Path,
    ) -> None:
        """Start and load. `command` runs Python in the engine's environment; prompts are drawn from `vocab_size`.

        Raises EngineFailed.
        """
        self._log = log
        self._vocab_size = vocab_size
        argv = [*command, str(WORKERS / "loop.py"), backend]
        self.command = f"{shlex.join(argv)} <<< {json.dumps({'checkpoint': str(checkpoint), 'options': options})}"
        start = time.monotonic()
        self._process = spawn(argv, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._unread = b""
        self.ask("load", checkpoint=str(checkpoint), options=options)
        self.load_s: float | None = time.monotonic() - start

    def ask(self, op: str, **arguments: Any) -> Any:
        """The result of one request. Raises EngineFailed, and ends a worker that does not answer."""
        assert self._process.stdin is not None
        request = json.dumps({"op": op, **arguments}).encode() + b"\n"
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            answer = json.loads(self._line(time.monotonic() + ANSWER_TIMEOUT_S))
        except (OSError, TimeoutError) as error:
            self.close()
            reason = str(error) or "it ended"
            raise EngineFailed(f"{op}: {reason}, see {self._log}: {log_tail(self._log)}") from error
        if "error" in answer:
            raise EngineFailed(f"{op}: {answer['error']}")
        return answer["result"]

    def measure(self, cell: Cell, seed: int) -> Measured:
        """A decode or prefill cell, after a short run of the same batch. Prompts differ from seed to seed."""
        vocab_size, batch = self._vocab_size, max(cell.batch, 1)
        warm_up = [random_prompt(i, 16, vocab_size, WARM_UP_SEED + seed) for i in range(batch)]
        self.ask("generate", prompts=warm_up, new_tokens=WARM_UP_TOKENS)
        prompts = [random_prompt(i, cell.prompt_tokens, vocab_size, seed) for i in range(batch)]
        times_s = self.ask("generate", prompts=prompts, new_tokens=max(cell.new_tokens, 1))
        if any(len(times) != max(cell.new_tokens, 1) for times in times_s):
            raise EngineFailed(f"tokens given: {[len(times) for times in times_s]}, asked for: {cell.new_tokens}")
        if cell.kind == "decode":
            return Measured(decode_rate(times_s), times_s)
        return Measured(cell.prompt_tokens / times_s[0][0], times_s)

    def top_logprobs(self, sequences: list[list[int]], count: int) -> Logprobs:
        """Ask the backend."""
        return [
            [[(int(token), float(logprob)) for token, logprob in position] for position in sequence]
            for sequence in self.ask("top_logprobs", sequences=sequences, count=count)
        ]

    def peak_memory_gb(self) -> float:
        """Peak memory of the worker and its children."""
        return peak_memory_gb(self._process.pid)

    def close(self) -> None:
        """End the worker and its children."""
        stop(self._process)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"no answer after {ANSWER_TIMEOUT_S:.0f} s")
            part = os.read(descriptor, 1 << 20)
            if not part:
                raise BrokenPipeError
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line
