"""The machine that a figure belongs to, and its ceilings: bytes read from memory a second, products a second.

Bandwidth is the median of several reads of a buffer that no cache holds. A product's rate is the best of several
runs, by torch or by our own kernels: nobody's kernel, ours included, is the limit by definition.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from cierzo.engine.cost.device import Device

READ_BYTES = 512 << 20
SIDE = 2048  # of the matrices that are multiplied
ROUNDS = 5
GIGA, GIB = 1e9, 1 << 30
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


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
    read: Ceiling
    bf16: Ceiling
    float32: Ceiling
    int8: Ceiling | None


def describe_machine() -> Machine:
    """Read /proc/cpuinfo (Linux), the system and the interpreter."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    cpu = dict(re.findall(r"^(model name|flags)\s*: (.*)$", text, re.MULTILINE))  # the last core speaks for all
    return Machine(
        processor=cpu.get("model name", platform.processor() or platform.machine()),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1),
        instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in cpu.get("flags", "").split()),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def measure_ceilings() -> Ceilings:
    """Measure for a few seconds, on the threads that torch is set to. Other work on the machine lowers rates."""
    import torch  # here, as those who only describe the machine can spare it

    from cierzo.kernels.cpu import native
    from cierzo.kernels.cpu.launch.linear import linear
    from cierzo.kernels.cpu.launch.memory import read_memory
    from cierzo.kernels.pack import pack
    from cierzo.kernels.registry import has_native

    ours = native.instruction_set() if has_native() else ""
    buffer = torch.ones(READ_BYTES // 4)
    read: Callable[..., object] = read_memory if ours else torch.sum
    read_s = median(_seconds(read, buffer) for _ in range(ROUNDS))
    del buffer
    random = torch.Generator().manual_seed(0)

    def product(dtype: torch.dtype, format: str) -> Ceiling:
        """The best rate of a square product with weights in `format`. torch takes part where they are plain."""
        x, weight = (torch.randn(SIDE, SIDE, generator=random).to(dtype) for _ in range(2))
        runs: dict[str, tuple[Callable[..., object], Any]] = {}
        if format != "int8":
            runs["torch.mm"] = (torch.mm, weight.t())
        if ours:
            runs[ours] = (linear, pack(weight, format))
        best_s, winner = min(
            (min(_seconds(multiply, x, matrix) for _ in range(ROUNDS)), name)
            for name, (multiply, matrix) in runs.items()
        )
        return Ceiling(rate=2 * SIDE**3 / best_s / GIGA, reached_by=winner)

    return Ceilings(
        threads=torch.get_num_threads(),
        read=Ceiling(rate=READ_BYTES / read_s / GIGA, reached_by=ours or "torch.sum"),
        bf16=product(torch.bfloat16, "bf16"),
        float32=product(torch.float32, "float32"),
        int8=product(torch.bfloat16, "int8") if ours else None,
    )


def _seconds(run: Callable[..., object], *arguments: Any) -> float:
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def measure_apart() -> Ceilings:
    """Measure ceilings in a process of its own, whose memory is free afterwards. Raises BrokenProcessPool."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        return apart.submit(measure_ceilings).result()


def middle(found: Sequence[Ceilings]) -> Ceilings:
    """The ceilings in the middle of several measurements, at least one, each rate on its own."""

    def rate(name: str) -> Ceiling | None:
        each = [one for ceilings in found if (one := getattr(ceilings, name)) is not None]
        return Ceiling(rate=median(one.rate for one in each), reached_by=each[0].reached_by) if each else None

    rates = {name: rate(name) for name in ("read", "bf16", "float32", "int8")}
    return msgspec.structs.replace(found[0], **rates)


def limit_device(found: Ceilings) -> Device:
    """This machine as a device that reaches everything that was measured: what a step takes there is its limit.

    Where nothing measures int8 products, the bf16 rate stands for theirs.
    """
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
