"""Ceilings of what machine code costs: what counts as a rise, per weight or token, and the committed reports."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from cierzo.bench.gpu import ceilings, compiled
from cierzo.bench.gpu.compiled import FLUSHING, Compiled
from cierzo.bench.gpu.configurations import configurations, digest, fingerprint
from cierzo.bench.gpu.loops import Loop
from cierzo.kernels.cuda.launch.kernel import program
from cierzo.kernels.triton import activations
from cierzo.kernels.triton.launch import Configuration

VERSIONS = ("3.6", "3.9")
NAME = "linear: lm_head, small4, 64 rows, bf16"
CONFIGURATION = configurations()[NAME]  # 128 outputs, 64 tokens, 64 of k, 4 warps
TURN = {
    "HGMMA.64x128x16.F32.BF16": 4, "WARPGROUP.DEPBAR.LE 0": 1, "DEPBAR.LE 4": 1, "F2F.BF16.F16": 64,
    "LDGSTS.E.BYPASS.128": 8, "BAR.SYNC": 2, "IADD3": 20,
}  # fmt: skip


def line_of(turn: dict[str, int] = TURN, **fields: Any) -> dict[str, Any]:
    """The report's line of a kernel with such a loop."""
    return ceilings.entry(CONFIGURATION, Compiled(200, 0, 1000, Loop(turn, {"EXIT": 1}), True, **fields))


def test_a_turn_is_counted_in_the_weights_that_its_products_take() -> None:
    line = line_of()
    assert (line["unit"], line["units"]) == ("weights", 128 * 64)
    assert (line["warps"], line["loops"], line["outside"]) == (4, True, {"CONTROL": 1})
    assert line["turn"]["issued"] == 100
    assert line["turn"]["classes"]["F2F"] == 64
    assert line["turn"]["loads"] == {"LDGSTS.128": 8}
    assert ceilings.measures(line)["instructions a weight"] == 100 * 4 / 8192


def test_twice_the_turn_for_twice_the_weights_is_no_rise() -> None:
    twice = line_of({name: 2 * number for name, number in TURN.items()})
    assert twice["units"] == 2 * 128 * 64
    assert ceilings.rises(line_of(), twice) == ceilings.rises(twice, line_of()) == []


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"IADD3": 21}, "instructions a weight"),
        ({"F2F.BF16.F16": 65, "IADD3": 19}, "F2F a weight"),
        ({"WARPGROUP.DEPBAR.LE 0": 2, "IADD3": 19}, "drains a weight"),
        ({"DEPBAR.LE 4": 2, "IADD3": 19}, "WAIT a weight"),
        ({"BAR.SYNC": 3, "IADD3": 19}, "BARRIER a weight"),
        ({"LDL": 1, "IADD3": 19}, "LOCAL a weight"),
        ({"LDS.128": 1, "IADD3": 19}, "LDS a weight"),
        ({"STS": 1, "IADD3": 19}, "STS a weight"),
        ({"LDGSTS.E.BYPASS.128": 7, "LDGSTS.E.64": 2, "IADD3": 19}, "LDGSTS.64 a weight"),
        ({"HGMMA.64x128x16.F32.BF16": 0, "HGMMA.64x64x16.F32.BF16": 8, "IADD3": 16}, "HGMMA.64x64x16"),
    ],
)
def test_each_count_has_a_ceiling(more: dict[str, int], told: str) -> None:
    risen = ceilings.rises(line_of(), line_of(TURN | more))
    assert any(one.startswith(told) for one in risen), risen
    assert told == "instructions a weight" or not any(one.startswith("instructions") for one in risen)


def test_fewer_is_no_rise_and_spills_and_flushes_are() -> None:
    assert ceilings.rises(line_of(), line_of(TURN | {"IADD3": 3, "F2F.BF16.F16": 0})) == []
    spilled = ceilings.entry(CONFIGURATION, Compiled(200, 8, 1000, Loop(TURN, {}), True))
    assert ceilings.rises(line_of(), spilled) == ["spilled bytes: 8 above 0"]
    assert ceilings.rises(line_of(), line_of(flushes={"FADD.FTZ": 2})) == ["FADD.FTZ: 2 above 0"]


@pytest.mark.parametrize(
    ("worse", "told"),
    [
        ({"registers": 201}, "registers: 208 above 200"),
        ({"shared_bytes": 1001}, "shared bytes: 1001 above 1000"),
        ({"outside": {"CONTROL": 1, "ALU": 49}}, "instructions outside the loop: 200 above 4"),
        ({"stages": CONFIGURATION.num_stages - 1}, f"stages: {CONFIGURATION.num_stages - 1} below "),
    ],
)
def test_what_a_program_takes_and_does_before_its_loop_has_a_ceiling_and_stages_a_floor(
    worse: dict[str, Any], told: str
) -> None:
    (risen,) = ceilings.rises(line_of(), line_of() | worse)
    assert risen.startswith(told)
    assert ceilings.rises(line_of() | worse, line_of()) == []


def test_registers_within_a_step_of_their_allocation_are_no_rise() -> None:
    assert ceilings.rises(line_of() | {"registers": 193}, line_of()) == []


def test_a_renamed_line_keeps_its_ceiling_and_a_configuration_that_changes_its_kernel_too() -> None:
    line, more = line_of(), line_of(TURN | {"IADD3": 21})
    risen = ["instructions a weight: 0.0493164 above 0.0488281"]
    assert ceilings.risen({"before": line}, {"now": line}) == {}
    assert ceilings.risen({"before": line}, {"now": more}) == {"now": risen}
    assert ceilings.risen({"same": line}, {"same": more | {"configuration": "other"}}) == {"same": risen}
    # the configuration of one name under another that had a worse one
    both = {"same": more | {"configuration": "other"}, "before": line}
    assert ceilings.risen(both, {"same": more, "before": line}) == {"same": risen}
    gone = ceilings.risen({"before": line}, {"now": more | {"configuration": "other"}})
    assert gone == {"before": ["a ceiling that no kernel has any more"]}
    assert ceilings.risen({}, {"now": more}) == {}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_committed_line_is_at_its_own_ceilings(version: str) -> None:
    lines = ceilings.read(version)["kernels"]
    assert ceilings.risen(lines, lines) == {}
    stage_less = {name: line | {"stages": line["stages"] - 1} for name, line in lines.items()}
    assert ceilings.risen(lines, stage_less).keys() == lines.keys()


def test_products_that_are_not_of_whole_tiles_are_refused() -> None:
    with pytest.raises(
        ValueError, match="linear: 655360 products in a turn of loop 1 of 1, no multiple of 524288, nor a part"
    ):
        line_of(TURN | {"HGMMA.64x128x16.F32.BF16": 5})
    turn = Loop({"IADD3": 1}, {"HGMMA.64x128x16.F32.BF16": 4}, place=(2, 3))
    with pytest.raises(ValueError, match="linear: 0 products in a turn of loop 2 of 3"):
        ceilings.units(CONFIGURATION, turn)


def test_a_turn_may_do_a_part_of_a_tile_and_without_matrix_instructions_does_one() -> None:
    assert line_of(TURN | {"HGMMA.64x128x16.F32.BF16": 2})["units"] == 128 * 64 // 2
    assert ceilings.units(CONFIGURATION, Loop({"FFMA": 64}, {"EXIT": 1})) == ("weights", 128 * 64)


def test_kernels_of_products_are_known_by_their_constants() -> None:
    for name, configuration in configurations().items():
        found, of = ceilings.unit(configuration), configuration.constants
        assert (found is None) == (not ({"BLOCK_T", "DEPTH"} & of.keys() or configuration.name in ceilings.WIDTHS))
        if found is not None:
            assert ceilings.tile_of(configuration) * configuration.num_warps == found[2], name
    new = Configuration(CONFIGURATION.kernel, {}, {"BLOCK_N": 64, "BLOCK_T": 16, "BLOCK_K": 128, "PAIRED": True})
    assert ceilings.unit(new) == ("weights", 2 * 64 * 128, 2 * 64 * 128 * 16)
    assert ceilings.unit(Configuration(CONFIGURATION.kernel, {}, {"BLOCK_N": 64})) is None
    assert ceilings.tile_of(Configuration(CONFIGURATION.kernel, {}, {})) == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_the_committed_reports_are_of_these_kernels(version: str) -> None:
    report = ceilings.read(version)
    wanted = "the kernels have changed: run `make gpu-report`, which compiles them with Triton 3.6 and 3.9"
    assert report["sources"] == fingerprint(), wanted
    assert {name: line["configuration"] for name, line in report["kernels"].items()} == {
        name: digest(configuration) for name, configuration in configurations().items()
    }, wanted
    assert report["triton"].startswith(f"{version}.")


def test_the_digest_of_sources_covers_what_kernels_call_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """softmax_step is called by a function that a kernel calls; LARGEST is read by functions that kernels call; and
    CUDA C++ is read from its files."""
    before = fingerprint()
    changed = {"softmax_step": "", "token_of": ""}
    for name in changed:
        with monkeypatch.context() as patch:
            patch.setattr(
                f"{fingerprint.__module__}.getsource",
                lambda one, name=name: inspect.getsource(one) + "#" * (one.__name__ == name),
            )
            changed[name] = fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(activations.LARGEST, "value", 1.0)
        changed["LARGEST"] = fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(f"{fingerprint.__module__}.program", lambda name: f"{program(name)}//" * (name == "route.cu"))
        changed["route.cu"] = fingerprint()
    assert len({before, *changed.values()}) == 5
    assert fingerprint() == before


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_that_is_committed_spills_or_flushes_what_is_not_known(version: str) -> None:
    """Local memory and spills are zero; so are flushes, but for the two that Triton has no other form of, in
    softmax and norms, and those within divisions of integers."""
    for name, line in ceilings.read(version)["kernels"].items():
        assert (
            line["spill_bytes"] == line["turn"]["classes"].get("LOCAL", 0) == line["outside"].get("LOCAL", 0) == 0
        )
        assert set(line["flushes"]) <= set(FLUSHING), name
        if "ex2.approx.ftz.f32" in line["flushes"]:
            assert name.split(":")[0] in ("mla_attend", "gqa_attend", "flash", "combine", "values"), name
        if "rsqrt.approx.ftz.f32" in line["flushes"]:
            assert "norm" in name or name.startswith("latents_of"), name


@pytest.mark.parametrize("version", VERSIONS)
def test_products_of_a_turn_are_those_of_its_tile(version: str) -> None:
    """Today's compilers unroll no loop of ours; a kernel without a loop does all its tiles at once, and one of a
    single product, behind other work, is counted whole."""
    for name, line in ceilings.read(version)["kernels"].items():
        found = ceilings.unit(configurations()[name])
        assert (line["unit"] != "turns") == (found is not None), name
        if name.split(":")[0] not in ("values", "rotate_and_absorb"):
            assert (found is not None) == bool(line["turn"]["mma"]), name
        if found is not None and line["loops"]:
            assert line["units"] == found[1], name


@pytest.mark.parametrize(("more", "options", "status"), [(0, [], 0), (1, [], 1), (1, ["--accept"], 0), (-1, [], 0)])
def test_a_report_is_written_unless_a_count_rose(
    more: int,
    options: list[str],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ceilings, "RESULTS", tmp_path)
    ceilings.write(compiled.triton.__version__, {NAME: line_of()})
    turn = TURN | {"IADD3": TURN["IADD3"] + more}
    found = Compiled(200, 0, 1000, Loop(turn, {}), True, waits=True)
    monkeypatch.setattr(compiled, "compile_all", lambda: [(NAME, CONFIGURATION, found, "")])
    assert compiled.main(options) == status
    told = capsys.readouterr().out
    word = "ACCEPTED" if options else "RISEN"
    assert (f"{word}: {NAME}: instructions a weight: 0.0493164 above 0.0488281" in told) == (more > 0)
    issued = 100 if status else 100 + more
    assert json.loads(ceilings.path("3.9.1").read_text())["kernels"][NAME]["turn"]["issued"] == issued
    assert f"{issued if not status else 101:9}" in told


def test_a_fault_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even on demand: spills and unknown flushes are no counts that one accepts."""
    monkeypatch.setattr(ceilings, "RESULTS", tmp_path)
    for fault in (
        Compiled(255, 8, 0, Loop(TURN, {}), waits=True),
        Compiled(9, 0, 0, Loop(TURN, {"STL": 1}), waits=True),
        Compiled(9, 0, 0, Loop(TURN, {}), waits=False),
    ):
        monkeypatch.setattr(compiled, "compile_all", lambda fault=fault: [(NAME, CONFIGURATION, fault, "")])
        assert compiled.main(["--accept"]) == 1
    assert list(tmp_path.iterdir()) == []
    flushing = Compiled(9, 0, 0, Loop(TURN, {}), True, {"ex2.approx.ftz.f32": 1, "FADD.FTZ": 2}, waits=True)
    assert compiled.faults(CONFIGURATION, flushing) == ["flushes subnormals: FADD.FTZ"]
