"""Every kernel compiled ahead of time, without a GPU: `python -m cierzo.bench.gpu.compiled`, `make gpu-report`.

Per configuration: registers and spills of a thread, shared memory of a program, the widths of its loads, and which
matrix instructions it has. Spills on sm_90 and more shared memory than a card has are faults; exit status 1. For
sm_90 also what each operation moves and computes in a step, and the time of that at the limits of the cards.

With another Triton's folder first in PYTHONPATH, that one compiles: `make gpu-report TRITON=3.6`.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from subprocess import run
from tempfile import NamedTemporaryFile

import torch
import triton

from cierzo.bench.gpu.calls import cells, make_call
from cierzo.bench.gpu.configurations import configurations
from cierzo.bench.gpu.timing import SIZES
from cierzo.engine.cost.data_sheets import DATA_SHEETS
from cierzo.kernels.triton.compile import compile_ahead
from cierzo.kernels.triton.launch import Configuration

# Of a program; CUDA programming guide, table of technical specifications per compute capability.
SHARED_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
NO_E4M3 = "fp8e4nv not supported"  # what Triton says of kernels in FP8 before sm_89
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.MULTILINE)
STEPS = [size for size in SIZES if size.name in ("decode 64", "prefill 4096")]
WIDTH = 80  # of a name's column
WIDTHS = ("128", "64", "U16", "S16", "U8", "S8")  # of a load, as modifiers; without one it has 32 bits


@dataclass(frozen=True, slots=True)
class Compiled:
    """Registers and spill bytes of a thread, shared bytes of a program.

    instructions: how often each machine instruction occurs in the code, with its modifiers ("LDG.E.128").
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]

    def count(self, prefix: str) -> int:
        """Number of instructions whose name begins with `prefix`, such as "HGMMA" or "LDGSTS"."""
        return sum(number for name, number in self.instructions.items() if name.startswith(prefix))


def inspect(configuration: Configuration, capability: int = 90) -> Compiled:
    """Compile for a compute capability, and read the machine code with the disassembler in Triton's wheel.

    Raises what the compiler raises.
    """
    compiled = compile_ahead(configuration, capability)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            run([tools / tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    fields = dict(re.findall(r"\b([A-Z]+):(\d+)", usage))
    registers, stack, local = (int(fields[name]) for name in ("REG", "STACK", "LOCAL"))
    return Compiled(registers, stack + local, compiled.metadata.shared, dict(Counter(INSTRUCTION.findall(code))))


def compile_one(number: int, capability: int) -> tuple[Compiled | None, str]:
    """The number-th configuration, compiled in this process: (Compiled or None, error)."""
    configuration = list(configurations().values())[number]
    try:
        return inspect(configuration, capability), ""
    except Exception as error:  # whatever a compiler says is part of the report
        cause = str(error.__cause__ or error).split()
        return None, f"{type(error).__name__}: {' '.join(cause)[-200:]}"


def compile_all(capability: int) -> list[tuple[str, Configuration, Compiled | None, str]]:
    """(name, Configuration, Compiled or None, error) of every configuration, on all cores."""
    listed = configurations()
    # Not forked: this process may hold a card already, whose driver does not survive that.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = list(pool.map(compile_one, range(len(listed)), [capability] * len(listed)))
    return [(*one, *result) for one, result in zip(listed.items(), found, strict=True)]


def warm(capability: int) -> dict[str, int]:
    """Fill Triton's cache for this card; how many were compiled, how many failed."""
    errors = [error for *_, error in compile_all(capability)]
    return {"configurations": len(errors), "failed": sum(map(bool, errors))}


def faults(configuration: Configuration, compiled: Compiled, capability: int) -> list[str]:
    """Faults of a compiled kernel: what it must not have, or lacks."""
    found, types = [], configuration.types
    factors = types.get("x_ptr", types.get("inner_ptr")), types.get("codes_ptr")  # codes are the result of others
    if factors == ("*fp8e4nv", "*fp8e4nv") and capability == 90 and not compiled.count("QGMMA"):
        found.append("multiplies FP8 in another format: no QGMMA")
    if compiled.spill_bytes and capability == 90:
        found.append(f"spills {compiled.spill_bytes} bytes")
    if compiled.shared_bytes > SHARED_LIMIT_BYTES[capability]:
        found.append(f"needs {compiled.shared_bytes} bytes of shared memory")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; exit status 1 if a kernel has a fault or does not compile."""
    parser = argparse.ArgumentParser(prog="cierzo.bench.gpu.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90, choices=sorted(SHARED_LIMIT_BYTES))
    capability = parser.parse_args(argv).capability
    print(f"Triton {triton.__version__}, compute capability {capability / 10}")
    print(f"{'kernel, for':{WIDTH}}{'registers':>10}{'spills':>8}{'shared':>9}  loads, copies, matrix instructions")
    bad = 0
    for name, configuration, compiled, error in compile_all(capability):
        if compiled is None:
            refused = capability < 89 and NO_E4M3 in error
            told = "  not for this card, which has no FP8" if refused else f"  DOES NOT COMPILE: {error}"
            bad += not refused
        else:
            wrong = faults(configuration, compiled, capability)
            told = f"{compiled.registers:10}{compiled.spill_bytes:8}{compiled.shared_bytes:9}  {_told(compiled)}"
            told += f"  FAULT: {', '.join(wrong)}" if wrong else ""
            bad += bool(wrong)
        print(f"{name:{WIDTH}}{told}")
    if capability == 90:
        print_limits()
    return 1 if bad else 0


def print_limits() -> None:
    """Print what each operation moves and computes in a step, and how long the cards take for that at least."""
    print("\nAt least: each byte once, each operation once, at the memory's and the tensor cores' data-sheet rates")
    cards = DATA_SHEETS.values()
    for card in cards:
        rates = f"{card.bytes_per_s / 1e12} TB/s, {card.bf16 / 1e12} TFLOP/s, {card.fp8 / 1e12} of FP8"
        print(f"  {card.name}: {rates}")
    heads = "".join(f"{card.name + ', us':>14}" for card in cards)
    print(f"{'operation':{WIDTH}}{'MB':>12}{'GFLOP':>11}{heads}  limit")
    for name, cell in cells(STEPS):
        call = make_call(*cell, torch.device("meta"), cold_bytes=0)
        if call is not None:
            limits = [card.limit_s(call[1], name.endswith("x fp8")) for card in cards]
            times = "".join(f"{seconds * 1e6:14.2f}" for seconds, _ in limits)
            which = " / ".join(dict.fromkeys(what for _, what in limits))
            num_bytes, flops = call[1].num_bytes / 1e6, call[1].operations / 1e9
            print(f"{name:{WIDTH}}{num_bytes:12.3f}{flops:11.3f}{times}  {which}")


def _told(compiled: Compiled) -> str:
    """Loads and copies by the bits that a thread moves; TMA's, which one thread starts for a tile; products. Loads,
    copies, products in this order; wide ones first."""
    found: Counter[tuple[bool, str, int]] = Counter()
    for name, number in compiled.instructions.items():
        kind, *modifiers = name.split(".")
        if kind in ("LDG", "LDGSTS"):
            width = next((part.lstrip("US") for part in modifiers if part in WIDTHS), "32")
            found[False, kind, -int(width)] += number
        elif kind in ("UTMALDG", "HGMMA", "QGMMA", "HMMA", "QMMA", "IMMA"):
            found["MMA" in kind, kind, 0] += number
    return " ".join(
        f"{kind}{f'.{-width}' if width else ''} {number}" for (_, kind, width), number in sorted(found.items())
    )


if __name__ == "__main__":
    raise SystemExit(main())
