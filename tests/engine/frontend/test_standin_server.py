"""A server of a toy Small 4 on the stand-in for a card: it answers as plain steps do, and once it is ready it
compiles, loads and records nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from standin.ask import environment
from standin.engines import load, make_config
from standin.library import available
from standin.plain import plainly

from cierzo.engine.frontend.client import Client
from cierzo.engine.messages import Submit

pytestmark = pytest.mark.skipif(not available(), reason="Triton's wheels are for Linux on x86-64")
DONE_BEFORE = ("processes started", "libraries opened", "compiled or looked up", "modules loaded", "recordings")
LIMIT_S = 250.0


async def answers(address: str, requests: list[Submit]) -> list[list[int]]:
    """Tokens of requests that are all there at once."""
    while not Path(address.removeprefix("unix:")).exists():
        await asyncio.sleep(0.1)
    async with await Client.connect(address, timeout_s=60.0) as client:
        await client.wait_ready(timeout_s=LIMIT_S)

        async def answer(request: Submit) -> list[int]:
            params = request.sampling
            given = {name: getattr(params, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
            given |= {"repetition_penalty": params.repetition_penalty, "ignore_eos": True}
            final = await client.complete(token_ids=request.prompt_token_ids, **given)
            return [*final.samples[0].token_ids]

        return await asyncio.gather(*map(answer, requests))


def test_once_ready_it_compiles_and_records_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_config(tmp_path, "small4")
    report, address = tmp_path / "report.json", f"unix:{tmp_path}/rpc"
    command = [sys.executable, "-m", "standin", "server", str(tmp_path), address, str(report)]
    requests = load(1)
    with subprocess.Popen(command, env=environment()) as process:
        try:
            found = asyncio.run(asyncio.wait_for(answers(address, [request for _, request in requests]), LIMIT_S))
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
    assert status == 0
    expected = plainly(tmp_path, "small4", requests, monkeypatch)
    assert found == [expected[str(request.request_id)][0] for _, request in requests]
    told = json.loads(report.read_text(encoding="utf-8"))
    before, in_all = told["before"], told["in all"]
    for what in DONE_BEFORE:
        assert 0 < before[what] == in_all[what], (what, told)
    assert in_all["launches"] > before["launches"]
    assert in_all["replays"] > before["replays"] == 0
