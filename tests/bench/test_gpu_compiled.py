"""The compile report without a compiler: which configurations it has, and what is a fault."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from cierzo.bench.gpu import compiled
from cierzo.bench.gpu.compiled import Compiled
from cierzo.bench.gpu.configurations import configurations
from cierzo.bench.gpu.loops import Loop

HGMMA, QGMMA = (Compiled(1, 0, 0, Loop({name: 1}, {}), waits=True) for name in ("HGMMA.64x64x16", "QGMMA.64x64x32"))


def test_every_kernel_is_in_the_report() -> None:
    """But for those that other kernels call, and those of images."""
    folder = Path(__file__).parents[2] / "kernels" / "triton"
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    kernels = re.findall(r"^@(?:kernel|chained)\ndef _(\w+)\(", text, re.MULTILINE)
    launched = {name for name in kernels if len(re.findall(rf"\b_{name}\(", text)) == 1}
    assert len(launched) > 20
    reported = {configuration.name for configuration in configurations().values()}
    assert reported == launched - {"gelu", "image_attend"}


def test_a_dry_run_meets_every_form_of_a_kernel() -> None:
    """Parts of k apart and together, pointers and descriptors, shared prefixes, prompts of several rounds, experts
    in a format that only checkpoints have."""
    forms: dict[str, set[object]] = {}
    for configuration in configurations().values():
        for name, value in configuration.constants.items():
            forms.setdefault(f"{configuration.name} {name}", set()).add(value)
    for name in ("linear APART", "linear DESCRIBED", "expert_gate_up DESCRIBED", "expert_down DESCRIBED"):
        assert forms[name] == {False, True}, name
    for name in ("flash CARRIED", "flash SINKS", "combine SINKS", "gather KEYS", "quantise_pairs STATIC"):
        assert forms[name] == {False, True}, name
    assert forms["mla_attend TOGETHER"] == forms["values TOGETHER"] == {2, 4, 8, 16}
    assert forms["mla_attend H"] == {32, 16, 8, 4}
    assert forms["flash WINDOW"] == {0, 128}
    assert forms["linear FORMAT"] == {"plain", "fp8", "fp8 woven", "nvfp4"}
    for name in ("expert_gate_up FORMAT", "expert_down FORMAT"):
        assert forms[name] == forms["linear FORMAT"] | {"mxfp4"}, name


@pytest.mark.parametrize("kernel", ["linear: linear", "expert_gate_up: expert_mlp", "expert_down: expert_mlp"])
def test_fp8_by_fp8_must_have_its_instruction(kernel: str) -> None:
    wide, codes = (configurations()[f"{kernel}, small4, one row, {format}"] for format in ("fp8", "fp8 x fp8"))
    assert compiled.faults(codes, HGMMA) == ["multiplies FP8 in another format: no QGMMA"]
    assert compiled.faults(codes, QGMMA) == compiled.faults(wide, HGMMA) == []


PTX = """.visible .entry _kernel(.param .u64 _kernel_param_0)
{
	.reg .b64 %rd<4>;
	ld.param.b64 %rd1, [_kernel_param_0];
	{before}
	griddepcontrol.wait;
	griddepcontrol.launch_dependents;
	ld.global.b32 %r1, [%rd1];
}
"""


@pytest.mark.parametrize(
    "before",
    [
        "ld.global.b32 %r1, [%rd1];",
        "@%p1 st.global.b32 [%rd1], %r1;",
        "@!%p1 bra $L__BB0_2;",
        "atom.global.gpu.acq_rel.add.u32 %r1, [%rd1], %r2;",
        "cp.async.cg.shared.global [%r1], [%rd1], 16;",
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}];",
    ],
)
def test_a_kernel_that_is_launched_early_waits_before_all_else(before: str) -> None:
    name = "linear: linear, small4, one row, fp8"
    chained, other = (configurations()[one] for one in (name, "plan: mla_decode, small4, one row, bf16"))
    early = "is launched early, and does not wait before it reads or writes"
    assert compiled.waits(PTX.replace("{before}", "mov.b32 %r1, %tid.x;")) is True
    assert compiled.waits(PTX.replace("{before}", before)) is False
    assert compiled.waits(PTX.replace("griddepcontrol.wait;", "")) is None
    for waits, wrong in ((True, []), (False, [early]), (None, [early])):
        assert compiled.faults(chained, replace(HGMMA, waits=waits)) == wrong
    assert compiled.faults(other, replace(HGMMA, waits=True)) == ["waits, and is not launched early"]
    assert compiled.faults(other, replace(HGMMA, waits=None)) == []


def test_a_kernel_that_does_not_compile_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "linear: linear, small4, one row, fp8"
    found = [(name, configurations()[name], None, "CompilationError: no registers")]
    monkeypatch.setattr(compiled, "compile_all", lambda: found)
    assert compiled.main([]) == 1
    assert "DOES NOT COMPILE: CompilationError: no registers" in capsys.readouterr().out
