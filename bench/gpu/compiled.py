"""Every kernel compiled ahead of time for H100 and H200, without one: `python -m cierzo.bench.gpu.compiled`,
`make gpu-report`.

Per configuration: registers of a thread, shared memory of a program, and what one turn of its main loop issues, by
class, its loads by width and its matrix instructions. The counts become ceilings (ceilings.py) and prices of
operations (predicted.py). A kernel with a fault (`faults`), one that does not compile, or a count above its ceiling
means exit status 1, and nothing is written.

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
from typing import Any

import triton

from cierzo.bench.gpu import ceilings, nvrtc, predicted
from cierzo.bench.gpu.configurations import configurations
from cierzo.bench.gpu.loops import Loop, classes, main_loop, whole
from cierzo.kernels.triton.compile import compile_ahead
from cierzo.kernels.triton.launch import Configuration

# Of a program; CUDA programming guide, technical specifications of compute capability 9.0.
SHARED_LIMIT_BYTES = 227 << 10
# Subnormals taken for zeros, asked for in PTX (ex2.approx.ftz.f32) or put there by the assembler (FADD.FTZ). Those
# of FLUSHING are known: `tl.exp2` and `tl.rsqrt` have no other form. A softmax's weights below 2^-126 are then zero
# beside one that is 1: the result changes by less than 2^-108 of the largest value. A norm's mean square has its
# epsilon added, and is never subnormal. The assembler divides integers by way of the reciprocal of one. Its routine
# for quotients of floats, behind ROUTINES, tells infinities and NaN with such instructions and keeps subnormals.
FLUSH = re.compile(r"\b[a-z][a-z0-9.]*\.ftz[a-z0-9.]*|\b[A-Z][A-Z0-9.]*\.FTZ[A-Z0-9.]*")
FLUSHING = ("ex2.approx.ftz.f32", "rsqrt.approx.ftz.f32", "F2I.FTZ.U32.TRUNC.NTZ")
ROUTINES = "\n$__internal"
# A kernel that is launched before those in front of it have ended (triton/chain.py) waits for them in PTX, ahead of
# any branch and of whatever reads or writes memory, but for its own parameters.
WAIT = "griddepcontrol.wait"
EARLY = re.compile(r"^\s*(?:@!?%\w+\s+)?(?:bra|call|(?:ld|st|cp|atom|red|prefetch|tensormap)\.(?!param))", re.M)
WIDTH = 80  # of a name's column
COLUMNS = (
    "FP32", "HALF2", "IMAD", "LOP3", "SHF", "PRMT", "ALU", "F2F", "F2FP", "MUFU", "UNIFORM", "LDS", "STS", "LDG",
    "LDGSTS", "UTMALDG", "WAIT", "BARRIER",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Compiled:
    """Registers and spill bytes of a thread, shared bytes of a program; one turn of the main loop, or of a kernel
    that does not loop (`loops`) all of it; instructions that take subnormal numbers for zeros. waits: for the
    kernels in front of it, and before all else; None: it never does."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    turn: Loop
    loops: bool = True
    flushes: dict[str, int] = field(default_factory=dict)
    waits: bool | None = None


def compile_one(name: str) -> tuple[Compiled | None, str]:
    """The configuration of this name, compiled in this process, its machine code read by the tools in Triton's
    wheel: (Compiled or None, error)."""
    try:
        configuration = configurations()[name]
        compiled = compile_ahead(configuration)
        cubin, shared_bytes = compiled.asm["cubin"], compiled.metadata.shared
        (usage,), code = nvrtc.usage(cubin).values(), nvrtc.disassembled(cubin)
        loop = main_loop(code, ceilings.tile_of(configuration))
        ptx = compiled.asm["ptx"]
        flushes = dict(Counter(FLUSH.findall(ptx) + FLUSH.findall(code.split(ROUTINES)[0])))
        turn, loops = loop or whole(code), loop is not None
        return Compiled(usage.registers, usage.stack_bytes, shared_bytes, turn, loops, flushes, waits(ptx)), ""
    except Exception as error:  # whatever a compiler says is part of the report
        cause = str(error.__cause__ or error).split()
        return None, f"{type(error).__name__}: {' '.join(cause)[-200:]}"


def waits(ptx: str) -> bool | None:
    """Whether a kernel waits for those in front of it before all else; None: it never does."""
    before, wait, _ = ptx[ptx.index(".entry") :].partition(WAIT)
    return EARLY.search(before) is None if wait else None


def compile_all(names: Sequence[str] = ()) -> list[tuple[str, Configuration, Compiled | None, str]]:
    """(name, Configuration, Compiled or None, error) of every configuration, or of these names, on all cores."""
    listed = names or list(configurations())
    # Not forked: this process may hold a card already, whose driver does not survive that.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = list(pool.map(compile_one, listed))
    return [(name, configurations()[name], *result) for name, result in zip(listed, found, strict=True)]


def faults(configuration: Configuration, compiled: Compiled) -> list[str]:
    """Faults of a compiled kernel: what it must not have, or lacks."""
    found, types, by_class = [], configuration.types, classes(compiled.turn.everything)
    factors = types.get("x_ptr", types.get("inner_ptr")), types.get("codes_ptr")  # codes are the result of others
    if factors == ("*fp8e4nv", "*fp8e4nv") and not any(name.startswith("QGMMA") for name in compiled.turn.mma):
        found.append("multiplies FP8 in another format: no QGMMA")
    if compiled.spill_bytes:
        found.append(f"spills {compiled.spill_bytes} bytes")
    if local := by_class.get("LOCAL"):
        found.append(f"has {local} instructions of local memory")
    found += [f"flushes subnormals: {name}" for name in compiled.flushes if not name.startswith(FLUSHING)]
    if configuration.options.get("launch_pdl") and not compiled.waits:
        found.append("is launched early, and does not wait before it reads or writes")
    if not configuration.options.get("launch_pdl") and compiled.waits is not None:
        found.append("waits, and is not launched early")
    if compiled.shared_bytes > SHARED_LIMIT_BYTES:
        found.append(f"needs {compiled.shared_bytes} bytes of shared memory")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and write the report if nothing is wrong; see the module for the exit status."""
    parser = argparse.ArgumentParser(prog="cierzo.bench.gpu.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("--accept", action="store_true", help="write counts above their ceilings too")
    options = parser.parse_args(argv)
    heads = "".join(f"{name:>9}" for name in ("turn", "per unit", "per MMA", *COLUMNS, "drains"))
    print(f"Triton {triton.__version__}, sm_90. One turn of the main loop, or all of a kernel without one;")
    print("of one warp, but per unit (1,000 weights, a token) of all")
    print(f"{'kernel, for':{WIDTH}}{'registers':>10}{'shared':>9}{'unit':>14}{heads}  loads, matrix instructions")
    bad, lines = 0, {}
    for name, configuration, compiled, error in compile_all():
        if compiled is None:
            print(f"{name:{WIDTH}}  DOES NOT COMPILE: {error}")
            bad += 1
        else:
            lines[name], wrong = ceilings.entry(configuration, compiled), faults(configuration, compiled)
            print(f"{name:{WIDTH}}{_told(lines[name])}{'  FAULT: ' * bool(wrong)}{', '.join(wrong)}")
            bad += bool(wrong)
    predicted.print_validation()
    risen = ceilings.risen(ceilings.read(triton.__version__).get("kernels", {}), lines)
    for name, texts in risen.items():
        print(f"{'ACCEPTED' if options.accept else 'RISEN'}: {name}: {'; '.join(texts)}")
    bad += bool(risen) and not options.accept
    if not bad:
        ceilings.write(triton.__version__, lines)
        predicted.write(triton.__version__, lines.values())
    verdict = (
        f"{bad} faults; nothing was written" if bad else "no fault, no count above its ceiling; report written"
    )
    print(f"{len(lines)} kernels by Triton {triton.__version__}: {verdict}")
    return 1 if bad else 0


def _told(line: Mapping[str, Any]) -> str:
    """The columns of a line of the report."""
    turn, mma = line["turn"], sum(line["turn"]["mma"].values())
    each = turn["issued"] * line["warps"] / line["units"] * (1000 if line["unit"] == "weights" else 1)
    rates = f"{turn['issued']:9}{each:9.1f}{turn['issued'] / mma if mma else 0:9.1f}"
    counts = "".join(f"{turn['classes'].get(one, 0):9}" for one in COLUMNS) + f"{turn['drains']:9}"
    named = " ".join(f"{one} {times}" for one, times in (turn["loads"] | turn["mma"]).items())
    return (
        f"{line['registers']:10}{line['shared_bytes']:9}{line['units']:6} {line['unit']:7}{rates}{counts}  {named}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
