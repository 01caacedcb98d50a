"""The tiny model behind a server: its answers are right across the death of a core, and over HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_model import FOLDER, arguments, file_of, held_out, is_right, of_all_tasks

from cierzo.engine.frontend.answer import Answer
from cierzo.engine.frontend.client import Client

LEAST = 0.95  # share of right answers
INSTANCES = 12  # of each task


@dataclass(frozen=True)
class Served:
    rpc: str
    http: str
    core: int  # process id


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        http = f"127.0.0.1:{free.getsockname()[1]}"
    rpc = f"unix:{tmp_path}/rpc.sock"
    command = [sys.executable, "-m", "cierzo", "serve", str(FOLDER), "--rpc", rpc, "--http", http]
    sizes = ["--threads", "1", "--max-model-len", "256", "--kv-cache-gib", "0.02"]
    with subprocess.Popen([*command, *sizes], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            assert any(line.startswith("ready: ") for line in server.stdout)
            children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text(encoding="ascii").split()
            names = {Path(f"/proc/{child}/cmdline").read_bytes(): int(child) for child in children}
            (core,) = [child for name, child in names.items() if b"engine.worker" in name]
            yield Served(rpc, http, core)
        finally:
            server.send_signal(signal.SIGINT)


def test_a_core_that_dies_changes_no_answer(served: Served) -> None:
    instances = of_all_tasks(INSTANCES)

    async def body() -> list[Answer]:
        async with await Client.connect(served.rpc) as client:
            answers = [asyncio.create_task(client.ask(**arguments(one))) for one in instances]
            await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
            assert sum(one.done() for one in answers) < len(answers) / 2
            os.kill(served.core, signal.SIGKILL)
            found = await asyncio.gather(*answers)
            assert (await client.stats()).core_restarts == 1
            return found

    answers = asyncio.run(body())
    right = [is_right(one, answer) for one, answer in zip(instances, answers, strict=True)]
    assert sum(right) >= LEAST * len(right)


def test_it_sees_over_http(served: Served) -> None:
    right = 0
    for one in held_out("images", 10, seed=9):
        url = "data:image/png;base64," + base64.b64encode(file_of(one)).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": one.question}]
        asked = {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0}
        request = urllib.request.Request(
            f"http://{served.http}/v1/chat/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            right += json.load(reply)["choices"][0]["message"]["content"] == one.answer
    assert right >= 9
