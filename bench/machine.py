"""The machine that a figure belongs to, and what it can do at most: `python -m cierzo.bench.machine`."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cierzo.bench.stats import median

if TYPE_CHECKING:
    from cierzo.engine.cost.device import Device

GIGA, GIB = 1e9, 1 << 30
APART = (
    "import msgspec; from cierzo.bench.ceilings import measure_ceilings; "
    "print(msgspec.json.encode(measure_ceilings()).decode())"
)
APART_TIMEOUT_S = 600.0


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A machine as a reader needs it to judge a figure. `cores` are those this process may use."""

    processor: str
    cores: int
    memory_gib: float
    instruction_sets: tuple[str, ...]
    system: str
    python: str


class Ceiling(msgspec.Struct, frozen=True, kw_only=True):
    """The best rate found, in 10^9 a second, and what reached it."""

    rate: float
    reached_by: str


class Ceilings(msgspec.Struct, frozen=True, kw_only=True):
    """Limits that no kernel can pass: bytes read from memory a second, and operations, of which a multiplication
    and an addition are two. `threads` computed; None where nothing here can measure it."""

    threads: int
    read_one_thread: Ceiling
    read: Ceiling
    bf16: Ceiling
    float32: Ceiling
    int8: Ceiling | None

    def __str__(self) -> str:
        lines = [
            ("memory, 1 thread", "GB/s", self.read_one_thread),
            (f"memory, {self.threads} threads", "GB/s", self.read),
            ("bf16 product", "GFLOP/s", self.bf16),
            ("float32 product", "GFLOP/s", self.float32),
            ("int8 product", "GOP/s", self.int8),
        ]
        return "\n".join(
            f"{name:18} {found.rate:7.1f} {unit:8} {found.reached_by}"
            for name, unit, found in lines
            if found is not None
        )


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


def measure_apart() -> Ceilings:
    """Measure ceilings (bench/ceilings.py) in a process of its own, whose memory is free afterwards.

    Raises SubprocessError.
    """
    command = [sys.executable, "-c", APART]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=APART_TIMEOUT_S)
    return msgspec.json.decode(done.stdout, type=Ceilings)


def middle(found: Sequence[Ceilings]) -> Ceilings:
    """The ceilings in the middle of several measurements, each rate on its own. Raises ValueError for none."""

    def rate(name: str) -> Ceiling:
        each = [one for ceilings in found if (one := getattr(ceilings, name)) is not None]
        return Ceiling(rate=median([one.rate for one in each]), reached_by=each[0].reached_by)

    names = ("read_one_thread", "read", "bf16", "float32")
    int8 = rate("int8") if any(one.int8 is not None for one in found) else None
    return Ceilings(threads=found[0].threads, int8=int8, **{name: rate(name) for name in names})


def limit_device(found: Ceilings) -> Device:
    """This machine as a device that reaches everything that was measured: what a step takes there is its limit.

    Where nothing measures int8 products, the bf16 rate stands for theirs.
    """
    from cierzo.engine.cost.device import (
        Device,
    )  # imports numpy, which those who only describe the machine can spare

    machine = describe_machine()
    return Device(
        name="this machine's ceilings",
        source=f"measured on {machine.processor}",
        kind="cpu",
        bytes_per_s=found.read.rate * GIGA,
        operations_per_s={
            "bf16": found.bf16.rate * GIGA,
            "fp32": found.float32.rate * GIGA,
            "int8": (found.int8 or found.bf16).rate * GIGA,
        },
        memory_bytes=int(machine.memory_gib * GIB),
        stated={"memory": 1.0, "experts": 1.0, "products": 1.0, "attention": 1.0},
    )


def _fields(path: Path) -> dict[str, str]:
    """`name : value` lines; the first of each name (the first core speaks for all)."""
    found: dict[str, str] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    return found
