"""The profile of a step, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from native_only import needs_native

from cierzo.bench import profile
from cierzo.bench.machine import Ceiling, Ceilings
from cierzo.engine.config import EngineOptions
from cierzo.engine.cost.operations import Work
from cierzo.engine.errors import ConfigError
from cierzo.engine.model.config import MlaConfig
from cierzo.engine.weights.make import make_checkpoint

ONE = Ceiling(rate=1.0, reached_by="nobody")
CEILINGS = Ceilings(threads=1, read=ONE, bf16=ONE, float32=ONE, int8=None)


def test_a_row_gives_rates_and_the_share_of_its_limit() -> None:
    """By the median of the repeats. Its bytes take 2 s at 3 GB/s, its operations 1.5 s at 8 GFLOP/s."""
    read, bf16 = (Ceiling(rate=rate, reached_by="") for rate in (3.0, 8.0))
    found = msgspec.structs.replace(CEILINGS, read=read, bf16=bf16)
    runs = [[took - 2.0, 0.5, 1.5] for took in (5.0, 3.0, 4.0)]
    assert profile._row(Work("linear", 6e9, 12e9), runs, found) == profile.OperationRow(
        operation="linear", calls=3, ms=4000.0, megabytes=6000.0, gb_per_s=1.5, gflop_per_s=3.0, share=0.5
    )
    assert profile._row(Work("linear", 6e9, 24e9), [[4.0]], found).share == 0.75


@needs_native
def test_an_operation_is_counted_by_hand(tmp_path: Path) -> None:
    """Attention by the sizes in docs/model.md; the experts' bytes by those that were chosen."""
    checkpoint = make_checkpoint(tmp_path / "model", like="small4", scale="tiny")
    profiler = profile.Profiler(EngineOptions(model=str(checkpoint), threads=1), 8, 256, 1)
    model = profiler.config.model
    mla, moe, layers = model.attention, model.moe, model.num_layers
    assert isinstance(mla, MlaConfig)
    assert moe is not None
    one, eight = (
        {row.operation: row for row in profiler.operations([(99, 1)] * count, CEILINGS, generated=True)}
        for count in (1, 8)
    )
    multiplied = 2 * mla.kv_lora_rank + mla.qk_rope_head_dim  # for a score, and for a sum
    operations = layers * 100 * model.num_heads * 2 * multiplied
    assert one["mla_decode"].gflop_per_s * one["mla_decode"].ms * 1e6 == pytest.approx(operations)
    expert_bytes = layers * 3 * model.hidden_size * moe.expert_width * 2
    beside = one["expert_mlp"].megabytes * 1e6 - moe.experts_per_token * expert_bytes
    rows_bytes = layers * 2 * model.hidden_size * 2
    assert beside == pytest.approx(moe.num_shared_experts * expert_bytes + rows_bytes)
    reached = (eight["expert_mlp"].megabytes * 1e6 - beside - 7 * rows_bytes) / expert_bytes * layers
    assert moe.experts_per_token * layers < reached < moe.num_experts * layers
    assert reached == pytest.approx(round(reached))  # experts that were counted, in all layers


def test_operations_without_native_kernels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", like="small4", scale="tiny")
    profiler = profile.Profiler(EngineOptions(model=str(checkpoint), threads=1), 1, 64, 1)
    monkeypatch.setattr(profile, "has_native", lambda: False)
    with pytest.raises(ConfigError, match="no native kernels"):
        profiler.operations([(9, 1)], CEILINGS, generated=True)


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
def test_a_product_as_tall_as_the_vocabulary_is_not_the_head(tmp_path: Path) -> None:
    """Queries, keys and values of tiny Small 3 have as many rows as its head."""
    checkpoint = make_checkpoint(tmp_path / "model", like="small3", scale="tiny")
    profiler = profile.Profiler(EngineOptions(model=str(checkpoint), threads=1), 1, 64, 1)
    assert (profiler.config.model.vocab_size, profiler.config.model.num_layers) == (8 * 128, 3)
    calls = {row.operation: row.calls for row in profiler.operations([(9, 1)], CEILINGS, generated=True)}
    assert (calls["lm_head"], calls["linear"]) == (1, 2 * 3)


@needs_native
def test_what_is_measured_is_what_the_profile_chooses(tmp_path: Path) -> None:
    """Its number formats; not its limits, where more sequences are asked for than it would run."""
    checkpoint = make_checkpoint(tmp_path / "model", like="small4", scale="tiny")
    profiler = profile.Profiler(EngineOptions(model=str(checkpoint), profile="latency", threads=1), 8, 256, 1)
    assert (profiler.config.weights, profiler.config.scheduler.max_running) == ("int8", 8)
    step = profiler.decode(8, CEILINGS)
    assert step.step_ms > step.native_ms > 0
    assert {"lm_head", "linear", "expert_mlp"} <= {row.operation for row in step.operations}
