"""The order of a run, and that it goes on where it stopped: engines are scripted, nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cierzo.bench.machine import Ceiling, Ceilings
from cierzo.bench.peers import agreement, ceilings
from cierzo.bench.peers.__main__ import main
from cierzo.bench.peers.cells import AGREEMENT, LOAD, MEMORY, Cell
from cierzo.bench.peers.engine import Checkpoint, Engine, EngineFailed, Logprobs, Measured
from cierzo.bench.peers.outcome import write_outcome
from cierzo.bench.peers.run import Plan, Run
from cierzo.bench.peers.samples import Samples

PREFILL = Cell(name="prefill-8", kind="prefill", unit="tok/s", prompt_tokens=8)
DECODE = Cell(name="decode-2", kind="decode", unit="tok/s", batch=2, prompt_tokens=8, new_tokens=4)
SERVED = Cell(name="served", kind="served", unit="req/s", batch=2, requests=2, prompt_tokens=8, new_tokens=4)
VOCAB_SIZE = 50
Figure = Callable[[str, Cell], float]


class ScriptedOffline:
    """An engine that answers from a function, and writes down what it was asked."""

    def __init__(self, name: str, diary: list[str], figure: Figure) -> None:
        self.command = f"run {name}"
        self.load_s: float | None = 1.5
        self._name, self._diary, self._figure = name, diary, figure
        diary.append(f"open {name}")

    def measure(self, cell: Cell, seed: int) -> Measured:
        self._diary.append(f"{self._name} {cell.name}")
        return Measured(self._figure(self._name, cell), [seed])

    def top_logprobs(self, sequences: list[list[int]], count: int) -> Logprobs:
        self._diary.append(f"{self._name} agreement")
        return [[[(token % VOCAB_SIZE, 0.0)] * count for token in sequence] for sequence in sequences]

    def peak_memory_gb(self) -> float:
        return 2.5

    def close(self) -> None:
        self._diary.append(f"close {self._name}")


class ScriptedPeer:
    """Two engines without servers."""

    engines: tuple[Engine, ...] = ()

    def __init__(self, figure: Figure) -> None:
        self.diary: list[str] = []
        self.figure = figure

    def offline(self, engine: Engine, checkpoint: Checkpoint, folder: Path) -> ScriptedOffline:
        return ScriptedOffline(engine.name, self.diary, self.figure)

    def server(self, engine: Engine, checkpoint: Checkpoint, folder: Path) -> None:
        self.diary.append(f"server of {engine.name}")


def _engine(name: str, peer: str) -> Engine:
    return Engine(name=name, peer=peer, number_format="bf16", weight_bits=16, setting="")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    rate = Ceiling(rate=50.0, reached_by="test")
    found = Ceilings(threads=1, read_one_thread=rate, read=rate, bf16=rate, float32=rate, int8=None)
    monkeypatch.setattr(ceilings, "measure", lambda folder: found)
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = {"vocab_size": VOCAB_SIZE, "model_type": "mistral", "hidden_size": 4, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 1, "head_dim": 4, "num_key_value_heads": 1, "intermediate_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return Plan(
        checkpoints=[Checkpoint("tiny", folder)],
        engines=[_engine("ours", "cierzo"), _engine("theirs", "other")],
        cells=[DECODE, PREFILL],
        rounds=2,
        close_rounds=2,
        folder=tmp_path,
    )


def _run(plan: Plan, peer: ScriptedPeer, commit: str = "abc") -> Samples:
    samples = Samples(plan.folder / "samples.jsonl", commit)
    Run(plan, {"cierzo": peer, "other": peer}, samples, commit, say=lambda _: None).measure()
    return samples


def _ten(name: str, cell: Cell) -> float:
    return 10.0


def test_rounds_alternate_and_engines_follow_each_other(plan: Plan) -> None:
    peer = ScriptedPeer(_ten)
    samples = _run(plan, peer)
    ours = ["open ours", "ours decode-2", "ours prefill-8", "close ours"]
    theirs = ["open theirs", "theirs decode-2", "theirs prefill-8", "close theirs"]
    assert peer.diary == [*ours, *theirs, *theirs, *ours], "one in memory at a time, neither always first"
    assert samples.values("tiny", LOAD, "ours") == {0: 1.5, 1: 1.5}
    assert samples.values("tiny", MEMORY, "theirs") == {0: 2.5, 1: 2.5}


def test_prompts_are_the_same_for_all_engines_and_new_in_each_round(plan: Plan) -> None:
    samples = _run(plan, ScriptedPeer(_ten))
    seeds = {(s.engine, s.cell.name, s.round): s.raw[0] for s in samples if s.cell in (DECODE, PREFILL)}
    assert seeds["ours", "decode-2", 0] == seeds["theirs", "decode-2", 0]
    assert len(set(seeds.values())) == 4


def test_a_second_run_measures_nothing(plan: Plan) -> None:
    _run(plan, ScriptedPeer(_ten))
    again = ScriptedPeer(_ten)
    _run(plan, again)
    assert again.diary == []
    of_another_commit = ScriptedPeer(_ten)
    _run(plan, of_another_commit, "def")
    assert len(of_another_commit.diary) == 16


def test_an_interrupted_run_goes_on_with_the_next_cell(plan: Plan) -> None:
    def interrupted(name: str, cell: Cell) -> float:
        if (name, cell) == ("theirs", PREFILL):
            raise KeyboardInterrupt
        return 10.0

    peer = ScriptedPeer(interrupted)
    with pytest.raises(KeyboardInterrupt):
        _run(plan, peer)
    assert peer.diary[-1] == "close theirs", "no engine is left behind"
    rest = ScriptedPeer(_ten)
    _run(plan, rest)
    assert rest.diary[:3] == ["open theirs", "theirs prefill-8", "close theirs"]


def test_a_failure_leaves_the_other_cells_and_says_why(plan: Plan, tmp_path: Path) -> None:
    def failing(name: str, cell: Cell) -> float:
        if (name, cell) == ("theirs", DECODE):
            raise EngineFailed("out of memory")
        return 10.0

    peer = ScriptedPeer(failing)
    samples = _run(plan, peer)
    assert samples.values("tiny", PREFILL, "theirs") == {0: 10.0, 1: 10.0}
    assert samples.error("tiny", DECODE, "theirs") == "out of memory"
    assert peer.diary.count("open theirs") == 4, "a fresh engine for what is left after a failure"
    complete = write_outcome(plan, samples, tmp_path / "out", command="test", started="now", commit="abc")
    assert not complete
    assert "tiny theirs decode-2: out of memory" in (tmp_path / "out.txt").read_text()
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["settings"]["commit"] == "abc"
    assert len(report["results"]["samples"]) == len(list(samples))


def test_an_engine_that_does_not_start_fails_in_all_its_cells(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_start(*_: Any) -> None:
        raise EngineFailed("not installed")

    peer = ScriptedPeer(_ten)
    monkeypatch.setattr(peer, "offline", no_start)
    samples = _run(plan, peer)
    assert {samples.error("tiny", cell, "ours") for cell in (DECODE, PREFILL)} == {"not installed"}


def test_close_ratios_get_more_rounds_of_both_sides(plan: Plan) -> None:
    """Decoding is 1.1 times as good, prefill 3 times."""

    def figure(name: str, cell: Cell) -> float:
        return {"theirs": 10.0, "ours": 11.0 if cell == DECODE else 30.0}[name]

    peer = ScriptedPeer(figure)
    wanted = msgspec.structs.replace(plan, close_rounds=4)
    samples = _run(wanted, peer)
    for name in ("ours", "theirs"):
        assert sorted(samples.values("tiny", DECODE, name)) == [0, 1, 2, 3]
        assert sorted(samples.values("tiny", PREFILL, name)) == [0, 1]


def test_agreement_is_checked_once(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that the scripted engine repeats are all that the reference has."""
    forced = agreement.sequences(AGREEMENT, VOCAB_SIZE)
    table = np.full((len(forced), AGREEMENT.prompt_tokens, VOCAB_SIZE), -9.0, np.float32)
    for i, sequence in enumerate(forced):
        table[i, np.arange(len(sequence)), sequence] = 0.0
    made: list[str] = []
    monkeypatch.setattr(agreement, "reference", lambda checkpoint, *_: made.append(checkpoint.name) or table)
    peer = ScriptedPeer(_ten)
    wanted = msgspec.structs.replace(plan, cells=[AGREEMENT, DECODE])
    samples = _run(wanted, peer)
    assert samples.values("tiny", AGREEMENT, "ours") == {0: 100.0}
    assert peer.diary.count("ours agreement") == peer.diary.count("theirs agreement") == 1
    assert peer.diary.index("open ours") == 0
    assert made[0] == "tiny", "the reference is made before any engine is loaded"


def test_an_engine_without_a_server_has_no_served_cells(plan: Plan) -> None:
    peer = ScriptedPeer(_ten)
    wanted = msgspec.structs.replace(plan, cells=[SERVED])
    samples = _run(wanted, peer)
    assert peer.diary == ["server of ours", "server of theirs", "server of theirs", "server of ours"]
    assert [s for s in samples if s.engine != "machine"] == []


def test_the_command_line_names_what_it_does_not_know(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--engines", "nonesuch"])
    assert "unknown: nonesuch; known: cierzo-bf16" in capsys.readouterr().err
    assert main(["--checkpoints", str(tmp_path / "nowhere")]) == 2
    assert "is no checkpoint" in capsys.readouterr().err


def test_pictures_need_matplotlib_and_nothing_else_does(plan: Plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    samples = _run(plan, ScriptedPeer(_ten))
    assert write_outcome(plan, samples, tmp_path / "out", command="test", started="now", commit="abc")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
