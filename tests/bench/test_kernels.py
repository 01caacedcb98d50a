"""Every operation is timed, with arguments that it takes; its bytes, operations and shares are those counted by
hand; and the lines say what they should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from cierzo.bench import kernel_cases, kernels
from cierzo.bench.kernel_cases import CASES, Call, Maker, Size
from cierzo.bench.machine import Ceiling, Ceilings
from cierzo.engine.cost.operations import Work, stored
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels.formats.device import quantise
from cierzo.kernels.formats.number_formats import PACKED_FORMATS
from cierzo.kernels.pack import pack
from cierzo.kernels.registry import Implementation, has_native, implementations, operations

TINY4 = ModelSizes(
    name="tiny4", hidden=64, heads=2, vocab=500, mlp_width=32, query_rank=48, rank=32, rope=16, nope=16,
    value_dim=32, experts=8, top_k=2, expert_width=32, shared_width=32,
)  # fmt: skip
TINY3 = ModelSizes(name="tiny3", hidden=64, heads=4, vocab=500, mlp_width=96, kv_heads=2, head_dim=32)
DECODE = Size(name="decode 2", sequences=2, rows_each=1, context=64)
PREFILL = Size(name="prefill 64", sequences=1, rows_each=64, context=64)
SIZES = {size.name: size for size in (DECODE, PREFILL)}
ROOF = Ceilings(
    threads=1,
    read_one_thread=Ceiling(rate=5.0, reached_by="a"),
    read=Ceiling(rate=10.0, reached_by="a"),
    bf16=Ceiling(rate=100.0, reached_by="b"),
    float32=Ceiling(rate=50.0, reached_by="c"),
    int8=None,
)


# What a call moves and computes, counted by hand: (bytes, operations). Values and weights have 2 bytes, codes 1;
# scales, angles and logits 4; ids and positions 8. "decode 2" has 2 rows of 64 values, each at the end of a context
# of 64 tokens; "prefill 64" the 64 rows of one context, which see 64 * 65 / 2 = 2080 pairs. The experts are CHOSEN.
Counted = tuple[int, int]
CHOSEN = [[0, 1], [1, 5]]  # three distinct ones
EXPERTS = (3 + 1) * 3 * 32 * 64 * 2  # bytes: gate, up and down of these and of the shared one
MLA_DECODE = ((2 * 64 * 48 + 2 * 2 * 48 + 2 * 2 * 32) * 2, 2 * 128 * 2 * (48 + 32))  # pages, queries, results
MLA_PREFILL = (
    (64 * 48 + 64 * 2 * 32 + 64 * 2 * 32 + 2 * (16 + 32) * 32) * 2,  # and the weights that expand latents
    2 * 64 * 2 * (16 + 32) * 32 + 2 * 2080 * 2 * (32 + 32),
)
GQA_DECODE = ((2 * 2 * 64 * 2 * 32 + 2 * 2 * 4 * 32) * 2, 4 * 128 * 4 * 32)
GQA_PREFILL = ((2 * 64 * 2 * 32 + 2 * 64 * 4 * 32) * 2, 4 * 2080 * 4 * 32)
MLA_DENSE = (48 + 32 + 16) * 64 + 2 * 32 * 48 + 64 * 2 * 32  # weights: down to latents, up to queries, output
MLA_BY_HEAD = 2 * (16 + 32) * 32  # weights: into and out of latents
GQA_DENSE = (4 + 2 + 2) * 32 * 64 + 64 * 4 * 32
MLA_BLOCK = {  # the sum, the residual in and out, and the result are four times the rows
    "decode 2": (
        (MLA_DENSE + MLA_BY_HEAD + 4 * 2 * 64) * 2 + MLA_DECODE[0],
        2 * 2 * (MLA_DENSE + MLA_BY_HEAD) + MLA_DECODE[1],
    ),
    "prefill 64": ((MLA_DENSE + 4 * 64 * 64) * 2 + MLA_PREFILL[0], 2 * 64 * MLA_DENSE + MLA_PREFILL[1]),
}
GQA_BLOCK = {
    "decode 2": ((GQA_DENSE + 4 * 2 * 64) * 2 + GQA_DECODE[0], 2 * 2 * GQA_DENSE + GQA_DECODE[1]),
    "prefill 64": ((GQA_DENSE + 4 * 64 * 64) * 2 + GQA_PREFILL[0], 2 * 64 * GQA_DENSE + GQA_PREFILL[1]),
}
MLP_BLOCK = ((3 * 96 * 64 + 4 * 2 * 64) * 2, 2 * 2 * 3 * 96 * 64)
MOE_BLOCK = (EXPERTS + (8 * 64 + 4 * 2 * 64) * 2, 2 * 2 * ((2 + 1) * 3 * 32 * 64 + 8 * 64))
TINY4_DECODE: dict[str, Counted] = {
    "rms_norm": ((2 * 64 + 64 + 2 * 64) * 2, 0),
    "add_rms_norm": ((4 * 2 * 64 + 64) * 2, 0),
    "rms_norm_fp8": ((2 * 64 + 64) * 2 + 2 * 64 + 2 * 4, 0),
    "add_rms_norm_fp8": ((3 * 2 * 64 + 64) * 2 + 2 * 64 + 2 * 4, 0),
    "rope_tables": (2 * 8 + 2 * 2 * 8 * 4, 0),
    "apply_rope": (2 * 2 * 2 * 16 * 2 + 2 * 2 * 8 * 4, 0),
    "linear": ((64 * 64 + 2 * 64 + 2 * 64) * 2, 2 * 2 * 64 * 64),
    "lm_head": (500 * 64 * 2 + 2 * 64 * 2 + 2 * 500 * 4, 2 * 2 * 64 * 500),
    "gated_mlp": ((3 * 32 * 64 + 2 * 2 * 64) * 2, 2 * 2 * 3 * 32 * 64),
    "route": ((8 * 64 + 2 * 64) * 2 + 2 * 2 * (8 + 4), 2 * 2 * 64 * 8),
    "group_by_expert": (2 * 2 * 8 + 2 * 2 * 8 + 9 * 8, 0),
    "expert_mlp": (EXPERTS + 2 * 2 * 64 * 2, 2 * 2 * (2 + 1) * 3 * 32 * 64),
    "write_latents": (2 * 2 * 48 * 2, 0),
    "write_normed_latents": (2 * 2 * 48 * 2 + 32 * 2 + 2 * 2 * 8 * 4, 0),
    "mla_absorb": ((2 * 16 * 32 + 2 * 2 * (16 + 32)) * 2, 2 * 2 * 2 * 16 * 32),
    "mla_unabsorb": ((2 * 32 * 32 + 2 * 2 * (32 + 32)) * 2, 2 * 2 * 2 * 32 * 32),
    "mla_decode": MLA_DECODE,
    "copy_blocks": (2 * 4 * 16 * 48 * 2, 0),
    "gather_blocks": (2 * 4 * 16 * 48 * 2, 0),
    "scatter_blocks": (2 * 4 * 16 * 48 * 2, 0),
    "add_bias": (200 * (8 + 8 + 4 + 2 * 4), 0),  # row, id, bias; the logit in and out
    "apply_penalties": (200 * (8 + 8 + 8 + 2 * 4), 0),
    "mask_tokens": (200 * (8 + 8 + 4), 0),
    "peaks": (2 * 500 * 4, 0),
    "draw": (2 * 500 * 4, 0),
    "log_probabilities": (2 * 500 * 4 * 2, 0),
    "top_tokens": (2 * 500 * 4, 0),
    "mla_block": MLA_BLOCK["decode 2"],
    "moe_block": MOE_BLOCK,
    "decoder": (MLA_BLOCK["decode 2"][0] + MOE_BLOCK[0], MLA_BLOCK["decode 2"][1] + MOE_BLOCK[1]),
}
TINY3_DECODE: dict[str, Counted] = {
    "rope_tables": (2 * 8 + 2 * 2 * 16 * 4, 0),
    "apply_rope": (2 * 2 * (4 + 2) * 32 * 2 + 2 * 2 * 16 * 4, 0),
    "linear": ((64 * 128 + 2 * 128 + 2 * 64) * 2, 2 * 2 * 128 * 64),
    "gated_mlp": ((3 * 96 * 64 + 2 * 2 * 64) * 2, 2 * 2 * 3 * 96 * 64),
    "write_keys_values": (2 * 2 * 2 * 2 * 32 * 2, 0),
    "rotate_and_write_keys_values": (2 * 2 * (4 + 2 + 2) * 32 * 2 + 2 * 2 * 16 * 4, 0),
    "gqa_decode": GQA_DECODE,
    "copy_blocks": (2 * 4 * 16 * 64 * 2, 0),
    "gqa_block": GQA_BLOCK["decode 2"],
    "mlp_block": MLP_BLOCK,
    "decoder": (GQA_BLOCK["decode 2"][0] + MLP_BLOCK[0], GQA_BLOCK["decode 2"][1] + MLP_BLOCK[1]),
}
PREFILLS: dict[str, dict[str, Counted]] = {
    "tiny4": {
        "linear": ((64 * 64 + 64 * 64 + 64 * 64) * 2, 2 * 64 * 64 * 64),
        "lm_head": (500 * 64 * 2 + 64 * 2 + 500 * 4, 2 * 64 * 500),  # of the last row alone
        "expert_mlp": (EXPERTS + 2 * 64 * 64 * 2, 2 * 64 * (2 + 1) * 3 * 32 * 64),
        "mla_prefill": MLA_PREFILL,
        "mla_block": MLA_BLOCK["prefill 64"],
    },
    "tiny3": {"gqa_prefill": GQA_PREFILL, "gqa_block": GQA_BLOCK["prefill 64"]},
}
BY_HAND = {
    ("tiny4", "decode 2"): TINY4_DECODE,
    ("tiny3", "decode 2"): TINY3_DECODE,
    ("tiny4", "prefill 64"): PREFILLS["tiny4"],
    ("tiny3", "prefill 64"): PREFILLS["tiny3"],
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "COLD_BYTES", 1 << 14)
    monkeypatch.setattr(kernel_cases, "random_experts", lambda _, size: torch.tensor(CHOSEN * (size.rows // 2)))
    monkeypatch.setattr(kernels, "ROUND_S", 1e-5)
    monkeypatch.setattr(kernels, "SIZES", tuple(SIZES.values()))
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
    assert {row.implementation for row in rows} == {choice.name for choice in implementations(operation, "cpu")}
    for row in rows:
        assert len(row.samples_us) == 2
        least_us = max(row.num_bytes / 10, row.flops / 100) / 1e3  # ROOF: 10 GB/s, 100 GFLOP/s
        assert row.share == pytest.approx(least_us / (sum(row.samples_us) / 2))
        assert row.speedup == 1.0 or row.implementation not in ("torch", "composed")


@pytest.mark.parametrize("native", [False, *([True] if has_native() else [])])
def test_bytes_and_operations_are_those_counted_by_hand(native: bool) -> None:
    counted = set()
    for (model, size), calls in BY_HAND.items():
        for operation, by_hand in calls.items():
            call = CASES[operation](kernels.MODELS[model], SIZES[size], Maker(native=native, format="bf16"))
            assert call is not None
            assert (call.work.num_bytes, call.work.operations) == by_hand, (operation, model, size)
            counted.add(operation)
    assert counted == set(operations())


@pytest.mark.parametrize("format", [*PACKED_FORMATS, "fp8", "mxfp4"])
def test_weights_are_counted_with_the_bytes_that_they_have(format: str) -> None:
    """Of whole panels and groups: what pads a matrix is the implementation's own."""
    plain = torch.ones(3, 64, 128).bfloat16()
    made = [pack(plain, format)] if format in PACKED_FORMATS and has_native() else []
    made += [quantise(plain, format)] if format in ("fp8", "nvfp4", "mxfp4") else []
    for matrix in made:
        assert matrix.num_bytes == stored(format, 3 * 64, 128)


def test_a_shared_prefix_is_read_once_and_a_window_leaves_what_it_leaves() -> None:
    size = Size(name="", sequences=3, rows_each=1, context=100, shared=64)
    assert size.queries() == (3, 3 * 100, 3 * 36 + 64)
    assert size.queries(window=40) == (3, 3 * 40, 3 * 36 + 4)
    assert size.queries(window=30) == (3, 3 * 30, 3 * 30)
    assert Size(name="", sequences=2, rows_each=3, context=5).queries() == (6, 2 * (3 + 4 + 5), 2 * 5)


def test_shares_and_speedups_are_those_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the operation itself moves."""
    now_s = 0.0
    calls_us = {"torch": iter([9, 9, 300, 500, 400]), "native": iter([9, 9, 100, 250, 100])}  # two to warm up

    def load(choice: Implementation) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            nonlocal now_s
            now_s += next(calls_us[choice.name]) / 1e6

        return run

    monkeypatch.setattr(kernels, "time", SimpleNamespace(perf_counter=lambda: now_s))
    monkeypatch.setattr(kernels, "ROUND_S", 9e-6)
    monkeypatch.setattr(kernels, "_bind_all", lambda name: None)
    monkeypatch.setattr(Implementation, "load", load)
    rows = [Implementation("linear", name, "", ("cpu",), exact=True) for name in calls_us]
    monkeypatch.setattr(kernels, "implementations", lambda operation, device: rows)
    monkeypatch.setattr(Maker, "matrix", lambda make, *shape, **options: torch.ones(shape).bfloat16())
    settings = kernels.KernelSettings(
        operations=("linear",), models=(), sizes=(DECODE.name,), weights="float32", rounds=3
    )
    roof = msgspec.structs.replace(ROOF, read=Ceiling(rate=1000.0, reached_by="a"))
    torch_row, native_row = kernels.measure(settings, TINY4, roof)
    assert torch_row.samples_us == pytest.approx((300, 500, 400))
    assert native_row.samples_us == pytest.approx((100, 250, 100))
    assert (torch_row.us, native_row.us) == pytest.approx((400, 100))
    assert (torch_row.speedup, native_row.speedup) == (1.0, pytest.approx(3.0))  # the median of 3, 2 and 4
    # 16,384 operations at the 100 GFLOP/s of the reference's bf16, or the 50 of the weights' float32
    assert (torch_row.share, native_row.share) == pytest.approx((0.16384 / 400, 0.32768 / 100))


def test_cold_weights_fill_more_than_a_cache() -> None:
    make = Maker(native=False, format="bf16")
    assert len(make.cold(lambda: (make.matrix(32, 64),))) == (1 << 14) // (32 * 64 * 2) + 1


def test_weights_are_used_in_turn() -> None:
    seen: list[int] = []
    run = kernels._runner(seen.append, Call([(0,), (1,), (2,)], Work("", 0)))
    run(4)
    run(3)
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_the_ceiling_is_the_longer_of_bytes_and_operations() -> None:
    assert kernels.least_seconds(Work("", 10**10), ROOF, "bf16") == 1.0
    assert kernels.least_seconds(Work("", 10**10, 10**12), ROOF, "bf16") == 10.0
    assert kernels.least_seconds(Work("", 10**10, 10**12), ROOF, "float32") == 20.0
    assert kernels.least_seconds(Work("", 10**10, 10**12), ROOF, "int8") == 10.0  # no int8 ceiling: bf16's


def test_a_line_gives_rates_by_the_median() -> None:
    row = kernels.KernelRow(
        operation="linear",
        model="tiny4",
        size="decode 2",
        implementation="native",
        num_bytes=8_000_000,
        flops=4_000_000_000,
        samples_us=(9000.0, 1000.0, 2000.0),
        share=0.5,
        speedup=2.5,
    )
    figures = ["2000.0", "8.00", "4.0", "2000.0", "50.0%", "2.50"]  # us, MB, GB/s, GFLOP/s
    assert kernels._line(row).split() == ["linear", "decode", "2", "native", *figures]
    silent = kernels._line(msgspec.structs.replace(row, flops=0))
    assert silent.split() == ["linear", "decode", "2", "native", *figures[:3], *figures[4:]]
    assert len(silent) == len(kernels._line(row)) == len(kernels.HEADER)


def test_the_table_and_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "measure_ceilings", lambda: ROOF)
    target = tmp_path / "kernels.json"
    arguments = ["--operation", "rms_norm", "mla_decode", "--model", "tiny4", "tiny3", "--size", "decode 2"]
    assert kernels.main([*arguments, "--rounds", "3", "--json", str(target)]) == 0
    report = msgspec.json.decode(target.read_bytes())
    results = msgspec.convert(report["results"], kernels.KernelResults)
    found = {(row.operation, row.model) for row in results.rows}
    assert found == {("rms_norm", "tiny4"), ("rms_norm", "tiny3"), ("mla_decode", "tiny4")}
    assert all(len(row.samples_us) == 3 for row in results.rows)
    assert results.ceilings == ROOF
    lines = capsys.readouterr().out.splitlines()
    printed = [line for line in lines if line.startswith(("rms_norm", "mla_decode"))]
    assert printed == [kernels._line(row) for row in results.rows]
