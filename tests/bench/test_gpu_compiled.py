"""The compile report without a compiler: which configurations it has, its columns, and the cards' limits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cierzo.bench.gpu import compiled
from cierzo.bench.gpu.compiled import STEPS, Compiled, _told
from cierzo.bench.gpu.configurations import configurations
from cierzo.engine.cost import operations
from cierzo.engine.cost.data_sheets import DATA_SHEETS
from cierzo.engine.cost.sizes import ModelSizes

HGMMA, QGMMA = (Compiled(1, 0, 0, {name: 1}) for name in ("HGMMA.64x64x16", "QGMMA.64x64x32"))


def test_every_kernel_is_in_the_report() -> None:
    """But for those that other kernels call."""
    folder = Path(__file__).parents[2] / "kernels" / "triton"
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    kernels = re.findall(r"^@kernel\ndef _(\w+)\(", text, re.MULTILINE)
    launched = {name for name in kernels if len(re.findall(rf"\b_{name}\(", text)) == 1}
    assert len(launched) > 20
    assert {configuration.name for configuration in configurations().values()} == launched


def test_a_dry_run_meets_every_form_of_a_kernel() -> None:
    """Parts of k apart and together, pointers and descriptors, shared prefixes, prompts of several rounds."""
    forms: dict[str, set[object]] = {}
    for configuration in configurations().values():
        for name, value in configuration.constants.items():
            forms.setdefault(f"{configuration.name} {name}", set()).add(value)
    for name in ("linear APART", "linear DESCRIBED", "expert_gate_up DESCRIBED", "expert_down DESCRIBED"):
        assert forms[name] == {False, True}, name
    for name in ("flash CARRIED", "flash SINKS", "combine SINKS", "gather KEYS", "quantise_pairs STATIC"):
        assert forms[name] == {False, True}, name
    assert forms["mla_attend TOGETHER"] == forms["combine TOGETHER"] == {1, 2, 4, 8, 16}
    assert forms["mla_attend H"] == {32, 16, 8, 4}
    assert forms["flash WINDOW"] == {0, 128}
    assert forms["linear FORMAT"] == {"plain", "fp8", "nvfp4"}


def test_the_limits_of_cards() -> None:
    h100, h200 = DATA_SHEETS.values()
    o_proj = {size.name: operations.linear(ModelSizes(), size.rows, 4096, 4096, "bf16") for size in STEPS}
    num_bytes = 2 * (4096 * 4096 + 2 * 64 * 4096)
    assert h100.limit_s(o_proj["decode 64"], fp8=False) == (num_bytes / 3.35e12, "memory")
    assert h200.limit_s(o_proj["decode 64"], fp8=False) == (num_bytes / 4.8e12, "memory")
    assert h100.limit_s(o_proj["prefill 4096"], fp8=False) == (2 * 4096**3 / 989.5e12, "arithmetic")
    assert h100.limit_s(o_proj["prefill 4096"], fp8=True) == (2 * 4096**3 / 1979e12, "arithmetic")


def test_the_report_gives_every_operation_a_line_for_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    compiled.print_limits()
    lines = dict(re.findall(r"^(.+?)   +([0-9].+)$", capsys.readouterr().out, re.MULTILINE))
    assert lines["linear, small4, decode 64, bf16"].split() == ["34.603", "2.147", "10.33", "7.21", "memory"]
    for format, num_bytes, time in (("bf16", "100.663", "138.90"), ("fp8 x fp8", "83.902", "69.45")):
        found = lines[f"linear, small4, prefill 4096, {format}"].split()
        assert found == [num_bytes, "137.439", time, time, "arithmetic"]
    for format, page_bytes in (("bf16", 2), ("fp8", 1)):
        num_bytes = 64 * (320 * (2 + page_bytes) + 64 * 4) + 256 * 2  # latents, angles; the norm's weights
        found = lines[f"write_normed_latents, small4, decode 64, {format}"].split()
        assert found[0] == f"{num_bytes / 1e6:.3f}"


def test_the_table_tells_loads_by_width() -> None:
    instructions = {
        "LDG.E.128.CONSTANT": 2, "LDG.E": 1, "LDG.E.U8": 3, "LDGSTS.E.BYPASS.128": 4, "LDGSTS.E": 5,
        "UTMALDG.2D": 6, "HGMMA.64x64x16.F32.BF16": 7, "STG.E.128": 9,
    }  # fmt: skip
    shown = _told(Compiled(1, 0, 0, instructions))
    assert shown == "LDG.128 2 LDG.32 1 LDG.8 3 LDGSTS.128 4 LDGSTS.32 5 UTMALDG 6 HGMMA 7"


@pytest.mark.parametrize("kernel", ["linear: linear", "expert_gate_up: expert_mlp", "expert_down: expert_mlp"])
def test_fp8_by_fp8_must_have_its_instruction(kernel: str) -> None:
    wide, codes = (configurations()[f"{kernel}, small4, one row, {format}"] for format in ("fp8", "fp8 x fp8"))
    assert compiled.faults(codes, HGMMA, 90) == ["multiplies FP8 in another format: no QGMMA"]
    assert compiled.faults(codes, QGMMA, 90) == compiled.faults(codes, HGMMA, 100) == []
    assert compiled.faults(wide, HGMMA, 90) == []


@pytest.mark.parametrize(("capability", "status"), [(80, 0), (90, 1)])
def test_fp8_is_missing_only_from_cards_that_have_none(
    capability: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "linear: linear, small4, one row, fp8"
    error = f"CompilationError: type {compiled.NO_E4M3} in this architecture"
    monkeypatch.setattr(compiled, "compile_all", lambda _: [(name, configurations()[name], None, error)])
    assert compiled.main(["--capability", str(capability)]) == status
    assert ("DOES NOT COMPILE" in capsys.readouterr().out) == bool(status)
