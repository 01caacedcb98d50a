"""The load generator against a scripted client: what it sends, when, and what it makes of the answers."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from cierzo.bench import load
from cierzo.bench.latency import RequestSample, result_table, summarise_load
from cierzo.bench.load import LoadSettings, add_arguments, run_load
from cierzo.engine.errors import ConfigError, Overloaded
from cierzo.engine.messages import Delta


class ScriptedClient:
    """Answers with three deltas of 1, 2 and 1 tokens; every fourth request is refused.

    Nothing is answered before `answer_after` requests are open on its connection.
    """

    opened: list[ScriptedClient]
    answer_after = 1

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.open = 0
        self.most_open = 0
        self.closed = False
        self.answering = asyncio.Event()

    @classmethod
    async def connect(cls, address: str) -> ScriptedClient:
        assert address == "unix:/nowhere"
        cls.opened.append(cls())
        return cls.opened[-1]

    async def model_info(self) -> Any:
        return SimpleNamespace(vocab_size=11)

    async def close(self) -> None:
        self.closed = True

    async def generate(self, **request: Any) -> AsyncIterator[Delta]:
        self.requests.append(request)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        if self.open >= self.answer_after:
            self.answering.set()
        try:
            await self.answering.wait()
            if len(self.requests) % 4 == 0:
                raise Overloaded("full")
            for count in (1, 2, 1):
                await asyncio.sleep(0)  # gives the loop away, as a socket would
                yield Delta(stream=0, token_ids=[5] * count)
        finally:
            self.open -= 1


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> list[ScriptedClient]:
    monkeypatch.setattr(ScriptedClient, "opened", [], raising=False)
    monkeypatch.setattr(load, "Client", ScriptedClient)
    return ScriptedClient.opened


def test_closed_loop_keeps_its_concurrency(clients: list[ScriptedClient]) -> None:
    result = asyncio.run(run_load(LoadSettings(rpc="unix:/nowhere", requests=20, concurrency=3, input_tokens=4)))
    (client,) = clients
    assert client.most_open == 3
    assert client.closed
    assert len(client.requests) == len(result.samples) == 20
    assert all(len(r["token_ids"]) == 4 and r["text"] is None and r["ignore_eos"] for r in client.requests)
    assert len({tuple(r["token_ids"]) for r in client.requests}) > 1
    assert (result.answered, result.errors) == (15, {"overloaded: full": 5})
    assert result.output_tokens_per_s == pytest.approx(15 * 4 / result.elapsed_s)
    assert result.requests_per_s == pytest.approx(15 / result.elapsed_s)


def test_open_loop_waits_for_no_answer(clients: list[ScriptedClient], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedClient, "answer_after", 15)
    settings = LoadSettings(rpc="unix:/nowhere", requests=30, rate=1e9, connections=2, prompt="Hi", output_tokens=9)
    result = asyncio.run(asyncio.wait_for(run_load(settings), timeout=5))
    assert [client.most_open for client in clients] == [15, 15]
    assert all(r["text"] == "Hi" and r["token_ids"] is None and r["max_tokens"] == 9 for r in clients[0].requests)
    assert sorted(r["seed"] for client in clients for r in client.requests) == list(range(30))
    dues = [sample.due_s for sample in result.samples]
    assert len(set(dues)) == 30
    assert result.send_lag_s.count == 30


def test_contradicting_settings_are_refused(clients: list[ScriptedClient]) -> None:
    for settings in (
        LoadSettings(rpc="unix:/nowhere", requests=1),
        LoadSettings(rpc="unix:/nowhere", requests=1, concurrency=1, rate=1.0),
    ):
        with pytest.raises(ConfigError, match="exactly one"):
            asyncio.run(run_load(settings))
    assert not clients


def test_latencies_count_from_the_due_moment_and_per_token() -> None:
    answered = RequestSample(1.0, 1.5, [2.0, 2.4, 2.5], [1, 2, 1], 2.6)
    refused = RequestSample(1.0, 1.25, [], [], 1.3, "overloaded", "full")
    result = summarise_load([answered, refused], elapsed_s=4.0)
    assert result.time_to_first_token_s.p50 == pytest.approx(1.0)
    assert result.end_to_end_s.max == pytest.approx(1.6)
    assert result.inter_token_s.count == 3
    assert result.inter_token_s.p50 == pytest.approx(0.2)  # 0.2, 0.2 (one delta of two tokens), 0.1
    assert result.send_lag_s.max == pytest.approx(0.5)
    assert (result.requests_per_s, result.output_tokens_per_s) == (0.25, 1.0)
    table = result_table(result)
    assert "1000.00" in table
    assert "0.00" not in result_table(summarise_load([refused], elapsed_s=1.0)).splitlines()[1]
    assert "1 failed: overloaded: full" in table


def _parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return parser.parse_args(["--rpc", "unix:/nowhere", *words])


def test_command_writes_settings_and_raw_samples(
    clients: list[ScriptedClient], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "load.json"
    assert load.main(_parse("--requests", "8", "--json", str(path))) == 1  # two were refused
    assert "time to first token" in capsys.readouterr().out
    report = msgspec.json.decode(path.read_bytes())
    assert report["benchmark"] == "load"
    assert report["settings"]["concurrency"] == 8
    assert report["settings"]["rate"] is None
    assert len(report["results"]["samples"]) == 8
    assert report["machine"]["cores"] >= 1
    assert "msgspec" in report["versions"]
    assert load.main(_parse("--requests", "3")) == 0


@pytest.mark.parametrize(
    "words",
    [
        ("--concurrency", "2", "--rate", "3"),
        ("--requests", "0"),
        ("--rate", "nan"),
        ("--rate", "inf"),
        ("--prompt", "x", "--input-tokens", "3"),
        ("--output-tokens", "-1"),
        ("--concurrenc", "2"),
    ],
)
def test_bad_options_are_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _parse(*words)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_prompts_may_share_their_beginning(clients: list[ScriptedClient]) -> None:
    settings = LoadSettings(rpc="unix:/nowhere", requests=5, concurrency=1, input_tokens=8, shared_tokens=6)
    asyncio.run(run_load(settings))
    prompts = [request["token_ids"] for request in clients[0].requests]
    assert {len(prompt) for prompt in prompts} == {8}
    assert len({tuple(prompt[:6]) for prompt in prompts}) == 1
    assert len({tuple(prompt[6:]) for prompt in prompts}) > 1
    with pytest.raises(ConfigError, match="shared_tokens must be 0 to 7, got 8"):
        asyncio.run(run_load(msgspec.structs.replace(settings, shared_tokens=8)))


def test_another_protocol_brings_its_own_connection(clients: list[ScriptedClient]) -> None:
    async def connect(address: str) -> ScriptedClient:
        return await ScriptedClient.connect("unix:/nowhere")

    settings = LoadSettings(rpc="http://elsewhere", requests=3, concurrency=2, input_tokens=4)
    assert asyncio.run(run_load(settings, connect)).answered == 3
    assert clients[0].closed
