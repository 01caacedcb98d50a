"""Every operation is timed, with arguments that it takes; and the lines say what they should."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cierzo.bench import ceilings, kernel_cases, kernels
from cierzo.bench.kernel_cases import CASES, Call, Maker, Model, Size
from cierzo.bench.machine import Ceiling, Ceilings
from cierzo.kernels.registry import operations

TINY4 = Model(
    name="tiny4",
    hidden=64,
    heads=2,
    vocab=500,
    mlp_width=32,
    query_rank=48,
    rank=32,
    rope=16,
    nope=16,
    value_dim=32,
    experts=8,
    top_k=2,
    expert_width=32,
)
TINY3 = Model(name="tiny3", hidden=64, heads=4, vocab=500, mlp_width=96, kv_heads=2, head_dim=32)
DECODE = Size(name="decode 2", sequences=2, rows_each=1, context=64)
PREFILL = Size(name="prefill 64", sequences=1, rows_each=64, context=64)
ROOF = Ceilings(
    threads=1,
    read_one_thread=Ceiling(rate=5.0, reached_by="a"),
    read=Ceiling(rate=10.0, reached_by="a"),
    bf16=Ceiling(rate=100.0, reached_by="b"),
    float32=Ceiling(rate=50.0, reached_by="c"),
    int8=None,
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "COLD_BYTES", 1 << 14)
    monkeypatch.setattr(kernels, "ROUND_S", 1e-5)
    monkeypatch.setattr(kernels, "SIZES", (DECODE, PREFILL))
    monkeypatch.setattr(kernels, "MODELS", {"tiny4": TINY4, "tiny3": TINY3})


def test_every_operation_has_a_case() -> None:
    missing = set(operations()) - set(CASES)
    assert not missing, f"bench/kernel_cases.py or attention_cases.py needs a case of {sorted(missing)}"
    assert set(CASES) <= set(operations())


@pytest.mark.parametrize("operation", operations())
def test_an_operation_runs_at_each_size_that_it_has(operation: str) -> None:
    settings = kernels.KernelSettings(
        operations=(operation,), models=(), sizes=(DECODE.name, PREFILL.name), weights="bf16", rounds=2
    )
    rows = [row for model in (TINY4, TINY3) for row in kernels.measure(settings, model, ROOF)]
    assert {row.implementation for row in rows} >= {"torch"}
    for row in rows:
        assert len(row.samples_us) == 2
        assert row.num_bytes > 0
        assert row.share > 0
        assert row.speedup == 1.0 or row.implementation != "torch"


def test_cold_weights_fill_more_than_a_cache() -> None:
    make = Maker(native=False, format="bf16")
    assert len(make.cold(lambda: (make.matrix(32, 64),))) == (1 << 14) // (32 * 64 * 2) + 1


def test_weights_are_used_in_turn() -> None:
    seen: list[int] = []
    run = kernels._runner(seen.append, Call([(0,), (1,), (2,)], 0))
    run(4)
    run(3)
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_the_ceiling_is_the_longer_of_bytes_and_operations() -> None:
    assert kernels.least_seconds(Call([], 10**10), ROOF, "bf16") == 1.0
    assert kernels.least_seconds(Call([], 10**10, 10**12), ROOF, "bf16") == 10.0
    assert kernels.least_seconds(Call([], 10**10, 10**12), ROOF, "float32") == 20.0
    assert kernels.least_seconds(Call([], 10**10, 10**12), ROOF, "int8") == 10.0  # no int8 ceiling: bf16's


def test_the_table_and_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("READ_BYTES", 1 << 12), ("SIDE", 64), ("ROUNDS", 1)):
        monkeypatch.setattr(ceilings, name, value)
    target = tmp_path / "kernels.json"
    arguments = ["--operation", "rms_norm", "mla_decode", "--model", "tiny4", "tiny3", "--size", "decode 2"]
    assert kernels.main([*arguments, "--rounds", "3", "--json", str(target)]) == 0
    report = msgspec.json.decode(target.read_bytes())
    results = msgspec.convert(report["results"], kernels.KernelResults)
    found = {(row.operation, row.model) for row in results.rows}
    assert found == {("rms_norm", "tiny4"), ("rms_norm", "tiny3"), ("mla_decode", "tiny4")}
    assert all(len(row.samples_us) == 3 for row in results.rows)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("rms_norm", "mla_decode")) for line in lines) == len(results.rows)
    assert results.ceilings.read.rate > 0
