"""Products with weights, compiled for sm_90 without a GPU."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import triton
from compiled_ahead import APART, BY_FP8, COMPILED, DESCRIBED, FOUR_BITS, HOT, NAMES, TOGETHER, ask

from cierzo.bench.gpu import ceilings
from cierzo.bench.gpu.configurations import configurations

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux"),
    pytest.mark.timeout(900),  # half a minute of two cores, which others may want too
]


def test_the_names_are_those_of_configurations() -> None:
    assert [name for name in NAMES if name not in configurations()] == []


def test_some_configurations_compile_for_sm_90(compiled: dict[str, Any]) -> None:
    """Nothing spills, the tensor cores work, and what the loop reads comes 16 bytes at a time, in all its stages,
    ahead of its use: but for NVFP4's scales and what its codes meet, and for a loop of one step, which has nothing
    to be ahead of."""
    for name in COMPILED:
        assert compiled[name]["spill_bytes"] == 0, name
        assert compiled[name]["registers"] <= 255, name
        instructions = compiled[name]["instructions"]
        assert any(one.startswith(COMPILED[name]) for one in instructions), name
        copies = {one: number for one, number in instructions.items() if one.startswith("LDGSTS")}
        wide = sum(number for one, number in copies.items() if ".128" in one)
        if "sum" in name or "absorb" in name:
            assert any(one.startswith("LDG.") and ".128" in one for one in instructions), name
        else:
            assert wide == compiled[name]["stages"] * compiled[name]["turn"]["loads"]["LDGSTS.128"], name
            assert "nvfp4" in name or wide == sum(copies.values()), name
    together, apart = (_products(compiled[f"{one}, bf16"]).pop().split("x") for one in (TOGETHER, APART))
    assert (together[0], together[2]) == (apart[0], apart[2])  # outputs, and k with its types; tokens differ


def test_4_bit_weights_go_from_registers_to_the_tensor_cores(compiled: dict[str, Any]) -> None:
    """No copy of them goes back to shared memory, and no step waits for all that is under way. Of the instructions
    of 16,384 weights 240 widen them, a multiplication of two in 64."""
    for name, instructions in FOUR_BITS.items():
        turn, share = compiled[name]["turn"], compiled[name]["units"] / compiled[name]["warps"] / 4096
        assert compiled[name]["spill_bytes"] == turn["classes"].get("STS", 0) == 0, name
        assert turn["drains"] == 0, name
        assert turn["classes"]["HALF2"] == 64 * share, name
        assert turn["issued"] <= instructions * share, name


def test_descriptors_are_read_by_the_tma_for_the_same_products(compiled: dict[str, Any]) -> None:
    """Nothing else is copied ahead, but for scattered rows of x and NVFP4's scales."""
    for name, other in DESCRIBED.items():
        described = compiled[other]
        assert described["spill_bytes"] == 0, name
        assert any(one.startswith("UTMALDG") for one in described["instructions"]), name
        assert not any(one.startswith("UTMALDG") for one in compiled[name]["instructions"]), name
        copies = any(one.startswith("LDGSTS") for one in described["instructions"])
        assert copies == ("expert_gate_up" in name), name
        assert _products(described) == _products(compiled[name]), name


def _products(one: Any) -> set[str]:
    """The one shape of a matrix instruction that a kernel of products has."""
    found = {name for name in one["instructions"] if name.startswith("HGMMA.")}
    assert len(found) == 1
    return found


def test_fp8_by_fp8_runs_on_fp8_tensor_cores_and_adds_up_in_fp32(compiled: dict[str, Any]) -> None:
    """A step of 128 columns is four MMA instructions of 32, for 64 outputs; then its sums, at least 8 a thread, are
    added to the total, one by one. Nothing is widened; what the loop reads comes ahead, 16 bytes at a time."""
    for name in BY_FP8:
        assert compiled[name]["spill_bytes"] == 0, name
        instructions = compiled[name]["instructions"]
        mma = {found.split(".")[0]: 0 for found in instructions if "MMA" in found}
        for found, number in instructions.items():
            if "MMA" in found:
                mma[found.split(".")[0]] += number
        assert set(mma) == {"QGMMA"}, name
        assert mma["QGMMA"] % (8 if "gate" in name else 4) == 0, name
        added = sum(number for found, number in instructions.items() if found.startswith("FADD"))
        assert added >= 8 * mma["QGMMA"] // 4, name
        copies = {found: number for found, number in instructions.items() if found.startswith("LDGSTS")}
        wide = sum(number for found, number in copies.items() if ".128" in found)
        stages, each = compiled[name]["stages"], compiled[name]["turn"]["loads"]["LDGSTS.128"]
        assert wide == sum(copies.values()) == stages * each > 0, name


def test_what_is_compiled_ahead_is_what_a_launch_would_compile() -> None:
    """Signature, constants and attributes of every configuration, as Triton's launcher derives them."""
    differences = ask("bind")
    assert len(differences) > 20
    assert {name: found for name, found in differences.items() if found} == {}


@pytest.mark.parametrize("name", HOT)
def test_no_count_of_a_hot_loop_is_above_its_ceiling(compiled: dict[str, Any], name: str) -> None:
    """The committed report of this Triton, "triton-3.9", is the ceiling; another one's counts say nothing of it."""
    ceiling = ceilings.read(triton.__version__).get("kernels")
    if ceiling is None:
        pytest.skip(f"no report of Triton {triton.__version__} is committed: make gpu-report has 3.6 and 3.9")
    assert ceilings.rises(ceiling[name], compiled[name]) == [], "make gpu-report tells more"
