"""Triton's compiler for tests whose own process has Triton's interpreter: in a process of its own."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("triton_worker.py")
# Products that are cut over k: their parts in one program, or each in its own.
TOGETHER, APART = (f"linear: linear, small4 latents, {rows}" for rows in ("500 rows", "one row"))
# Configurations of which another form, of the same tile, reads through descriptors.
DESCRIBED = {
    f"{TOGETHER}, bf16": f"{TOGETHER}, bf16, TMA",
    "linear: gated_mlp, small3, 128 rows, fp8": "linear: gated_mlp, small3, 500 rows, fp8, TMA",
    "expert_gate_up: expert_mlp, small4, 500 rows, bf16": "expert_gate_up: expert_mlp, small4, 500 rows, bf16, TMA",
    "expert_down: expert_mlp, small4, 500 rows, fp8": "expert_down: expert_mlp, small4, 500 rows, fp8, TMA",
}
# configuration -> the machine instruction that does its work; `make gpu-report` has all configurations
COMPILED = {
    "linear: linear, small4, one row, bf16": "HGMMA",
    "linear: gated_mlp, small3, one row, fp8": "HGMMA",
    "linear: mla_absorb, small4, one row, bf16": "HGMMA",
    **{f"{TOGETHER}, {format}": "HGMMA" for format in ("bf16", "nvfp4")},
    **{f"{APART}, {format}": "HGMMA" for format in ("bf16", "nvfp4")},
    "sum_parts: linear, small4 latents, one row, bf16": "FADD",
    "expert_gate_up: expert_mlp, small4, 500 rows, bf16": "HGMMA",
    "expert_gate_up: expert_mlp, small4, one row, nvfp4": "HGMMA",
    "expert_down: expert_mlp, small4, one row, fp8": "HGMMA",
    "sum_terms: expert_mlp, small4, one row, bf16": "FADD",
}
# FP8 by FP8: one of each kernel and kind of result
BY_FP8 = (
    "linear: linear, small4, one row, fp8 x fp8",
    "linear: gated_mlp, small3, one row, fp8 x fp8",
    "linear: gated_mlp, small3, one row, static fp8 x fp8",
    "expert_gate_up: expert_mlp, small4, one row, static fp8 x fp8",
    "expert_down: expert_mlp, small4, one row, fp8 x fp8",
)
DECODE = [
    "mla_attend: mla_decode, small4, one row, bf16",
    "mla_attend: mla_decode, small4, one row, fp8",
    "mla_attend: mla_decode, small4 / 8, one row, fp8",
    "gqa_attend: gqa_decode, small3, one row, bf16",
    "gqa_attend: gqa_decode, small3, one row, fp8",
    "gqa_attend: gqa_decode, gpt-oss, window 128, one row, bf16",
    "gqa_attend: gqa_decode, gpt-oss, window 128, one row, fp8",
]
PREFILL = [
    "flash: mla_prefill, small4, prefill, bf16",
    "flash: mla_prefill, small4, long prefill, bf16",
    "expand: mla_prefill, small4, prefill, bf16",
    "flash: gqa_prefill, small3, long prefill, bf16",
    "flash: gqa_prefill, gpt-oss, long prefill, bf16",
    "flash: gqa_prefill, gpt-oss, window 128, long prefill, bf16",
]
OTHERS = [
    "plan: mla_decode, small4, one row, bf16",
    "combine: mla_decode, small4, one row, bf16",
    "prefixes: mla_decode, small4, decode, bf16",
    "combine: gqa_decode, gpt-oss, window 128, one row, bf16",
    "gather: mla_prefill, small4, prefill, bf16",
    "gather: mla_prefill, small4, prefill, fp8",
    "gather: gqa_prefill, gpt-oss, prefill, fp8",
    "rope_tables: rope_tables, small4, one row, bf16",
    "apply_rope: apply_rope, small4, one row, bf16",
    "write_normed_latents: write_normed_latents, small4, one row, fp8",
    "rotate_and_write: rotate_and_write_keys_values, small3, one row, fp8",
]


EXPERTS = [
    f"{kernel}: expert_mlp, small4, one row, {format}"
    for kernel in ("expert_gate_up", "expert_down")
    for format in ("nvfp4", "fp8")
]
# Experts of 4 bits -> instructions of a warp for 16,384 weights that the worse of Triton 3.6 and 3.9 reaches.
FOUR_BITS = {
    "expert_gate_up: expert_mlp, small4, one row, nvfp4": 492,
    "expert_down: expert_mlp, small4, one row, nvfp4": 492,
    "expert_down: expert_mlp, small4, 24 rows, nvfp4": 401,
    "expert_gate_up: expert_mlp, small4, 24 rows, mxfp4": 423,
    "expert_gate_up: expert_mlp, small4, 500 rows, nvfp4": 438,
    "expert_gate_up: expert_mlp, small4, long prefill, nvfp4": 692,
}
# The loops that most of a step's time is spent in, whose counts may only fall.
HOT = [
    *EXPERTS,
    *(name for name in FOUR_BITS if name not in EXPERTS),
    *(f"{kernel}: expert_mlp, small4, 500 rows, fp8, TMA" for kernel in ("expert_gate_up", "expert_down")),
    *(f"linear: linear, small4, one row, {format}" for format in ("bf16", "fp8", "nvfp4")),
    "linear: lm_head, small4, one row, bf16",
    "flash: mla_prefill, small4, long prefill, bf16",
    "linear: gated_mlp, small3, one row, fp8",
    "gqa_attend: gqa_decode, small3, one row, bf16",
]
NAMES = [*dict.fromkeys([*COMPILED, *BY_FP8, *DESCRIBED, *DESCRIBED.values(), *DECODE, *PREFILL, *OTHERS, *HOT])]


def ask(*arguments: str) -> Any:
    """The answer of triton_worker.py to a command."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(WORKER), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def compiled_once(folder: Path) -> dict[str, Any]:
    """NAMES, compiled: by the first process that asks, which leaves the answer in a folder for the others."""
    found = folder / "compiled.json"
    with (folder / "compiled.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            found.write_text(json.dumps(ask("compile", *NAMES)), encoding="utf-8")
    return json.loads(found.read_text(encoding="utf-8"))
