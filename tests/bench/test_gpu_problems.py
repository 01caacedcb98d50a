"""What the compile report says of a kernel besides its code: the work of a step, and the cards' limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from cierzo.bench.gpu import compiled
from cierzo.bench.gpu.cases import SMALL4, make_call, without_memory
from cierzo.bench.gpu.problems import CARDS, META, STEPS, Work, problems
from cierzo.bench.kernel_cases import Call, Model, Size
from cierzo.engine.roofline.cards import DATA_SHEETS, HOPPER_RATES
from cierzo.kernels.formats.device import quantise
from cierzo.kernels.triton.compile import Compiled

DECODE, PREFILL = STEPS


def works(*purposes: str) -> Iterator[dict[str, Work]]:
    """Of the kernels of those purposes, by step."""
    known = {purpose: configuration for _, purpose, configuration in compiled.configurations()}
    for purpose in purposes:
        yield dict(problems(known[purpose]))


def case(operation: str, model: Model, size: Size, format: str = "bf16") -> Call:
    call = make_call(operation, model, size, format, META, cold_bytes=0)
    assert call is not None
    return call


def test_every_kernel_has_a_problem() -> None:
    for _, purpose, configuration in compiled.configurations():
        found = dict(problems(configuration))
        assert found, purpose
        assert set(found) <= {"decode 64", "prefill 4096"}
        assert all(work.num_bytes > 0 for work in found.values()), purpose


@pytest.mark.parametrize("format", ["bf16", "fp8", "nvfp4"])
def test_parts_of_the_experts_add_up_to_the_operation(format: str) -> None:
    names = (f"small4 expert_gate_up {format}", f"small4 expert_down {format}")
    for size in STEPS:
        up, down = (found[size.name] for found in works(*names))
        call = case("expert_mlp", SMALL4, size, format)
        assert up.flops + down.flops == call.flops
        rows = size.rows * 5  # of four experts and the shared one
        between = rows * (2 * 2048 + 4096) * 2 - size.rows * 4096 * 2  # inner, twice; outputs, which the sum reads
        assert up.num_bytes + down.num_bytes == call.num_bytes + between


def test_rows_of_codes_are_half_as_wide_and_have_a_scale() -> None:
    wide, codes = works("small4 o_proj fp8", "small4 o_proj fp8 x fp8")
    assert wide["decode 64"].num_bytes - codes["decode 64"].num_bytes == 64 * (4096 - 4)
    wide, codes = works("small4 expert_down fp8", "small4 expert_down fp8 x fp8")
    assert wide["decode 64"].num_bytes - codes["decode 64"].num_bytes == 64 * 5 * (2048 - 4)
    by_row, static = works("small4 shared_gate_up fp8 x fp8", "small4 shared_gate_up fp8 x fp8, static")
    assert by_row["decode 64"].num_bytes - static["decode 64"].num_bytes == 64 * (2048 - 4)
    (pairs,) = works("small4 experts, static")
    assert pairs["decode 64"] == Work(64 * (4096 * 2 + 5 * 4100))


def test_parts_of_a_prompts_attention_add_up_to_the_operation() -> None:
    parts = ("expand keys", "expand values", "flash")
    flops = sum(
        found["prefill 4096"].flops for found in works(*(f"mla_prefill 16 heads, {part}" for part in parts))
    )
    assert flops == case("mla_prefill", replace(SMALL4, heads=16), PREFILL).flops


def test_work_of_products_and_the_limits_of_cards() -> None:
    (o_proj, paired, head, absorb) = works(
        "small4 o_proj bf16", "small4 shared_gate_up bf16", "small4 lm_head bf16", "small4 absorb bf16"
    )
    weights, rows = 4096 * 4096 * 2, 64 * 4096 * 2
    assert o_proj["decode 64"] == Work(weights + 2 * rows, 2 * 64 * 4096 * 4096)
    assert paired["decode 64"] == Work(weights + rows + rows // 2, 2 * 64 * 4096 * 4096)
    assert head["decode 64"] == Work(131_072 * 4096 * 2 + rows + 64 * 131_072 * 4, 2 * 64 * 4096 * 131_072)
    assert set(absorb) == {"decode 64"}
    h100, h200 = CARDS
    assert o_proj["decode 64"].limit_s(h100, fp8=False) == ((weights + 2 * rows) / 3.35e12, "memory")
    assert o_proj["decode 64"].limit_s(h200, fp8=False) == ((weights + 2 * rows) / 4.8e12, "memory")
    assert o_proj["prefill 4096"].limit_s(h100, fp8=False) == (2 * 4096**3 / 989.5e12, "arithmetic")
    assert o_proj["prefill 4096"].limit_s(h100, fp8=True) == (2 * 4096**3 / 1979e12, "arithmetic")


def test_cards_are_the_ones_of_the_data_sheets() -> None:
    """engine/roofline has them too, and takes msgspec, which a machine with a card may lack."""
    for card, name in zip(CARDS, ("h100", "h200"), strict=True):
        assert card.name.lower().startswith(name)
        assert (card.memory, card.bf16, card.fp8) == (
            DATA_SHEETS[name][0],
            HOPPER_RATES["bf16"],
            HOPPER_RATES["fp8"],
        )


@pytest.mark.parametrize("format", ["fp8", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("shape", [(6, 64), (3, 6, 64)])
def test_a_matrix_without_memory_has_the_bytes_of_a_quantised_one(format: str, shape: tuple[int, ...]) -> None:
    quantised, empty = quantise(torch.ones(shape).bfloat16(), format), without_memory(format, shape)
    for name in ("codes", "scales", "row_scales"):
        one, other = getattr(quantised, name), getattr(empty, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.nbytes == other.nbytes, name
    assert (quantised.shape, quantised.block) == (empty.shape, empty.block)


def test_the_table_tells_loads_by_width() -> None:
    instructions = {
        "LDG.E.128.CONSTANT": 2, "LDG.E": 1, "LDG.E.U8": 3, "LDGSTS.E.BYPASS.128": 4, "LDGSTS.E": 5,
        "UTMALDG.2D": 6, "HGMMA.64x64x16.F32.BF16": 7, "STG.E.128": 9,
    }  # fmt: skip
    shown = compiled._instructions(Compiled(1, 0, 0, instructions))
    assert shown == "LDG.128 2 LDG.32 1 LDG.8 3 LDGSTS.128 4 LDGSTS.32 5 UTMALDG 6 HGMMA 7"


def test_the_report_gives_every_step_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    (known,) = [one for _, purpose, one in compiled.configurations() if purpose == "small4 o_proj bf16"]
    for instruction in ("HGMMA.64x64x16", "QGMMA.64x64x32"):
        compiled.print_limits([("small4 o_proj bf16", known, Compiled(1, 0, 0, {instruction: 1}))])
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("linear ")]
        assert [line[4:6] for line in lines] == [["decode", "64"], ["prefill", "4096"]]
        assert lines[0][6:] == ["34.603", "2.147", "10.33", "7.21", "memory"]
        time = "138.90" if instruction.startswith("H") else "69.45"
        assert lines[1][6:] == ["100.663", "137.439", time, time, "arithmetic"]


@pytest.mark.parametrize(("capability", "status"), [(80, 0), (90, 1)])
def test_fp8_is_missing_only_from_cards_that_have_none(
    capability: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (known,) = [one for _, purpose, one in compiled.configurations() if purpose == "small4 o_proj bf16"]
    error = f"CompilationError: type {compiled.NO_E4M3} in this architecture"
    monkeypatch.setattr(compiled, "compile_all", lambda _: [("linear", "small4 o_proj fp8", known, None, error)])
    assert compiled.main(["--capability", str(capability)]) == status
    assert ("DOES NOT COMPILE" in capsys.readouterr().out) == bool(status)
