"""The CPU as a device: a machine whose times are known is found again, and a file for another is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from native_only import needs_native

from cierzo.bench.latency import RequestSample, steady_load, summarise_load
from cierzo.bench.machine import Ceiling, Ceilings
from cierzo.bench.plan import calibrate
from cierzo.bench.plan.calibrate import Calibrator, read_calibration
from cierzo.bench.profile import CONTEXT, OperationRow, StepProfile
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.cost.device import Device
from cierzo.engine.cost.step_model import StepModel
from cierzo.engine.cost.work import StepShape
from cierzo.engine.errors import ConfigError
from cierzo.engine.weights.make import make_checkpoint

SHARES = {"expert_mlp": 0.9, "linear": 0.8, "mla_decode": 0.4, "mla_prefill": 0.7}  # of what the machine can do
BESIDE = 1.07  # native time of the engine, beside the operations that the roofline counts
STEP_S, ROW_S = 400e-6, 25e-6


def _ceiling(rate: float) -> Ceiling:
    return Ceiling(rate=rate, reached_by="us")


CEILINGS = Ceilings(
    threads=2,
    read=_ceiling(40),
    bf16=_ceiling(400),
    float32=_ceiling(200),
    int8=_ceiling(800),
)
BARE = Device(
    name="known",
    source="made up",
    kind="cpu",
    bytes_per_s=40e9,
    operations_per_s={"fp32": 200e9, "bf16": 400e9, "int8": 800e9},
    memory_bytes=1 << 34,
    stated={"memory": 1.0, "experts": 1.0, "products": 1.0, "attention": 1.0},
)


class KnownProfiler:
    """Stands where a model would be measured: a machine whose operations reach SHARES of the ceilings, or half."""

    def __init__(self, options: EngineOptions, count: int, longest: int, repeats: int) -> None:
        self.config = resolve(options)

    def decode(self, batch: int, _: Ceilings) -> StepProfile:
        shape = _decoding(batch, CONTEXT)
        return self._profile(_rows(self.config, shape), batch)

    def prefill(self, tokens: int, _: Ceilings) -> StepProfile:
        return self._profile(_rows(self.config, _prompt(tokens)), 1)

    def operations(self, pieces: list[tuple[int, int]], _: Ceilings, *, generated: bool) -> list[OperationRow]:
        assert generated
        return _rows(self.config, _decoding(len(pieces), pieces[0][0] + 1))

    def _profile(self, rows: list[OperationRow], sequences: int) -> StepProfile:
        native_ms = BESIDE * sum(row.ms for row in rows if row.operation != "rope")
        step_ms = native_ms + (STEP_S + ROW_S * sequences) * 1e3
        return StepProfile(step="", step_ms=step_ms, native_ms=native_ms, overhead=0.0, operations=rows)


def _decoding(batch: int, context: int) -> StepShape:
    tokens = float(batch * context)
    return StepShape(
        absorbed_tokens=float(batch), absorbed_pairs=tokens, absorbed_context=tokens, sampled=float(batch)
    )


def _prompt(tokens: int) -> StepShape:
    return StepShape(
        expanded_tokens=float(tokens),
        expanded_pairs=tokens * (tokens + 1) / 2,
        expanded_context=float(tokens),
        sampled=1.0,
    )


def _seconds(config: EngineConfig, shape: StepShape) -> dict[str, float]:
    found = {}
    for work in StepModel(config, BARE).work(shape):
        limit_s = max(work.num_bytes / BARE.bytes_per_s, work.operations / BARE.operations_per_s[work.rate])
        if limit_s:
            found[work.operation] = float(limit_s) / SHARES.get(work.operation, 0.5)
    return found


def _rows(config: EngineConfig, shape: StepShape) -> list[OperationRow]:
    times = _seconds(config, shape)
    return [
        OperationRow(operation=name, calls=1, ms=seconds * 1e3, megabytes=0, gb_per_s=0, gflop_per_s=0, share=0)
        for name, seconds in (*times.items(), ("rope", 1e-4))
    ]


def _takes(config: EngineConfig, shape: StepShape, rows: int) -> float:
    return BESIDE * sum(_seconds(config, shape).values()) + STEP_S + ROW_S * rows


@pytest.fixture
def options(tmp_path: Path) -> EngineOptions:
    path = make_checkpoint(tmp_path / "model", like="small4", scale="tiny")
    return EngineOptions(model=str(path), device="cpu", threads=2)


@pytest.fixture
def known(options: EngineOptions, monkeypatch: pytest.MonkeyPatch) -> Device:
    """The calibration of the known machine."""
    monkeypatch.setattr(calibrate, "Profiler", KnownProfiler)
    monkeypatch.setattr(calibrate, "measure_ceilings", lambda: CEILINGS)
    return Calibrator(options).measure()


@needs_native
def test_a_known_machine_is_found_again(known: Device, options: EngineOptions) -> None:
    config = resolve(options)
    model = StepModel(config, known)
    assert known.step_overhead_s == pytest.approx(STEP_S)
    assert known.row_overhead_s == pytest.approx(ROW_S)
    for batch, context in ((1, CONTEXT), (8, CONTEXT), (32, CONTEXT), (4, 300), (16, 90), (8, 2048), (1, 1000)):
        took = model.time(_decoding(batch, context), float(batch)).total_s
        assert took == pytest.approx(_takes(config, _decoding(batch, context), batch), rel=0.01)
    for tokens in (64, 300, 512, 1024):
        took = model.time(_prompt(tokens), 1.0).total_s
        assert took == pytest.approx(_takes(config, _prompt(tokens), 1), rel=0.01)


@needs_native
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("checkpoint", "other"),
        ("config", "0" * 16),
        ("commit", "123456789abc"),
        ("dtype", "float32"),
        ("weights", "int8"),
        ("kv_dtype", "int8"),
        ("threads", 3),
        ("instruction_set", "avx"),
    ],
)
def test_a_calibration_of_something_else_is_refused(
    known: Device, options: EngineOptions, tmp_path: Path, field: str, value: Any
) -> None:
    path = tmp_path / "cpu.json"
    path.write_bytes(msgspec.json.encode(known))
    assert read_calibration(path, options) == known
    stamp = known.calibration
    other = msgspec.structs.replace(known, calibration=stamp | {field: value})
    path.write_bytes(msgspec.json.encode(other))
    with pytest.raises(ConfigError, match=f"made with {field} {value}, and this is {stamp[field]}"):
        read_calibration(path, options)


@needs_native
def test_what_is_no_calibration_is_refused(known: Device, options: EngineOptions, tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    with pytest.raises(ConfigError, match="No such file"):
        read_calibration(path, options)
    path.write_bytes(b'{"name": "cpu"}')
    with pytest.raises(ConfigError, match="missing required field"):
        read_calibration(path, options)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(known, calibration={})))
    with pytest.raises(ConfigError, match="not a calibration"):
        read_calibration(path, options)


@pytest.mark.parametrize(
    ("y", "line"),
    [
        ([3.0, 5.0, 9.0], (1.0, 2.0)),
        ([1.0, 2.0, 2.0], (8 / 11, 4 / 11)),  # squares weigh 1, 1/4 and 1/4
        ([4.0, 3.0, 2.0], (3.0, 0.0)),
        ([0.1, 4.0, 9.0], None),
    ],
)
def test_what_a_step_takes_beyond_its_operations(y: list[float], line: tuple[float, float] | None) -> None:
    start, slope = calibrate._line([1, 2, 4], y)
    assert start >= 0
    assert slope >= 0
    if line is not None:
        assert (start, slope) == pytest.approx(line)


def test_a_steady_load_leaves_out_both_ends() -> None:
    """Ten requests a second but for the first and the last two."""
    samples = [
        RequestSample(due_s=end - 1.0, start_s=end, delta_s=[end - 0.5, end], delta_tokens=[1, 5], end_s=end)
        for end in (9.0, 9.5, 9.6, 9.7, 9.8, 9.9, 20.0, 30.0)
    ]
    steady = steady_load(summarise_load(samples[::-1], 30.0), 2)
    assert steady.answered == 4
    assert steady.requests_per_s == pytest.approx(10.0)
    assert steady.time_to_first_token_s.p50 == pytest.approx(0.5)
    assert steady.inter_token_s.p50 == pytest.approx(0.1)
    assert steady.end_to_end_s.max == pytest.approx(1.0)
    with pytest.raises(ValueError, match="8 answers, and 4 are left out"):
        steady_load(summarise_load(samples, 30.0), 4)
