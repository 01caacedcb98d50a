"""The load generator against a scripted client: what it sends, when, and what it makes of the answers."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import msgspec
import pytest

from cierzo.bench import load
from cierzo.bench.latency import RequestSample, result_table, steady_load, summarise_load
from cierzo.bench.load import LoadSettings, add_arguments, run_load, settings_of
from cierzo.engine.errors import (
    ConfigError,
    ConnectionLost,
    CoreFailed,
    Draining,
    InvalidRequest,
    Overloaded,
)
from cierzo.engine.frontend import validate
from cierzo.engine.messages import Delta, Final, SampleEnd, Timings, Usage
from cierzo.engine.options import MAX_SEED


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
    async def connect(cls, address: str, features: Sequence[str] = (), reconnect: bool = True) -> ScriptedClient:
        assert (address, *features) in (("unix:/nowhere",), ("unix:/nowhere", *load.FEATURES))
        cls.opened.append(cls())
        return cls.opened[-1]

    async def model_info(self) -> Any:
        return SimpleNamespace(vocab_size=11)

    async def health(self) -> Any:
        return SimpleNamespace(state="ready")

    async def wait_ready(self, timeout_s: float) -> None:
        assert timeout_s == load.READY_TIMEOUT_S

    async def close(self) -> None:
        self.closed = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

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
    assert (result.answered, result.errors) == (15, {"refused: overloaded: full": 5})
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


@pytest.mark.parametrize("loop", [{}, {"concurrency": 1, "rate": 1.0}])
def test_contradicting_settings_are_refused(loop: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="one of concurrency, rate and trace"):
        LoadSettings(rpc="unix:/nowhere", requests=1, **loop)


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
    assert "1 refused: overloaded: full" in table


def _parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return parser.parse_args(["--rpc", "unix:/nowhere", *words])


def test_command_writes_settings_and_raw_samples(
    clients: list[ScriptedClient], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "load.json"
    assert load.run(_parse("--requests", "8", "--json", str(path))) == 1  # two were refused
    assert "time to first token" in capsys.readouterr().out
    report = msgspec.json.decode(path.read_bytes())
    assert report["benchmark"] == "load"
    assert report["settings"]["concurrency"] == 8
    assert report["settings"]["rate"] is None
    assert len(report["results"]["samples"]) == 8
    assert report["machine"]["cores"] >= 1
    assert "msgspec" in report["versions"]
    assert load.run(_parse("--requests", "3")) == 0


def test_options_are_the_settings() -> None:
    words = "--requests 3 --rate 2.5 --connections 2 --input-tokens 9 --shared-tokens 4 --output-tokens 5 --seed 6"
    given = load.LoadSettings(
        rpc="unix:/nowhere",
        requests=3,
        rate=2.5,
        connections=2,
        input_tokens=9,
        shared_tokens=4,
        output_tokens=5,
        temperature=0.5,
        seed=6,
    )
    assert settings_of(_parse(*words.split(), "--temperature", "0.5")) == given
    given = load.LoadSettings(rpc="unix:/nowhere", requests=100, concurrency=3, prompt="Hi")
    assert settings_of(_parse("--concurrency", "3", "--prompt", "Hi")) == given


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
        ("--shared-tokens", "-1"),
        ("--temperature", "inf"),
        ("--prompt", "caf\udce9"),
        ("--seed", "-1"),
        ("--seed", "x"),
        ("--seed", str(2**63)),
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


# --- how answers end ---------------------------------------------------------------------------------------


class Answer:
    """An answer of a server that says how it ended: the deltas, then `final`, or an error."""

    def __init__(self, finish: str, tokens: int, message: str) -> None:
        self._finish, self._tokens, self._message = finish, tokens, message

    @property
    def final(self) -> Final:
        end = SampleEnd(sample=0, finish_reason=self._finish, output_tokens=self._tokens, message=self._message)
        ends = [] if self._finish == "no sample" else [end]
        usage = Usage(prompt_tokens=1, output_tokens=self._tokens, cached_tokens=0)
        return Final(stream=0, samples=ends, usage=usage, timings=Timings(0.0, 0.0, 0.0, 0.0), seed=0)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        for _ in range(self._tokens):
            yield Delta(stream=0, token_ids=[5])
        if self._finish in ("refused", "broken"):
            raise {"refused": InvalidRequest, "broken": CoreFailed}[self._finish](self._message)


class EndingClient(ScriptedClient):
    """Answers the requests as `endings` says: finish reason, tokens, message."""

    endings: list[tuple[str, int, str]]
    vocab_size = 11

    async def model_info(self) -> Any:
        return SimpleNamespace(vocab_size=self.vocab_size, max_model_len=40)

    def generate(self, **request: Any) -> Any:
        self.requests.append(request)
        return Answer(*self.endings[len(self.requests) - 1])


def _end(monkeypatch: pytest.MonkeyPatch, *endings: tuple[str, int, str], **settings: Any) -> Any:
    monkeypatch.setattr(ScriptedClient, "opened", [], raising=False)
    monkeypatch.setattr(EndingClient, "endings", endings, raising=False)
    given = {"requests": len(endings), "concurrency": 1, "output_tokens": 4, **settings}
    return asyncio.run(run_load(LoadSettings(rpc="unix:/nowhere", **given), EndingClient.connect))


def test_only_what_came_to_its_end_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _end(
        monkeypatch,
        ("length", 4, ""),
        ("failed", 0, "not finite"),
        ("failed", 2, "not finite"),
        ("deadline", 3, ""),
        ("cancelled", 1, ""),
        ("stop", 3, ""),
        ("length", 0, ""),
        ("refused", 0, "no room"),
        ("broken", 2, "the core died"),
    )
    counts = (result.answered, result.refused, result.failed, result.deadline, result.short, result.unsent)
    assert counts == (2, 1, 5, 1, 1, 0)
    assert result.errors == {
        "failed: not finite": 2,
        "deadline": 1,
        "failed: cancelled": 1,
        "failed: the answer holds no token": 1,
        "refused: invalid_request: no room": 1,
        "failed: core_failed: the core died": 1,
    }
    assert result.requests_per_s == pytest.approx(2 / result.elapsed_s)
    assert result.output_tokens_per_s == pytest.approx(7 / result.elapsed_s)
    assert result.end_to_end_s.count == result.time_to_first_token_s.count == 2
    lines = result_table(result).splitlines()
    header = next(index for index, line in enumerate(lines) if line.startswith("requests"))
    assert lines[header].split() == ["requests", "answered", "refused", "failed", "deadline", "short"]
    assert lines[header + 1].split() == ["2", "1", "5", "1", "1"]
    assert lines[header + 2].startswith("2 answered in ")
    assert lines[header + 3] == "1 that stopped early: 3 tokens instead of 4"
    assert {"2 failed: not finite", "1 deadline", "1 refused: invalid_request: no room"} <= set(lines)


def test_an_answer_without_a_sample_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _end(monkeypatch, ("length", 4, ""), ("no sample", 4, ""))
    assert (result.answered, result.errors) == (1, {"failed: the answer holds no sample": 1})


def test_a_server_without_a_vocabulary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EndingClient, "vocab_size", 0)
    with pytest.raises(ConfigError, match=r"vocab_size must be at least 1 .*unix:/nowhere.*, got 0"):
        _end(monkeypatch, ("length", 4, ""))


def test_answers_that_were_cut_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _end(monkeypatch, ("length", 4, ""), ("length", 8, ""), ("length", 16, ""), output_tokens=16)
    assert (result.answered, result.short, result.errors) == (3, 2, {})
    assert result_table(result).splitlines()[-1] == (
        "2 cut to what max_model_len 40 leaves: 4-8 tokens instead of 16"
    )
    whole = _end(monkeypatch, ("length", 16, ""), output_tokens=16)
    assert whole.short == 0
    assert "instead of" not in result_table(whole)


def test_failed_requests_complete_nothing_in_the_steady_time(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [
        RequestSample(0.0, 0.0, [end], [4], end, *(("failed", "x", "failed") if end % 2 else ()))
        for end in map(float, range(1, 13))
    ]
    steady = steady_load(summarise_load(samples, 12.0), 1)
    assert [sample.end_s for sample in steady.samples] == [4.0, 6.0, 8.0, 10.0]
    assert (steady.answered, steady.failed) == (4, 0)
    assert steady.requests_per_s == pytest.approx(4 / 8)
    with pytest.raises(ValueError, match="6 answers, and 3 are left out"):
        steady_load(summarise_load(samples, 12.0), 3)


@pytest.mark.parametrize("loop", [{"concurrency": 2}, {"concurrency": None, "rate": 1e9}])
def test_nothing_is_sent_once_the_connection_is_lost(monkeypatch: pytest.MonkeyPatch, loop: dict[str, Any]) -> None:
    class Dying(EndingClient):
        async def generate(self, **request: Any) -> AsyncIterator[Delta]:
            self.requests.append(request)
            if len(self.requests) > 3:
                raise ConnectionLost("gone")
            yield Delta(stream=0, token_ids=[5])

        async def model_info(self) -> Any:
            if len(self.requests) > 3:
                raise ConnectionLost("gone")
            await asyncio.sleep(0)
            return SimpleNamespace(vocab_size=11)

    monkeypatch.setattr(ScriptedClient, "opened", [], raising=False)
    settings = LoadSettings(rpc="unix:/nowhere", requests=100_000, output_tokens=1, **loop)
    result = asyncio.run(run_load(settings, Dying.connect))
    assert result.answered == 3
    assert 1 <= result.failed < 2000
    assert result.unsent == 100_000 - 3 - result.failed
    lines = result_table(result).splitlines()
    assert f"{result.failed} failed: connection_lost: gone" in lines
    assert lines[-1] == f"{result.unsent} not sent: the connection was lost"


def test_a_request_that_lost_its_own_connection_ends_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other engines' clients open one for each request."""

    class Flaky(EndingClient):
        async def generate(self, **request: Any) -> AsyncIterator[Delta]:
            self.requests.append(request)
            if len(self.requests) == 2:
                raise ConnectionLost("status 503: full")
            yield Delta(stream=0, token_ids=[5])

    monkeypatch.setattr(ScriptedClient, "opened", [], raising=False)
    settings = LoadSettings(rpc="unix:/nowhere", requests=5, concurrency=1, output_tokens=1)
    result = asyncio.run(run_load(settings, Flaky.connect))
    assert (result.answered, result.failed, result.unsent) == (4, 1, 0)


def test_prompts_that_fill_the_context_are_refused_before_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"input_tokens must be at most 39 .*, got 40"):
        _end(monkeypatch, ("length", 4, ""), input_tokens=40)
    assert _end(monkeypatch, ("length", 4, ""), input_tokens=39).answered == 1


def test_seeds_stay_within_what_a_server_takes(clients: list[ScriptedClient]) -> None:
    assert MAX_SEED == validate.MAX_SEED
    settings = LoadSettings(rpc="unix:/nowhere", requests=3, concurrency=1, seed=MAX_SEED - 1)
    asyncio.run(run_load(settings))
    assert [request["seed"] for request in clients[0].requests] == [MAX_SEED - 1, MAX_SEED, 0]


# --- before the load ---------------------------------------------------------------------------------------


def test_a_load_waits_until_the_server_is_ready(
    clients: list[ScriptedClient], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def health(self: ScriptedClient) -> Any:
        return SimpleNamespace(state="loading")

    async def wait_ready(self: ScriptedClient, timeout_s: float) -> None:
        assert len(clients) == 1, "a request before the server is ready"

    monkeypatch.setattr(ScriptedClient, "health", health)
    monkeypatch.setattr(ScriptedClient, "wait_ready", wait_ready)
    assert load.run(_parse("--requests", "3")) == 0
    assert capsys.readouterr().err == "waiting: the server at unix:/nowhere loads its model\n"
    assert all(client.closed for client in clients)


def test_a_server_that_takes_no_requests_is_not_loaded(
    clients: list[ScriptedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wait_ready(self: ScriptedClient, timeout_s: float) -> None:
        raise Draining("the server drains")

    monkeypatch.setattr(ScriptedClient, "wait_ready", wait_ready)
    with pytest.raises(Draining):
        load.run(_parse("--requests", "3"))
    assert [client.closed for client in clients] == [True]
