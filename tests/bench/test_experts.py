"""The experts' bench: what runs is what is counted, and prompts that are none are named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from cierzo.bench import experts
from cierzo.bench.experts import ExpertsSettings, read_prompts, run_traffic, tables
from cierzo.cli import main
from cierzo.engine.errors import ConfigError, InvalidRequest
from cierzo.engine.expert_statistics import ExpertStatistics, StepBucket
from cierzo.engine.messages import CoreStats, Stats
from cierzo.engine.weights.make import make_checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("experts")
    return {like: str(make_checkpoint(folder / like, like=like, scale="tiny")) for like in ("small4", "small3")}


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_prompts_of_a_file_are_run_as_often_as_asked_and_reported(
    checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write(tmp_path, "prompts.jsonl", b"[5, 6, 7]\n[9, 9, 4, 2, 11]\n")
    report = tmp_path / "report.json"
    words = ["--prompts", str(prompts), "--requests", "3", "--output-tokens", "4", "--concurrency", "1"]
    assert main(["bench", "experts", checkpoints["small4"], *words, "--json", str(report)]) == 0
    written = json.loads(report.read_text(encoding="utf-8"))
    statistics = msgspec.convert(written["results"], ExpertStatistics)
    # the last token of an answer is not computed; one at a time, each prompt is one step
    assert [(b.most_tokens, b.steps, b.tokens) for b in statistics.decode] == [(1, 9, 9)]
    assert [(b.most_tokens, b.steps, b.tokens) for b in statistics.prefill] == [(4, 2, 6), (8, 1, 5)]
    assert {sum(counts) for counts in statistics.expert_tokens} == {20 * statistics.top_k}
    assert written["settings"]["prompts"] == str(prompts)
    printed = capsys.readouterr().out
    assert "20 tokens, 4 of 16 experts each, 3 MoE layers" in printed
    assert len(re.findall(r"^\d +4\.0 ", printed, re.MULTILINE)) == 3  # a token's step: top_k experts, each layer


def test_random_prompts_are_drawn_from_the_seed(checkpoints: dict[str, str]) -> None:
    settings = ExpertsSettings(checkpoint=checkpoints["small4"], requests=3, input_tokens=6, output_tokens=2)
    once, again = run_traffic(settings), run_traffic(settings)
    assert once == again
    assert once.tokens == 3 * 7
    assert run_traffic(msgspec.structs.replace(settings, seed=9)) != once


def test_a_model_without_experts_is_refused_by_name(
    checkpoints: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "experts", checkpoints["small3"]]) == 2
    assert "small3 (mistral) has no experts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\n\xff\xfe\n", "line 2: 'utf-8' codec can't decode"),
        ("a.txt", b"", "has no lines"),
        ("a.jsonl", b'"fine"\n[1]\n{"text": "x"}\n', "line 3: Expected `str | array`, got `object`"),
        ("a.jsonl", b"[1, 2]\n\n[1, true]\n", "line 3: Expected `int`, got `bool`"),
        ("a.jsonl", b"[1, 2]\n[1,\n", "line 2: Input data was truncated"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_prompts(path)
    assert str(path) in caught.value.message
    assert caught.value.field == "prompts"


def test_text_and_token_ids_are_read_as_they_are(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, "a.txt", b" [1]\r\n\r\n\xc3\xa9\n")) == [" [1]", "\xe9"]
    assert read_prompts(write(tmp_path, "a.jsonl", b'"[1]"\n[1]')) == ["[1]", [1]]


def test_a_file_that_cannot_be_read_and_ids_that_are_no_tokens(checkpoints: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts .*nowhere\.txt: .*No such file"):
        read_prompts(tmp_path / "nowhere.txt")
    wrong = {"[1, -1]": "token_ids holds token id -1, outside", "[]": "the prompt is empty"}
    for line, why in wrong.items():
        path = write(tmp_path, "a.jsonl", f"[1]\n{line}\n".encode())
        with pytest.raises(InvalidRequest, match=f"prompt 1: {why}"):
            run_traffic(ExpertsSettings(checkpoint=checkpoints["small4"], prompts=str(path)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rpc", "unix:/x", "--requests", "3"], "requests is for a CHECKPOINT"),
        (["folder", "--requests", "0"], "--requests: must be an integer of at least 1, got '0'"),
        (["folder", "--concurrency", "-2"], "--concurrency: must be an integer of at least 1"),
        (
            ["folder", "--prompts", "x", "--input-tokens", "3"],
            "--input-tokens: not allowed with argument --prompts",
        ),
    ],
)
def test_options_that_contradict_each_other(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "experts", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_running_server_is_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    buckets = [StepBucket(most_tokens=2, steps=4, tokens=8, distinct=[12])]
    told = ExpertStatistics(
        layers=[5], num_experts=4, top_k=2, expert_tokens=[[8, 6, 2, 0]], decode=buckets, prefill=[]
    )

    class Server:
        def __init__(self, address: str) -> None:
            assert address == "unix:/x"

        def __enter__(self) -> Server:
            return self

        def __exit__(self, *exc_info: object) -> None:
            pass

        def wait_ready(self) -> None:
            self.asked = 0

        def stats(self) -> Stats:
            """A core that is ready tells its figures a moment later."""
            self.asked += 1
            core = CoreStats(total_blocks=8, experts=told) if self.asked > 1 else CoreStats()
            return Stats(
                stream=1,
                device="cpu",
                connections=1,
                streams=0,
                accepted=4,
                refused=0,
                finished=4,
                core_restarts=0,
                core=core,
            )

    monkeypatch.setattr(experts, "SyncClient", Server)
    assert main(["bench", "experts", "--rpc", "unix:/x"]) == 0
    printed = capsys.readouterr().out
    assert "prefill  0 steps\n" in printed
    (row,) = re.findall(r"^5 .*$", printed, re.MULTILINE)
    # imbalance 8 / 4; entropy of 8, 6, 2 of 16 is 1.41 of 2 bits
    assert " ".join(row.split()) == "5 3.0 - 2.0 0.703 0 (100.0%) 1 (75.0%) 2 (25.0%) 3 (0.0%)"
    # of independent tokens 1 + (1 - 1/4^2) + (1 - 3/4^2) + 0; of uniform ones 4 (1 - 1/2^2)
    assert re.search(r"^decode +2\.0 +4 +3\.0 +2\.4 +3\.0$", printed, re.MULTILINE)
    told = msgspec.structs.replace(told, expert_tokens=[[0] * 4], decode=[])
    assert main(["bench", "experts", "--rpc", "unix:/x"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "cierzo: config_error: the server has counted no step yet\n")
    told = None
    assert main(["bench", "experts", "--rpc", "unix:/x"]) == 2
    assert "without --expert-statistics" in capsys.readouterr().err


def test_tables_of_nothing() -> None:
    nothing = ExpertStatistics(layers=[0], num_experts=4, top_k=2, expert_tokens=[[0] * 4], decode=[], prefill=[])
    assert "0 tokens" in tables(nothing)
