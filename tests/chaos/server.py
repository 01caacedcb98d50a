"""A server under test, as the system sees it: processes, memory, descriptors."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cierzo.bench.peers.ours import CierzoServer
from cierzo.engine.frontend.client import SyncClient
from cierzo.engine.messages import Stats
from cierzo.engine.text.short_tekken import short_tekken
from cierzo.engine.weights.make import make_checkpoint


class Server(CierzoServer):
    """`cierzo serve` in processes of its own."""

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return self._address

    @property
    def front_end(self) -> int:
        """Process id of the front end."""
        return self.popen.pid

    @property
    def core(self) -> int | None:
        """Process id of the core; None while there is none."""
        for children in Path(f"/proc/{self.front_end}/task").glob("*/children"):
            for child in children.read_text(encoding="utf-8").split():
                command = Path(f"/proc/{child}/cmdline")
                if command.exists() and b"cierzo.engine.worker" in command.read_bytes():
                    return int(child)
        return None

    def stats(self) -> Stats:
        """The server's figures."""
        with SyncClient(self.address) as client:
            return client.stats()


def resident_kb(pid: int) -> int:
    """Resident memory of a process."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) if found else 0


def descriptors(pid: int) -> int:
    """Open files of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def idle_descriptors(pids: list[int]) -> list[int]:
    """Open files of idle processes: the fewest seen within half a second.

    A connection that its client has closed, such as the last call for figures, is still open here for a moment.
    """
    seen = []
    for _ in range(10):
        seen.append([descriptors(pid) for pid in pids])
        time.sleep(0.05)
    return [min(counts) for counts in zip(*seen, strict=True)]


def more_descriptors(pids: list[int], before: list[int]) -> list[int]:
    """Open files of processes beyond those before, once there are none or some seconds have passed."""
    until_s = time.monotonic() + 5.0
    while True:
        more = [max(0, descriptors(pid) - count) for pid, count in zip(pids, before, strict=True)]
        if not any(more) or time.monotonic() > until_s:
            return more
        time.sleep(0.05)


@contextmanager
def serving(log: Path | None = None, *, words: bool = False, **options: Any) -> Iterator[Server]:
    """A server of a tiny checkpoint with random weights, with these options of `cierzo serve`. words: it has a
    tokenizer, too."""
    with tempfile.TemporaryDirectory(prefix="cierzo-chaos-") as folder:
        tokenizer = short_tekken if words else None
        checkpoint = make_checkpoint(Path(folder) / "tiny", like="small4", scale="tiny", tokenizer=tokenizer)
        chosen = {"threads": 1, "kv_cache_gib": 0.05, **options}
        with Server(checkpoint, chosen, log or Path(folder) / "server.log") as server:
            yield server
