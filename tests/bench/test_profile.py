"""The profile of a step, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from native_only import needs_native

from cierzo.bench import profile
from cierzo.bench.machine import Ceiling, Ceilings
from cierzo.engine.config import EngineOptions
from cierzo.engine.weights.make import make_checkpoint

ONE = Ceiling(rate=1.0, reached_by="nobody")
CEILINGS = Ceilings(threads=1, read_one_thread=ONE, read=ONE, bf16=ONE, float32=ONE, int8=None)


def test_a_row_gives_rates_and_the_share_of_its_limit() -> None:
    """By the median of the repeats. Its bytes take 2 s at 3 GB/s, its operations 1.5 s at 8 GFLOP/s."""
    read, bf16 = (Ceiling(rate=rate, reached_by="") for rate in (3.0, 8.0))
    found = msgspec.structs.replace(CEILINGS, read=read, bf16=bf16)
    totals = [profile._Total(calls=6, seconds=took, operations=12e9, num_bytes=6e9) for took in (5.0, 3.0, 4.0)]
    assert profile._row("linear", totals, found) == profile.OperationRow(
        operation="linear", calls=6, ms=4000.0, megabytes=6000.0, gb_per_s=1.5, gflop_per_s=3.0, share=0.5
    )
    fewer = [profile._Total(calls=6, seconds=4.0, operations=24e9, num_bytes=6e9)]
    assert profile._row("linear", fewer, found).share == 0.75


@needs_native
def test_every_kind_of_step_is_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "measure_ceilings", lambda: CEILINGS)
    checkpoint = make_checkpoint(tmp_path / "model", like="small4", scale="tiny")
    ceilings, steps = profile.profile(str(checkpoint), [1, 3], [40], threads=1)
    assert [step.step for step in steps] == ["decode 1", "decode 3", "prefill 40"]
    for step in steps:
        attention = "mla_prefill" if step.step == "prefill 40" else "mla_decode"
        calls = {row.operation: row.calls for row in step.operations}
        assert (calls[attention], calls["expert_mlp"], calls["rope_tables"]) == (3, 3, 1)
        assert 0 < step.native_ms < step.step_ms
    assert "around them" in profile.table(ceilings, steps)


@needs_native
def test_what_is_measured_is_what_the_profile_chooses(tmp_path: Path) -> None:
    """Its number formats; not its limits, where more sequences are asked for than it would run."""
    checkpoint = make_checkpoint(tmp_path / "model", like="small4", scale="tiny")
    profiler = profile.Profiler(EngineOptions(model=str(checkpoint), profile="latency", threads=1), 8, 256, 1)
    assert (profiler.config.weights, profiler.config.scheduler.max_running) == ("int8", 8)
    step = profiler.decode(8, CEILINGS)
    assert step.step_ms > step.native_ms > 0
    assert {"lm_head", "linear", "expert_mlp"} <= {row.operation for row in step.operations}
