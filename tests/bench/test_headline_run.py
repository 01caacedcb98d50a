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
from cierzo.bench.headline.__main__ import main
from cierzo.bench.headline.cells import Cell, Plan, Subject, gpu_plan
from cierzo.bench.headline.measurement import Measurement
from cierzo.bench.headline.outcome import outcome_of
from cierzo.bench.headline.plot import panels
from cierzo.bench.headline.simulate import Simulation, layouts, simulate, simulated_config
from cierzo.bench.machine import Ceiling, Ceilings
from cierzo.engine.cost.cards import find_device, named
from cierzo.engine.cost.step_model import step_time
from cierzo.engine.cost.weights import NumberFormats
from cierzo.engine.cost.work import StepShape, step_work

SMALL4 = Subject(model="small4", weights="nvfp4", kv_dtype="fp8")
SMALL3 = Subject(model="small3", weights="bf16", kv_dtype="fp8")
MODELS = {"small4": "small4", "small3": "small3"}
IDENTITY = {"commit": "abc", "device": "a card", "small4": "one", "small3": "other"}
SHORT = Cell(name="64/16@2", profile="latency", input_tokens=64, output_tokens=16, concurrency=2)
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
    """`main` with its folders in one place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *words: str) -> int:
        """The exit status."""
        places = ["--folder", str(self.folder), "--output", str(self.folder / "out")]
        return main([*words, "--miniature", "--checkpoint-folder", str(self.folder), *places])

    def records(self, name: str) -> list[Record]:
        """The cells of a file."""
        lines = (self.folder / f"{name}.jsonl").read_bytes().splitlines()[1:]
        return [msgspec.json.decode(line, type=Record) for line in lines if json.loads(line)["cell"] != CEILINGS]

    def outcome(self, name: str) -> dict[str, Any]:
        """The results in the JSON."""
        report: dict[str, Any] = json.loads((self.folder / "out" / f"{name}.json").read_bytes())
        assert report["versions"]["msgspec"]
        return dict(report["results"])


@pytest.fixture
def run(tmp_path: Path) -> Main:
    """A place of its own."""
    return Main(tmp_path)


def _check_outcome(outcome: dict[str, Any], table: str, records: list[Record]) -> None:
    """Table and JSON say what the records say."""
    assert len(outcome["rows"]) == len(records) == 4
    for row, record in zip(outcome["rows"], sorted(records, key=_by_cell), strict=True):
        assert row["result"]["samples"] == []
        assert record.result.samples
        figure = record.result.figure
        assert figure.steps is not None
        assert figure.steps.limit_requests_per_s > 0
        assert (figure.steps.distinct_experts > 0) == record.is_small4
        assert f"{row['values'][0]:.4g}" in table
    small4, small3, *_ = [row["values"][0] for row in outcome["rows"]]
    assert outcome["ratios"][0]["ratio"] == pytest.approx(small4 / small3)
    assert f"{small4 / small3:.2f}x" in table
    assert len(outcome["verdicts"]) == 2
    assert "met" in table
    assert f"commit {outcome['identity']['commit']}" in table


def _by_cell(record: Record) -> tuple[bool, bool]:
    return not record.is_throughput, not record.is_small4


@pytest.mark.timeout(240)
def test_real_servers(run: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "measure_apart", lambda: FOUND)
    assert run() == 0
    table = (run.folder / "out/headline-cpu-miniature.txt").read_text(encoding="utf-8")
    records = run.records("headline-cpu-miniature")
    outcome = run.outcome("headline-cpu-miniature")
    _check_outcome(outcome, table, records)
    assert outcome["ceilings"] == [msgspec.to_builtins(FOUND)] * 2  # of each profile's engines
    assert "SIMULATION" not in table
    assert "40.0 GB/s read, 400 GFLOP/s in bf16" in table
    assert [record.is_small4 for record in records if record.is_throughput] == [True, False]
    for record in records:
        result = record.result
        assert len(result.samples) == result.figure.requests
        assert all(sum(one.delta_tokens) == 8 for one in result.samples)
        assert f"--profile={'throughput' if record.is_throughput else 'latency'}" in result.command
        assert result.command.startswith("python -m cierzo serve small")
        assert (result.experts is not None) == record.is_small4
        if result.experts is not None:  # of this load alone, neither of the warm-up nor of the cell before
            assert result.experts.tokens == result.figure.requests * (32 + 8 - 1)
    capsys.readouterr()
    assert run() == 0  # everything is there
    assert "round" not in capsys.readouterr().out.partition("Small 4 against")[0]
    assert len(run.records("headline-cpu-miniature")) == len(records)
    (run.folder / "headline-cpu-miniature.jsonl").unlink()
    assert run("--report") == 0  # from the JSON alone
    assert table.partition("small4:")[2] in capsys.readouterr().out


def test_a_simulation(run: Main, capsys: pytest.CaptureFixture[str]) -> None:
    name = "headline-simulated-h200-miniature"
    assert run("--device", "simulated:h200", "--cells", "64/16@2") == 0
    assert len(run.records(name)) == 2
    assert run("--device", "simulated:h200", "--cells", "64/16@2", "--weights", "bf16") == 0  # one side alone
    assert [len(run.outcome(name)[part]) for part in ("rows", "ratios", "verdicts")] == [1, 0, 0]
    assert run("--device", "simulated:h200") == 0  # goes on
    records = run.records(name)
    table = (run.folder / "out" / f"{name}.txt").read_text(encoding="utf-8")
    _check_outcome(run.outcome(name), table, records)
    assert table.startswith("SIMULATION")
    assert "shares of its rates: memory 80%, experts 40%" in table
    assert "goal  " in table
    assert "simulated  limit of the ratio" in table
    for record in records:
        figure = record.result.figure
        assert 0.2 < (figure.share_of_limit or 0) < 1.0
        if record.is_throughput:
            measured = [point for point in record.result.points if point.measured]
            assert figure.concurrency in [point.concurrency for point in measured]
            assert figure.time_per_output_token_s.p50 <= 0.050
            assert figure.requests_per_s == max(
                point.requests_per_s for point in measured if point.time_per_output_token_s <= 0.050
            )
    capsys.readouterr()
    again = ["--device", "simulated:h200", "--samples", str(run.folder / f"{name}.jsonl")]
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
    outcome = run.outcome("headline-simulated-small-miniature")
    errors = {row["subject"]["model"]: row["error"] for row in outcome["rows"]}
    assert "nothing is left for the KV cache" in errors["small4"]
    assert errors["small3"] == ""
    assert [verdict["met"] for verdict in outcome["verdicts"]] == [None, None]
    told = capsys.readouterr().out
    assert told.count("NOT MEASURED: one engine on one card:") == 2
    assert "not measured" in told


def _h200() -> Any:
    return named("h200")


def test_steps_are_those_of_the_roofline(tmp_path: Path) -> None:
    """One client: each request is a prompt's step and 15 of one token, whose bytes and operations are known."""
    cell = msgspec.structs.replace(SHORT, concurrency=1)
    config = simulated_config("small4", cell, SMALL4, _h200(), tmp_path)
    result, totals = simulate(config, cell, 1)
    formats = NumberFormats(weights="nvfp4")
    shapes = [StepShape(expanded_tokens=64.0, expanded_pairs=64 * 65 / 2, expanded_context=64.0, sampled=1.0)]
    shapes += [
        StepShape(absorbed_tokens=1.0, absorbed_pairs=n, absorbed_context=n, sampled=1.0) for n in range(65, 80)
    ]
    each = [
        step_time(_h200(), step_work(config.model, config.layout, formats, shape), rows=1.0) for shape in shapes
    ]
    requests = len(result.samples) - 2  # from the end of the first to that of the last but one
    assert totals.steps == requests * 16
    assert totals.rows == requests * 16
    assert totals.limit_s == pytest.approx(requests * sum(float(np.sum(one.limit_s)) for one in each))
    assert totals.num_bytes == pytest.approx(requests * sum(float(np.sum(one.num_bytes)) for one in each))
    ends = sorted(one.end_s for one in result.samples)
    assert ends[-2] - ends[0] == pytest.approx(requests * sum(float(np.sum(one.total_s)) for one in each))


def _simulation(device: Any, folder: Path) -> Simulation:
    return Simulation(gpu_plan(), device, MODELS, folder)


def test_several_cards_are_one_engine_or_a_replica_each(tmp_path: Path) -> None:
    device = find_device("2xh200")
    together, apart = layouts(device)
    assert (together.replicas, together.device) == (1, device)
    assert (apart.replicas, apart.device) == (2, _h200())
    own = msgspec.structs.replace(device, name="own", bytes_per_s=1e12)
    assert layouts(own)[1].device.bytes_per_s == 1e12
    assert layouts(own)[1].device.cards == 1
    found = _simulation(device, tmp_path).measure(SHORT, SMALL3)
    (loser,) = found.others
    assert float(loser.removesuffix(" s").rpartition(": ")[2]) > found.figure.completion_s.p50
    fours = msgspec.structs.replace(SHORT, concurrency=4)
    apart_only = msgspec.structs.replace(device, link_bytes_per_s=1e7)  # exchanges take most of a step
    replicas = _simulation(apart_only, tmp_path).measure(fours, SMALL3)
    alone = _simulation(_h200(), tmp_path).measure(SHORT, SMALL3).figure
    assert (replicas.layout, replicas.figure.replicas, replicas.figure.concurrency) == (
        "2 engines of one card",
        2,
        4,
    )
    assert replicas.figure.requests_per_s == pytest.approx(2 * alone.requests_per_s, rel=0.2)
    assert replicas.figure.completion_s.p50 == pytest.approx(alone.completion_s.p50, rel=0.2)
    one = _simulation(apart_only, tmp_path).measure(msgspec.structs.replace(SHORT, concurrency=1), SMALL3)
    assert (one.layout, one.figure.replicas, one.figure.concurrency) == ("2 engines of one card", 1, 1)
    searched = msgspec.structs.replace(SHORT, profile="throughput", concurrency=None, input_tokens=2048)
    best = _simulation(apart_only, tmp_path).measure(searched, SMALL3)
    assert best.others[0].startswith("one engine on 2 cards: ")
    assert best.others[0].endswith("by forecast")
    forecast_per_s = [point.requests_per_s for point in best.points if not point.measured]
    assert max(forecast_per_s) > float(best.others[0].split()[5])
    fp8 = Subject(model="small4", weights="fp8", kv_dtype="fp8")
    cards = _simulation(find_device("2xh100"), tmp_path).measure(SHORT, fp8)
    assert cards.layout == "one engine on 2 cards"
    assert "2 engines of one card: the GPU has 74.5 GiB free" in cards.others[0]


def test_a_machine_s_ceilings_are_a_device_without_slack() -> None:
    device = machine.limit_device(FOUND)
    assert device.bytes_per_s == 40e9
    assert device.operations_per_s == {"bf16": 400e9, "fp32": 200e9, "int8": 400e9}
    assert set(device.stated.values()) == {1.0}
    assert device.step_overhead_s == 0


def test_the_picture_has_every_curve(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = Main(tmp_path)
    assert run("--device", "simulated:h200") == 0
    png = tmp_path / "out/headline-simulated-h200-miniature.png"
    assert png.read_bytes().startswith(b"\x89PNG")


def test_panels_are_of_one_length_of_requests(tmp_path: Path) -> None:
    store = Store(tmp_path / "samples.jsonl", IDENTITY)
    cells = tuple(
        msgspec.structs.replace(SHORT, name=f"64/16@{n}", concurrency=n, profile=profile)
        for profile in ("throughput", "latency")
        for n in (4, 1)
    )
    plan = Plan(cells=cells, subjects=(SMALL3,), pairs=(), goals=(), goals_are_for="a test")
    Run(Simulation(plan, _h200(), MODELS, tmp_path), store, functools.partial(print, end="")).measure(1)
    found = panels(outcome_of(plan, store).rows)
    assert [title for title, *_ in found] == ["throughput: 64 in, 16 out", "latency: 64 in, 16 out"]
    for _, _, limit, curves in found:
        assert limit is None
        assert [point[2] for point in curves[SMALL3]] == [4, 1]
