"""What peers defines of its campaign: scripted engines, nothing is loaded. test_campaign.py has the loop itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cierzo.bench import machine
from cierzo.bench.campaign.loop import Run
from cierzo.bench.campaign.store import Store
from cierzo.bench.machine import Ceiling, Ceilings
from cierzo.bench.peers import agreement
from cierzo.bench.peers.__main__ import main
from cierzo.bench.peers.campaign import Peers
from cierzo.bench.peers.cells import AGREEMENT, LOAD, MEMORY, Cell, Subject
from cierzo.bench.peers.engine import Checkpoint, Engine, EngineFailed, Logprobs, Measured, Session
from cierzo.bench.peers.results import outcome_of, picture, text, values
from cierzo.engine.weights.shapes import shape_of

PREFILL = Cell(name="prefill-8", kind="prefill", unit="tok/s", prompt_tokens=8)
DECODE = Cell(name="decode-2", kind="decode", unit="tok/s", batch=2, prompt_tokens=8, new_tokens=4)
SERVED = Cell(name="served", kind="served", unit="req/s", batch=2, requests=2, prompt_tokens=8, new_tokens=4)
OURS, THEIRS = Subject("tiny", "ours"), Subject("tiny", "theirs")
Figure = Callable[[str, Cell], float]


class ScriptedOffline(Session):
    """An engine that answers from a function, and writes down what it was asked."""

    def __init__(self, name: str, diary: list[str], figure: Figure) -> None:
        self.command = f"run {name}"
        self.load_s = 1.5
        self._name, self._diary, self._figure = name, diary, figure
        diary.append(f"open {name}")

    def measure(self, cell: Cell, seed: int) -> Measured:
        self._diary.append(f"{self._name} {cell.name}")
        return Measured(self._figure(self._name, cell), [seed])

    def top_logprobs(self, sequences: list[list[int]], count: int) -> Logprobs:
        self._diary.append(f"{self._name} agreement")
        return [[[(token, 0.0)] * count for token in sequence] for sequence in sequences]

    def peak_memory_gb(self) -> float:
        return 2.5

    def close(self) -> None:
        self._diary.append(f"close {self._name}")


class ScriptedPeer:
    """Two engines without servers."""

    ENGINES: tuple[Engine, ...] = ()

    def __init__(self, figure: Figure) -> None:
        self.diary: list[str] = []
        self.figure = figure

    def offline(self, engine: Engine, checkpoint: Checkpoint, folder: Path) -> ScriptedOffline:
        return ScriptedOffline(engine.name, self.diary, self.figure)

    def server(self, engine: Engine, checkpoint: Checkpoint, folder: Path) -> None:
        self.diary.append(f"server of {engine.name}")


def _engine(name: str, peer: str) -> Engine:
    return Engine(name=name, peer=peer, number_format="bf16", setting="")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Peers:
    rate = Ceiling(rate=50.0, reached_by="test")
    found = Ceilings(threads=1, read=rate, bf16=rate, float32=rate, int8=None)
    monkeypatch.setattr(machine, "measure_apart", lambda: found)
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape_of("small3", "tiny").config("bfloat16")))
    return Peers(
        checkpoints=[Checkpoint("tiny", folder)],
        engines=[_engine("ours", "cierzo"), _engine("theirs", "other")],
        cells=[DECODE, PREFILL],
        rounds=2,
        folder=tmp_path,
        peers={},
    )


def _run(plan: Peers, peer: ScriptedPeer, rounds: int = 2) -> Store:
    store = Store(plan.folder / "samples.jsonl", {"commit": "abc", "device": "a CPU"})
    Run(replace(plan, peers={"cierzo": peer, "other": peer}), store, say=lambda _: None).measure(rounds)
    return store


def _ten(name: str, cell: Cell) -> float:
    return 10.0


def test_one_engine_is_in_memory_at_a_time(plan: Peers) -> None:
    peer = ScriptedPeer(_ten)
    store = _run(plan, peer)
    ours = ["open ours", "ours decode-2", "ours prefill-8", "close ours"]
    theirs = ["open theirs", "theirs decode-2", "theirs prefill-8", "close theirs"]
    assert peer.diary == [*ours, *theirs, *theirs, *ours]
    assert values(store, LOAD, OURS) == {0: 1.5, 1: 1.5}
    assert values(store, MEMORY, THEIRS) == {0: 2.5, 1: 2.5}
    assert store.measured(DECODE, OURS)[0]["command"] == "run ours"
    assert [one["read"]["rate"] for one in store.ceilings()] == [50.0, 50.0]


def test_prompts_are_the_same_for_all_engines_and_new_in_each_round(plan: Peers) -> None:
    store = _run(plan, ScriptedPeer(_ten))
    seeds = {
        (subject.engine, cell.name, number): result["raw"][0]
        for subject in (OURS, THEIRS)
        for cell in (DECODE, PREFILL)
        for number, result in store.measured(cell, subject).items()
    }
    assert len(seeds) == 8
    assert seeds["ours", "decode-2", 0] == seeds["theirs", "decode-2", 0]
    assert len(set(seeds.values())) == 4


def test_a_failure_is_told_and_not_complete(plan: Peers, tmp_path: Path) -> None:
    def failing(name: str, cell: Cell) -> float:
        if (name, cell) == ("theirs", DECODE):
            raise EngineFailed("out of memory")
        return 10.0

    store = _run(plan, ScriptedPeer(failing))
    assert values(store, PREFILL, THEIRS) == {0: 10.0, 1: 10.0}
    found = outcome_of(plan.checkpoints, plan.engines, plan.cells, store)
    assert [row.error for row in found.rows] == ["", "out of memory", "", ""]
    assert "decode-2, tiny theirs: NOT MEASURED: out of memory" in text(found, "test")
    assert found.identity["commit"] == "abc"
    assert len(found.samples) == len(list(store))


def test_close_ratios_get_more_rounds_of_both_sides(plan: Peers) -> None:
    """Decoding is 1.1 times as good, prefill 3 times."""

    def figure(name: str, cell: Cell) -> float:
        return {"theirs": 10.0, "ours": 11.0 if cell == DECODE else 30.0}[name]

    store = _run(plan, ScriptedPeer(figure), rounds=4)
    for subject in (OURS, THEIRS):
        assert sorted(values(store, DECODE, subject)) == [0, 1, 2, 3]
        assert sorted(values(store, PREFILL, subject)) == [0, 1]


def test_agreement_is_checked_once(plan: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that the scripted engine repeats are all that the reference has."""
    vocab_size = plan.checkpoints[0].vocab_size
    forced = agreement.sequences(AGREEMENT, vocab_size)
    table = np.full((len(forced), AGREEMENT.prompt_tokens, vocab_size), -9.0, np.float32)
    for i, sequence in enumerate(forced):
        table[i, np.arange(len(sequence)), sequence] = 0.0
    peer = ScriptedPeer(_ten)

    def reference(checkpoint: Checkpoint, cell: Cell, folder: Path) -> agreement.Table:
        peer.diary.append("reference")
        return table

    monkeypatch.setattr(agreement, "reference", reference)
    store = _run(replace(plan, cells=[AGREEMENT, DECODE]), peer)
    assert values(store, AGREEMENT, OURS) == {0: 100.0}
    assert peer.diary.count("ours agreement") == peer.diary.count("theirs agreement") == 1
    assert peer.diary[0] == "reference", "it is made before any engine is loaded"


def test_a_reference_that_cannot_be_made_leaves_the_other_cells(
    plan: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_reference(*_: object) -> None:
        raise EngineFailed("not installed")

    monkeypatch.setattr(agreement, "reference", no_reference)
    store = _run(replace(plan, cells=[AGREEMENT, DECODE]), ScriptedPeer(_ten))
    assert store.error(AGREEMENT, OURS) == "not installed"
    assert values(store, DECODE, OURS) == {0: 10.0, 1: 10.0}


def test_an_engine_without_a_server_has_no_served_cells(plan: Peers) -> None:
    peer = ScriptedPeer(_ten)
    wanted = replace(plan, cells=[SERVED])
    store = _run(wanted, peer)
    assert peer.diary == ["server of ours", "server of theirs", "server of theirs", "server of ours"]
    assert {sample.cell for sample in store} == {"ceilings"}


def test_the_command_line_names_what_it_does_not_know(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    places = ["--folder", str(tmp_path), "--checkpoint-folder", str(tmp_path)]
    for option in ("--engines", "--cells"):
        assert main([option, "nonesuch", *places]) == 2
        assert f"unknown {option[2:]}: nonesuch; known: " in capsys.readouterr().err
    assert main(["--checkpoints", str(tmp_path / "nowhere")]) == 2
    assert "is no checkpoint" in capsys.readouterr().err


def test_the_picture_is_drawn(plan: Peers, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    store = _run(plan, ScriptedPeer(_ten))
    picture(outcome_of(plan.checkpoints, plan.engines, plan.cells, store), tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_outcome_of_an_earlier_run_is_told_without_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Path(__file__).resolve().parents[2] / "bench" / "results"
    words = ["--quick", "--report", "--folder", str(tmp_path), "--output", str(results)]
    assert main(words) == 0
    committed = (results / "peers-quick.txt").read_text(encoding="utf-8")
    assert committed.partition("\n")[2] in capsys.readouterr().out
