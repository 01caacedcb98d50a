"""The load client over HTTP, against a server in miniature."""

from __future__ import annotations

import asyncio
import operator
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cierzo.bench.peers import llamacpp, vllm
from cierzo.bench.peers.cells import Cell
from cierzo.bench.peers.engine import EngineFailed
from cierzo.bench.peers.http import HttpClient
from cierzo.bench.peers.process import RunningServer, free_port
from cierzo.engine.errors import ConnectionLost

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "fake_http_server.py"
CELL = Cell(name="served", kind="served", unit="req/s", batch=3, requests=7, prompt_tokens=6, new_tokens=5)


def _client(port: int) -> HttpClient:
    def body(prompt: list[int], num_tokens: int) -> dict[str, Any]:
        return {"prompt": prompt, "count": num_tokens}

    return HttpClient(port, "/stream", body, operator.itemgetter("tokens"), vocab_size=20)


def _serve(folder: Path, port: int, *words: str) -> RunningServer:
    return RunningServer([sys.executable, *words], _client(port).connect, folder / "server.log")


def test_a_server_is_waited_for_loaded_and_stopped(tmp_path: Path) -> None:
    port = free_port()
    with _serve(tmp_path, port, str(SCRIPT), str(port)) as running:
        measured = running.measure(CELL, seed=0)
        assert measured.raw.answered == CELL.requests
        assert all(sum(one.delta_tokens) == CELL.new_tokens for one in measured.raw.samples)
        assert measured.value == pytest.approx(CELL.requests / measured.raw.elapsed_s)
        assert running.load_s is not None
        assert running.load_s > 0
        assert running.peak_memory_gb() > 0.003
    with pytest.raises(ConnectionLost):
        asyncio.run(_client(port).connect(""))


def test_a_server_that_refuses_everything(tmp_path: Path) -> None:
    port = free_port()
    with pytest.raises(EngineFailed, match="status 503: full"):
        _serve(tmp_path, port, str(SCRIPT), str(port), "fail")


def test_a_server_that_ends(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match=r"the server ended, see .*server\.log: .*no model"):
        _serve(tmp_path, free_port(), "-c", "import sys; sys.exit('no model')")


def test_an_answer_that_is_cut_short() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n12\r\ndata: {"tokens": [1')
        writer.close()

    async def ask() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            client = _client(server.sockets[0].getsockname()[1])
            async for _ in client.generate(token_ids=[1], max_tokens=1):
                raise AssertionError("half a number is no token")

    with pytest.raises(ConnectionLost, match="cut short"):
        asyncio.run(ask())


@pytest.mark.parametrize(
    ("peer", "event", "token_ids"),
    [
        (vllm, {"choices": [{"text": "", "token_ids": [5, 6]}]}, [5, 6]),
        (vllm, {"choices": [{"text": "", "token_ids": None}]}, []),
        (vllm, {"choices": []}, []),
        (llamacpp, {"tokens": [5], "stop": False}, [5]),
        (llamacpp, {"tokens": [5], "stop": True}, []),
    ],
)
def test_events_are_read(peer: ModuleType, event: dict[str, Any], token_ids: list[int]) -> None:
    assert peer.token_ids(event) == token_ids


def test_peers_are_asked_for_greedy_answers_of_a_given_length() -> None:
    ours = vllm.body([1, 2], 9)
    assert (ours["prompt"], ours["max_tokens"], ours["temperature"], ours["ignore_eos"]) == ([1, 2], 9, 0.0, True)
    llama = llamacpp.body([1, 2], 9)
    assert (llama["prompt"], llama["n_predict"], llama["top_k"], llama["ignore_eos"]) == ([1, 2], 9, 1, True)
    with pytest.raises(ConnectionLost, match="no slot"):
        llamacpp.token_ids({"error": "no slot"})
