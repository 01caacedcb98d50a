"""Every kernel compiled ahead of time, without a GPU: `python -m cierzo.bench.gpu.compiled`, `make gpu-report`.

Per configuration: registers and spills of a thread, shared memory of a program, the widths of its loads, its matrix
instructions, and what one turn of its main loop issues. For sm_90 also what each operation moves and computes in a
step, and the time of that at the limits of the cards; and the counts become ceilings (ceilings.py). A kernel with a
fault (`faults`), one that does not compile, or a count above its ceiling: exit status 1, and nothing is written.

With another Triton's folder first in PYTHONPATH, that one compiles: `make gpu-report TRITON=3.6`.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from subprocess import run
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton

from cierzo.bench.gpu import ceilings, predicted
from cierzo.bench.gpu.calls import cells, make_call
from cierzo.bench.gpu.configurations import configurations
from cierzo.bench.gpu.loops import Loop, class_of, main_loop, whole, widths
from cierzo.bench.gpu.timing import SIZES
from cierzo.engine.cost.data_sheets import DATA_SHEETS
from cierzo.kernels.triton.compile import compile_ahead
from cierzo.kernels.triton.launch import Configuration

# Of a program; CUDA programming guide, table of technical specifications per compute capability.
SHARED_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
NO_E4M3 = "fp8e4nv not supported"  # what Triton says of kernels in FP8 before sm_89
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.MULTILINE)
# Subnormals taken for zeros, asked for in PTX (ex2.approx.ftz.f32) or put there by the assembler (FADD.FTZ). Those
# of FLUSHING are known: `tl.exp2` and `tl.rsqrt` have no other form. A softmax's weights below 2^-126 are then zero
# beside one that is 1: the result changes by less than 2^-108 of the largest value. A norm's mean square has its
# epsilon added, and is never subnormal. The assembler divides integers by way of the reciprocal of one. Its routine
# for quotients of floats, behind ROUTINES, tells infinities and NaN with such instructions and keeps subnormals.
FLUSH = re.compile(r"\b[a-z][a-z0-9.]*\.ftz[a-z0-9.]*|\b[A-Z][A-Z0-9.]*\.FTZ[A-Z0-9.]*")
FLUSHING = ("ex2.approx.ftz.f32", "rsqrt.approx.ftz.f32", "F2I.FTZ.U32.TRUNC.NTZ")
ROUTINES = "\n$__internal"
STEPS = [size for size in SIZES if size.name in ("decode 64", "prefill 4096")]
WIDTH = 80  # of a name's column
COLUMNS = (
    "FP32", "HALF2", "IMAD", "LOP3", "SHF", "PRMT", "ALU", "F2F", "F2FP", "MUFU", "UNIFORM", "LDS", "STS", "LDG",
    "LDGSTS", "UTMALDG", "WAIT", "BARRIER",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Compiled:
    """Registers and spill bytes of a thread, shared bytes of a program.

    instructions: how often each machine instruction occurs in the code, with its modifiers ("LDG.E.128"). turn: one
    of the main loop; of a kernel that does not loop (`loops`), all of it. flushes: instructions that take subnormal
    numbers for zeros.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    turn: Loop = Loop({}, {})  # noqa: RUF009 (frozen)
    loops: bool = False
    flushes: dict[str, int] = field(default_factory=dict)

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
    instructions, loop = dict(Counter(INSTRUCTION.findall(code))), main_loop(code)
    flushes = dict(Counter(FLUSH.findall(compiled.asm["ptx"]) + FLUSH.findall(code.split(ROUTINES)[0])))
    return Compiled(
        registers,
        stack + local,
        compiled.metadata.shared,
        instructions,
        loop or whole(code),
        loop is not None,
        flushes,
    )


def compile_one(name: str, capability: int) -> tuple[Compiled | None, str]:
    """The configuration of this name, compiled in this process: (Compiled or None, error)."""
    configuration = configurations()[name]
    try:
        return inspect(configuration, capability), ""
    except Exception as error:  # whatever a compiler says is part of the report
        cause = str(error.__cause__ or error).split()
        return None, f"{type(error).__name__}: {' '.join(cause)[-200:]}"


def compile_all(
    capability: int, names: Sequence[str] = ()
) -> list[tuple[str, Configuration, Compiled | None, str]]:
    """(name, Configuration, Compiled or None, error) of every configuration, or of these names, on all cores."""
    listed = names or list(configurations())
    # Not forked: this process may hold a card already, whose driver does not survive that.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = list(pool.map(compile_one, listed, [capability] * len(listed)))
    return [(name, configurations()[name], *result) for name, result in zip(listed, found, strict=True)]


def faults(configuration: Configuration, compiled: Compiled, capability: int) -> list[str]:
    """Faults of a compiled kernel: what it must not have, or lacks."""
    found, types = [], configuration.types
    factors = types.get("x_ptr", types.get("inner_ptr")), types.get("codes_ptr")  # codes are the result of others
    if factors == ("*fp8e4nv", "*fp8e4nv") and capability == 90 and not compiled.count("QGMMA"):
        found.append("multiplies FP8 in another format: no QGMMA")
    if compiled.spill_bytes and capability == 90:
        found.append(f"spills {compiled.spill_bytes} bytes")
    if local := compiled.count("LDL") + compiled.count("STL"):
        found.append(f"has {local} instructions of local memory")
    found += [f"flushes subnormals: {name}" for name in compiled.flushes if not name.startswith(FLUSHING)]
    if compiled.shared_bytes > SHARED_LIMIT_BYTES[capability]:
        found.append(f"needs {compiled.shared_bytes} bytes of shared memory")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, and write the report if nothing is wrong; see the module for the exit status."""
    parser = argparse.ArgumentParser(prog="cierzo.bench.gpu.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90, choices=sorted(SHARED_LIMIT_BYTES))
    parser.add_argument("--accept", action="store_true", help="write counts above their ceilings too")
    options = parser.parse_args(argv)
    capability = options.capability
    print(f"Triton {triton.__version__}, compute capability {capability / 10}")
    print(f"{'kernel, for':{WIDTH}}{'registers':>10}{'spills':>8}{'shared':>9}  loads, copies, matrix instructions")
    bad, lines = 0, {}
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
            lines[name] = ceilings.entry(configuration, compiled) if capability == 90 else {}
        print(f"{name:{WIDTH}}{told}")
    if capability == 90:
        print_loops(lines)
        print_limits()
        predicted.print_validation()
        old = ceilings.read(triton.__version__).get("kernels", {})
        risen = {name: ceilings.rises(old[name], line) for name, line in lines.items() if name in old}
        for name, what in risen.items():
            if what:
                print(f"RISEN: {name}: {'; '.join(what)}")
                bad += not options.accept
        if not bad:
            ceilings.write(triton.__version__, lines)
            predicted.write(triton.__version__, lines.values())
    return 1 if bad else 0


def print_loops(lines: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what one turn of each kernel's main loop issues. Per 1,000 weights or per token: of all warps."""
    heads = "".join(f"{name:>9}" for name in ("turn", "per unit", "per MMA", *COLUMNS, "drains"))
    print("\nOne turn of the main loop, or all of a kernel without one; of one warp, but per unit of all")
    print(f"{'kernel, for':{WIDTH}}{'unit':>14}{heads}  matrix instructions")
    for name, line in lines.items():
        turn, mma = line["turn"], sum(line["turn"]["mma"].values())
        each = turn["issued"] * line["warps"] / line["units"] * (1000 if line["unit"] == "weights" else 1)
        rates = f"{turn['issued']:9}{each:9.1f}{turn['issued'] / mma if mma else 0:9.1f}"
        counts = "".join(f"{turn['classes'].get(one, 0):9}" for one in COLUMNS) + f"{turn['drains']:9}"
        products = " ".join(f"{one} {times}" for one, times in turn["mma"].items())
        print(f"{name:{WIDTH}}{line['units']:6} {line['unit']:7}{rates}{counts}  {products}")


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
    """Loads and copies by the bits that a thread moves, wide ones first; TMA's, which one thread starts for a tile;
    products."""
    found = Counter(widths(compiled.instructions))
    for name, number in compiled.instructions.items():
        if class_of(name) == "MMA":
            found[name.split(".")[0]] += number
    order = sorted(found, key=lambda name: ("MMA" in name, name.split(".")[0], -int((name + ".0").split(".")[1])))
    return " ".join(f"{name} {found[name]}" for name in order)


if __name__ == "__main__":
    raise SystemExit(main())
