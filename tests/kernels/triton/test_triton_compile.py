"""Kernels compiled ahead of time for sm_90, in a process of their own: in this one they are the interpreter's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).parents[2] / "support" / "triton_worker.py"
# (configuration, machine instruction that does its work): one of each form; bench.gpu's report has all
COMPILED = {
    "linear: small4 o_proj bf16": "HGMMA",
    "linear: small3 gate_up fp8": "HGMMA",
    "linear: small4 absorb bf16": "HGMMA",
    "moe: small4 expert_gate_up bf16": "HGMMA",
    "moe: small4 expert_gate_up nvfp4": "HGMMA",
    "moe: small4 expert_down fp8": "HGMMA",
    "moe: small4 sum_slots bf16": "FADD",
}


def _worker(*arguments: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(WORKER), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux")
def test_some_configurations_compile_for_sm_90() -> None:
    """Nothing spills, the tensor cores work, and what the loop reads comes 16 bytes at a time and ahead of its use:
    but for NVFP4's scales, and for a loop of one step, which has nothing to be ahead of."""
    for name, compiled in _worker("compile", *COMPILED).items():
        assert compiled["spill_bytes"] == 0, name
        assert compiled["registers"] <= 255, name
        instructions = compiled["instructions"]
        assert any(found.startswith(COMPILED[name]) for found in instructions), name
        copies = {found: number for found, number in instructions.items() if found.startswith("LDGSTS")}
        wide = sum(number for found, number in copies.items() if ".128" in found)
        if "sum_slots" in name or "absorb" in name:
            assert any(found.startswith("LDG.") and ".128" in found for found in instructions), name
        else:
            assert wide >= 24, name
            assert "nvfp4" in name or wide == sum(copies.values()), name


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux")
def test_what_is_compiled_ahead_is_what_a_launch_would_compile() -> None:
    """Signature, constants and attributes of every configuration, as Triton's launcher derives them."""
    differences = _worker("bind")
    assert len(differences) > 20
    assert {name: found for name, found in differences.items() if found} == {}
