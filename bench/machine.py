"""The machine that a figure belongs to. Measured limits (bandwidth, arithmetic) come with the kernels."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import msgspec


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a reader needs to judge a figure. `cores` are those this process may use."""

    processor: str
    cores: int
    memory_gib: float
    instruction_sets: tuple[str, ...]
    system: str
    python: str


INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


def describe_machine() -> Machine:
    """Read /proc (Linux) and the interpreter; a file that is missing leaves its fields empty."""
    cpu = _fields(Path("/proc/cpuinfo"))
    memory = _fields(Path("/proc/meminfo"))
    flags = set(cpu.get("flags", "").split())
    return Machine(
        processor=cpu.get("model name", platform.processor() or platform.machine()),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=round(int(memory.get("MemTotal", "0 kB").split()[0]) / 2**20, 1),
        instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in flags),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def _fields(path: Path) -> dict[str, str]:
    """`name : value` lines; the first of each name (the first core speaks for all)."""
    found: dict[str, str] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    return found
