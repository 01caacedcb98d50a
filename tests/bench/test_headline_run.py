"""The headline in miniature: through real servers of tiny checkpoints, on simulated cards, and scripted."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cierzo.bench import machine
from cierzo.bench.campaign.loop import Run
from cierzo.bench.campaign.store import CEILINGS, Store
from cierzo.bench.headline import __main__ as command
from cierzo.bench.headline.cells import GPU_PLAN, Cell, K, Plan, Subject
from cierzo.bench.headline.engines import Simulation, layouts, simulate, simulated_config
from cierzo.bench.headline.measurement import Measurement
from cierzo.bench.headline.outcome import outcome_of, panels
from cierzo.bench.machine import Ceiling, Ceilings
from cierzo.bench.peers.engine import find_checkpoint
from cierzo.engine.cost.cards import find_device, named
from cierzo.engine.cost.step_model import StepModel
from cierzo.engine.cost.work import StepShape

SMALL4 = Subject(model="small4", weights="nvfp4", kv_dtype="fp8")
SMALL3 = Subject(model="small3", weights="bf16", kv_dtype="fp8")
MODELS = {"small4": "small4", "small3": "small3"}
IDENTITY = {"commit": "abc", "device": "a card", "small4": "one", "small3": "other"}
SHORT = Cell("latency", 64, 16, 2)
GPU = Plan(
    cells=(Cell("throughput", 2 * K, 16), SHORT),
    subjects=(SMALL4, SMALL3),
    pairs=((SMALL4, SMALL3),),
    goals={("2k/16", SMALL4, SMALL3): 3.0, ("64/16@2", SMALL4, SMALL3): 0.6},
    goals_are_for="a test",
)
BOTH = Subject("small4", "bf16", "bf16"), Subject("small3", "bf16", "bf16")
CPU = Plan(
    cells=(Cell("throughput", 32, 8, 4), Cell("latency", 32, 8, 1)),
    subjects=BOTH,
    pairs=(BOTH,),
    goals={("32/8@4", *BOTH): 2.2, ("32/8@1", *BOTH): 0.6},
    goals_are_for="a test",
)
FOUND = Ceilings(
    threads=2,
    read=Ceiling(rate=40.0, reached_by="test"),
    bf16=Ceiling(rate=400.0, reached_by="test"),
    float32=Ceiling(rate=200.0, reached_by="test"),
    int8=None,
)


class Record(msgspec.Struct):
    """A sample of a cell, typed."""

    cell: str
    subject: str
    result: Measurement

    @property
    def is_throughput(self) -> bool:
        return "throughput" in self.cell

    @property
    def is_small4(self) -> bool:
        return self.subject.startswith("small4")


class Main:
    """`main` with short plans, one round, and its folders in one place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *words: str) -> int:
        """The exit status."""
        places = ["--folder", str(self.folder), "--output", str(self.folder / "out"), "--commit", "abc"]
        return command.main([*places, "--checkpoint-folder", str(self.folder), "--rounds", "1", *words])

    def samples(self, name: str) -> Path:
        """The file of samples."""
        return self.folder / f"{name}-abc.jsonl"

    def records(self, name: str) -> list[Record]:
        """The cells of a file."""
        lines = self.samples(name).read_bytes().splitlines()[1:]
        return [msgspec.json.decode(line, type=Record) for line in lines if json.loads(line)["cell"] != CEILINGS]

    def outcome(self, name: str) -> dict[str, Any]:
        """The results in the JSON."""
        report: dict[str, Any] = json.loads((self.folder / "out" / f"{name}.json").read_bytes())
        assert report["benchmark"] == "headline"
        assert report["versions"]["msgspec"]
        return dict(report["results"])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    """A place of its own."""
    monkeypatch.setattr(command, "CPU_PLAN", CPU)
    monkeypatch.setattr(command, "GPU_PLAN", GPU)
    return Main(tmp_path)


def _check_outcome(outcome: dict[str, Any], table: str, records: list[Record]) -> None:
    """Table and JSON say what the records say."""
    assert len(outcome["rows"]) == len(records) == 4
    for row, record in zip(outcome["rows"], sorted(records, key=_by_cell), strict=True):
        assert row["result"]["samples"] == []
        assert record.result.samples
        steps = record.result.steps
        assert steps is not None
        assert steps.limit_requests_per_s > 0
        assert (steps.distinct_experts > 0) == record.is_small4
        assert f"{row['values'][0]:.4g}" in table
    small4, small3, *_ = [row["values"][0] for row in outcome["rows"]]
    assert outcome["ratios"][0]["ratio"] == pytest.approx(small4 / small3)
    assert f"{small4 / small3:.2f}x" in table
    assert sum(ratio["met"] is not None for ratio in outcome["ratios"]) == 2
    assert "met" in table
    assert f"commit {outcome['identity']['commit']}" in table


def _by_cell(record: Record) -> tuple[bool, bool]:
    return not record.is_throughput, not record.is_small4


@pytest.mark.timeout(240)
def test_real_servers(run: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "measure_apart", lambda: FOUND)
    for name in ("small4", "small3"):
        find_checkpoint(name, run.folder, "tiny").rename(run.folder / name)
    assert run() == 0
    table = (run.folder / "out/headline-cpu.txt").read_text(encoding="utf-8")
    records = run.records("headline-cpu")
    outcome = run.outcome("headline-cpu")
    _check_outcome(outcome, table, records)
    assert outcome["ceilings"] == [msgspec.to_builtins(FOUND)] * 2  # of each profile's engines
    assert "SIMULATION" not in table
    assert "40.0 GB/s read, 400 GFLOP/s in bf16" in table
    assert [record.is_small4 for record in records if record.is_throughput] == [True, False]
    for record in records:
        result = record.result
        assert len(result.samples) == result.requests
        assert all(tokens == 8 for *_, tokens in result.samples)
        assert f"--profile={'throughput' if record.is_throughput else 'latency'}" in result.command
        assert result.command.startswith("python -m cierzo serve small")
        assert (result.experts is not None) == record.is_small4
        if result.experts is not None:  # of this load alone, neither of the warm-up nor of the cell before
            assert result.experts.tokens == result.requests * (32 + 8 - 1)
    capsys.readouterr()
    assert run() == 0  # everything is there
    assert "round" not in capsys.readouterr().out.partition("commit abc")[0]
    assert len(run.records("headline-cpu")) == len(records)
    run.samples("headline-cpu").unlink()
    assert run("--report") == 0  # from the JSON alone
    assert table.partition("small4:")[2] in capsys.readouterr().out
    assert not run.samples("headline-cpu").exists()
    (run.folder / "out" / "headline-cpu.json").unlink()
    assert run("--report") == 2
    assert "nothing was measured: there is no " in capsys.readouterr().err
    assert not (run.folder / "out" / "headline-cpu.json").exists()


def test_a_simulation(run: Main, capsys: pytest.CaptureFixture[str]) -> None:
    name = "headline-simulated-h200"
    assert run("--device", "simulated:h200", "--cells", "64/16@2") == 0
    assert len(run.records(name)) == 2
    assert run("--device", "simulated:h200", "--cells", "64/16@2", "--weights", "bf16") == 0  # one side alone
    assert [len(run.outcome(name)[part]) for part in ("rows", "ratios")] == [1, 0]
    assert run("--device", "simulated:h200") == 0  # goes on
    records = run.records(name)
    table = (run.folder / "out" / f"{name}.txt").read_text(encoding="utf-8")
    _check_outcome(run.outcome(name), table, records)
    assert table.startswith("SIMULATION")
    assert "shares of its rates: predicted from the machine code of Triton 3.6" in table
    assert "goals, set for a test: " in table
    assert "at least 3.00x" in table
    for record in records:
        found = record.result
        assert found.steps is not None
        assert 0.1 < found.requests_per_s / found.steps.limit_requests_per_s < 1.0
        if record.is_throughput:
            measured = [point for point in found.points if point.measured]
            assert len(measured) < len(found.points)
            assert found.concurrency in [point.concurrency for point in measured]
            assert found.time_per_output_token_s.p50 <= 0.050
            assert found.requests_per_s == max(
                point.requests_per_s for point in measured if point.time_per_output_token_s <= 0.050
            )
    capsys.readouterr()
    again = ["--device", "simulated:h200", "--samples", str(run.samples(name))]
    for words, told in (
        (["--commit", "other"], "samples of commit '"),
        (["--device", "simulated:h100"], "samples of device 'simulated:h200"),
        (["--small3", str(_tiny(run.folder))], "samples of small3 'small3 at true size"),
    ):
        assert run(*again, *words) == 2
        assert told in capsys.readouterr().err
    assert run("--device", "simulated:h200", "--cells", "nonesuch") == 2
    assert run("--device", "simulated:h200", "--weights", "nvfp4,int3") == 2
    assert run("--device", "gpu") == 2
    assert run("--device", "cuda", "--small4", "here") == 2
    errors = capsys.readouterr().err
    assert "unknown cells: nonesuch; known: 2k/16, 64/16@2" in errors
    assert "unknown weights: int3; known: nvfp4, bf16" in errors


def _tiny(folder: Path) -> Path:
    """What tells one checkpoint from another, and no more."""
    target = folder / "other"
    target.mkdir()
    (target / "config.json").write_text("{}", encoding="utf-8")
    return target


def test_a_cell_that_fails_leaves_the_others_and_says_why(run: Main, capsys: pytest.CaptureFixture[str]) -> None:
    """Small 4 in 4 bits takes 68 GB, Small 3 in bf16 47."""
    device = msgspec.structs.replace(_h200(), name="small", memory_bytes=60_000_000_000)
    path = run.folder / "small.json"
    path.write_bytes(msgspec.json.encode(device))
    assert run("--device", f"simulated:{path}") == 1
    outcome = run.outcome("headline-simulated-small")
    errors = {row["subject"]["model"]: row["error"] for row in outcome["rows"]}
    assert "nothing is left for the KV cache" in errors["small4"]
    assert errors["small3"] == ""
    assert [(ratio["goal"], ratio["met"]) for ratio in outcome["ratios"]] == [(3.0, None), (0.6, None)]
    told = capsys.readouterr().out
    assert told.count("NOT MEASURED: one engine on one card:") == 2
    assert "not measured" in told


def _h200() -> Any:
    return named("h200")


def test_steps_are_those_of_the_roofline(tmp_path: Path) -> None:
    """One client: each request is a prompt's step and 15 of one token, whose bytes and operations are known."""
    cell = msgspec.structs.replace(SHORT, concurrency=1)
    config = simulated_config("small4", cell, SMALL4, _h200(), tmp_path)
    found = simulate(config, cell, 1)
    shapes = [StepShape(expanded_tokens=64.0, expanded_pairs=64 * 65 / 2, expanded_context=64.0, sampled=1.0)]
    shapes += [
        StepShape(absorbed_tokens=1.0, absorbed_pairs=n, absorbed_context=n, sampled=1.0) for n in range(65, 80)
    ]
    model = StepModel(config, _h200())
    each = [model.time(shape, rows=1.0) for shape in shapes]
    requests = len(found.samples) - 2  # from the end of the first to that of the last but one
    steps = found.steps
    assert steps is not None
    assert steps.running == 1
    limit_s = sum(float(np.sum(one.limit_s)) for one in each)
    assert steps.limit_requests_per_s == pytest.approx(1 / limit_s)
    assert steps.num_bytes * 16 == pytest.approx(sum(float(np.sum(one.num_bytes)) for one in each))
    ends = sorted(last_s for _, _, last_s, _ in found.samples)
    assert ends[-2] - ends[0] == pytest.approx(requests * sum(float(np.sum(one.total_s)) for one in each))


def _measure(device: Any, folder: Path, cell: Cell, subject: Subject = SMALL3) -> Measurement:
    simulation = Simulation(GPU_PLAN, device, MODELS, folder)
    found = simulation.open(simulation.blocks[0], subject).measure(cell, 0)
    return msgspec.convert(found, Measurement)


def test_several_cards_are_one_engine_or_a_replica_each(tmp_path: Path) -> None:
    device = find_device("2xh200")
    assert layouts(device) == [(1, device), (2, _h200())]
    own = msgspec.structs.replace(device, name="own", bytes_per_s=1e12)
    _, (_, single) = layouts(own)
    assert (single.bytes_per_s, single.cards) == (1e12, 1)
    found = _measure(device, tmp_path, SHORT)
    (loser,) = found.others
    assert float(loser.removesuffix(" s").rpartition(": ")[2]) > found.completion_s.p50
    fours = msgspec.structs.replace(SHORT, concurrency=4)
    apart_only = msgspec.structs.replace(device, link_bytes_per_s=2e7)  # exchanges take most of a step
    replicas = _measure(apart_only, tmp_path, fours)
    alone = _measure(_h200(), tmp_path, SHORT)
    assert (replicas.layout, replicas.replicas, replicas.concurrency) == ("2 engines of one card", 2, 4)
    assert replicas.requests_per_s == pytest.approx(2 * alone.requests_per_s, rel=0.2)
    assert replicas.completion_s.p50 == pytest.approx(alone.completion_s.p50, rel=0.2)
    one = _measure(apart_only, tmp_path, msgspec.structs.replace(SHORT, concurrency=1))
    assert (one.layout, one.replicas, one.concurrency) == ("2 engines of one card", 1, 1)
    searched = _measure(apart_only, tmp_path, Cell("throughput", 2048, 16))
    assert searched.others[0].startswith("one engine on 2 cards: ")
    points = {point.concurrency: point.requests_per_s for point in searched.points if point.measured}
    assert searched.requests_per_s == points[searched.concurrency] > float(searched.others[0].split()[5])
    fp8 = Subject(model="small4", weights="fp8", kv_dtype="fp8")
    cards = _measure(find_device("2xh100"), tmp_path, SHORT, fp8)
    assert cards.layout == "one engine on 2 cards"
    assert "2 engines of one card: the GPU has 74.5 GiB free" in cards.others[0]


def test_a_machine_s_ceilings_are_a_device_without_slack() -> None:
    device = machine.limit_device(FOUND)
    assert device.bytes_per_s == 40e9
    assert device.operations_per_s == {"bf16": 400e9, "fp32": 200e9, "int8": 400e9}
    assert set(device.stated.values()) == {1.0}
    assert device.step_overhead_s == 0


def test_the_picture_has_every_curve(run: Main) -> None:
    pytest.importorskip("matplotlib")
    assert run("--device", "simulated:h200") == 0
    png = run.folder / "out/headline-simulated-h200.png"
    assert png.read_bytes().startswith(b"\x89PNG")


def test_panels_are_of_one_length_of_requests(tmp_path: Path) -> None:
    store = Store(tmp_path / "samples.jsonl", IDENTITY)
    cells = tuple(Cell(profile, 64, 16, n) for profile in ("throughput", "latency") for n in (4, 1))
    plan = msgspec.structs.replace(GPU, cells=cells, subjects=(SMALL3,))
    Run(Simulation(plan, _h200(), MODELS, tmp_path), store, functools.partial(print, end="")).measure(1)
    found = panels(outcome_of(plan, store).rows)
    assert [[(row.cell.profile, row.cell.concurrency) for row in panel] for panel in found] == [
        [("throughput", 4), ("throughput", 1)],
        [("latency", 4), ("latency", 1)],
    ]
