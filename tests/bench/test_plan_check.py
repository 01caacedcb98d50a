"""Plans for this machine's CPU against measurements: the whole way on a tiny model."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from native_only import needs_native

from cierzo.bench.latency import LoadResult
from cierzo.bench.load import LoadSettings
from cierzo.bench.machine import Ceiling, Ceilings
from cierzo.bench.plan import calibrate
from cierzo.bench.plan import check as plan_check
from cierzo.bench.plan.check import Attempt, Checked, check, table
from cierzo.bench.plan.forecast import Forecast, forecast
from cierzo.bench.report import Report
from cierzo.bench.virtual import SimulatedServer, VirtualClock, run_simulated_load
from cierzo.bench.workload import parse_workload
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.cost.step_model import FloatArray, StepTotals
from cierzo.engine.cost.work import Distinct, measured_distinct
from cierzo.engine.expert_statistics import ExpertStatistics
from cierzo.engine.messages import TokenDelta
from cierzo.engine.weights.make import make_checkpoint
from cierzo.engine.worker.core import EngineCore

RESULT = Path(__file__).resolve().parents[2] / "bench" / "results" / "plan-cpu.json"
WIDE = 2.0  # a factor, either way

ONE = Ceiling(rate=50.0, reached_by="nobody")
CEILINGS = Ceilings(threads=1, read=ONE, bf16=ONE, float32=ONE, int8=ONE)
PLANNED = {"requests_per_s": 1.1, "completion_s": 8.7, "ttft_s": 1.0, "inter_token_s": 0.02}
ATTEMPT = Attempt(
    planned=PLANNED,
    measured={"requests_per_s": 1.0, "completion_s": 10.0, "ttft_s": 3.0, "inter_token_s": 0.0},
    bandwidth=(40.0, 20.0),
    apart=0.1,
)


def _checked(*attempts: Attempt) -> Checked:
    return Checked(checkpoint="small4", weights="bf16", workload="9/9@1", requests=8, attempts=[*attempts])


def test_what_is_promised_is_requests_and_completion_either_way() -> None:
    assert ATTEMPT.within
    assert ATTEMPT.errors["ttft_s"] == pytest.approx(-2 / 3)
    for wrong in ({"requests_per_s": 0.84}, {"requests_per_s": 1.16}, {"completion_s": 8.4}):
        assert not msgspec.structs.replace(ATTEMPT, planned=PLANNED | wrong).within
    bad = msgspec.structs.replace(ATTEMPT, planned=PLANNED | {"requests_per_s": 2.0}, apart=0.05)
    told = table([_checked(ATTEMPT), _checked(ATTEMPT, bad)])
    assert told.endswith("1 of 2 workloads; not small4 9/9@1")
    _, _, row, other, _ = told.splitlines()
    said = "small4 9/9@1 1.1 / 1 +10% 8.7 / 10 -13% 1 / 3 -67% 0.02 / 0 +0% 40, 20 1"
    assert " ".join(row.split()) == said
    assert " ".join(other.split()) == said.replace("1.1 / 1 +10%", "2 / 1 +100%")[:-1] + "2"  # attempts


def test_the_committed_result_holds_what_is_promised() -> None:
    """Every workload of both models; the table beside it says the same."""
    report = msgspec.json.decode(RESULT.read_bytes(), type=Report)
    found = msgspec.convert(report.results, list[Checked])
    assert len(found) >= 8
    assert {one.checkpoint for one in found} == {"small4", "small3"}
    for one in found:
        assert one.counted.within
    assert RESULT.with_suffix(".txt").read_text(encoding="utf-8") == f"{table(found)}\n"


class TimedCore(EngineCore):
    """A real engine core; the virtual clock tells the processor time of its steps."""

    def __init__(self, config: EngineConfig, clock: VirtualClock) -> None:
        self.virtual_clock = clock
        super().__init__(config, clock=clock)

    def step_plain(self) -> list[TokenDelta]:
        """A step, and the time that it takes."""
        begin = time.process_time()
        deltas = super().step_plain()
        self.virtual_clock.now_s += time.process_time() - begin
        return deltas

    def steady_s(self, _: int) -> FloatArray:
        """Each step is computed."""
        return np.zeros(0)


class InProcess(SimulatedServer):
    """Stands where `cierzo serve` would: a real engine in this process, under the real load client."""

    totals = StepTotals()  # real steps are not counted

    def __init__(self, options: EngineOptions) -> None:
        config = resolve(options)
        self.clock = VirtualClock()
        self.core = TimedCore(config, self.clock)
        self.vocab_size = config.model.vocab_size
        self._most_steps, self._sent, self.ends = 1, 0, []
        self._streams, self._arrivals, self._arrived = {}, [], asyncio.Event()

    def load(self, settings: LoadSettings) -> LoadResult:
        """As `RunningServer` does."""
        self._arrived = asyncio.Event()
        return run_simulated_load(self, settings)

    @property
    def experts(self) -> ExpertStatistics | None:
        """Of all loads so far."""
        return self.core.stats().experts

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to stop."""


@needs_native
def test_the_whole_way_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrate, load, calibrate, plan. A machine of CI may be shared with anything, so that time is the
    processor's, on one thread, and the model is so small that others' traffic to memory hardly matters; what
    remains (colder caches, slower clocks, half of a step in Python) is allowed a factor of 2. A plan that forgets
    the prompts, the overhead, or a unit is off by more. `plan_check` itself promises 15 %, of wall time."""
    path = make_checkpoint(tmp_path / "tiny", like="small4", scale="tiny")
    options = EngineOptions(model=str(path), device="cpu", threads=1, budget_tokens=128, kv_cache_gib=0.1)
    counting = msgspec.structs.replace(options, expert_statistics=True)
    monkeypatch.setattr(plan_check, "ATTEMPTS", 2)
    monkeypatch.setattr(plan_check, "CierzoServer", lambda *_: InProcess(counting))
    monkeypatch.setattr(calibrate, "measure_ceilings", lambda: CEILINGS)  # what they are cancels out
    monkeypatch.setattr(calibrate, "BATCHES", (1, 2, 8))
    monkeypatch.setattr(calibrate, "LONG", ((1, 256),))
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    given: list[Distinct] = []

    def watched(*args: Any, distinct: Distinct, **keywords: Any) -> Forecast:
        given.append(distinct)
        return forecast(*args, distinct=distinct, **keywords)

    monkeypatch.setattr(plan_check, "forecast", watched)
    workloads = [parse_workload("100/20@1"), parse_workload("48/40@8"), parse_workload("96:64/8@4")]
    found = list(check(options, workloads, tmp_path))
    assert [one.workload for one in found] == ["100/20@1", "48/40@8", "96:64/8@4"]
    for one in found:
        assert 1 <= len(one.attempts) <= 2
        for name in ("requests_per_s", "completion_s"):
            assert 1 / WIDE < one.counted.planned[name] / one.counted.measured[name] < WIDE
        assert all(attempt.experts is not None and attempt.experts.tokens for attempt in one.attempts)
    experts = found[-1].attempts[-1].experts
    assert experts is not None
    assert given[-1](8.0) == measured_distinct(experts)(8.0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "cierzo.bench.plan.check: checkpoint must be the folder of a checkpoint, got 'nowhere'"),
        (["nowhere", "--workloads", "9/x@1"], "cierzo.bench.plan.check: workload must be IN/OUT@CLIENTS"),
        (
            ["nowhere", "--workloads", "{tmp}/trace.jsonl"],
            "workloads must be loops (a trace can be planned, not sent)",
        ),
        (["nowhere", "--weights", "int3"], "invalid choice: 'int3'"),
    ],
)
def test_what_cannot_be_checked_is_refused_by_name(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trace.jsonl").write_text('{"arrival_s": 0, "input_tokens": 9, "output_tokens": 9}')
    try:
        status = plan_check.main([word.format(tmp=tmp_path) for word in words])
    except SystemExit as error:  # argparse's
        status = int(str(error))
    assert status == 2
    assert told in capsys.readouterr().err


def test_calibrating_nothing_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate.main(["nowhere"]) == 2
    told = "cierzo.bench.plan.calibrate: checkpoint must be the folder of a checkpoint, got 'nowhere'\n"
    assert capsys.readouterr().err == told


def test_a_workload_is_measured_again_while_the_machine_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until two calibrations agree, or no attempts are left; then the closest pair counts, whatever it measured."""

    def run(*aparts: float) -> Checked:
        waiting = iter(aparts)

        def attempt(*_: Any) -> tuple[Attempt, None]:
            return msgspec.structs.replace(ATTEMPT, apart=next(waiting)), None

        monkeypatch.setattr(plan_check, "_attempt", attempt)
        config = SimpleNamespace(
            name="small4", weights="bf16", checkpoint="small4", model=SimpleNamespace(moe=None)
        )
        monkeypatch.setattr(plan_check, "resolve", lambda _: config)
        monkeypatch.setattr(plan_check, "Calibrator", lambda _: SimpleNamespace(measure=lambda: None))
        monkeypatch.setattr(plan_check, "CierzoServer", lambda *_: contextlib.nullcontext())
        (checked,) = check(EngineOptions(model="small4"), [parse_workload("9/9@1")], Path())
        return checked

    assert [len(run(*aparts).attempts) for aparts in ((0.1,), (0.3, 0.1), (0.3, 0.4, 0.5))] == [1, 2, 3]
    assert run(0.4, 0.2, 0.3).counted.apart == 0.2
