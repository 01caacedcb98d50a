"""Every kernel compiled ahead of time, without a GPU: `python -m cierzo.bench.gpu.compiled`, `make gpu-report`.

Per configuration: registers and spills of a thread, shared memory of a program, the widths of its loads, and which
matrix instructions it has. Spills on sm_90 and more shared memory than a card has are faults; exit status 1. For
sm_90 also what each moves and computes in a step (problems.py), and the time of that at the limits of the cards.

With another Triton's folder first in PYTHONPATH, that one compiles: `make gpu-report TRITON=3.6`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import triton

import cierzo.kernels.triton as package
from cierzo.bench.gpu.problems import problems
from cierzo.engine.cost.data_sheets import DATA_SHEETS

# Of a program; CUDA programming guide, table of technical specifications per compute capability.
SHARED_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
NO_E4M3 = "fp8e4nv not supported"  # what Triton says of kernels in FP8 before sm_89


def modules() -> list[str]:
    """Modules of the package that list configurations."""
    names = [f"{package.__name__}.{info.name}" for info in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if hasattr(importlib.import_module(name), "configurations")]


def configurations() -> Iterator[tuple[str, str, Any]]:
    """(module, what for, Configuration) of every kernel."""
    for name in modules():
        for purpose, configuration in importlib.import_module(name).configurations():
            yield name, purpose, configuration


def compile_one(number: int, capability: int) -> tuple[int, Any, str]:
    """The number-th configuration, compiled in this process: (number, Compiled or None, error)."""
    from cierzo.kernels.triton.compile import compile_ahead

    _, _, configuration = list(configurations())[number]
    try:
        return number, compile_ahead(configuration, capability), ""
    except Exception as error:  # whatever a compiler says is part of the report
        cause = str(error.__cause__ or error).split()
        return number, None, f"{type(error).__name__}: {' '.join(cause)[-200:]}"


def compile_all(capability: int, workers: int | None = None) -> list[tuple[str, str, Any, Any, str]]:
    """(module, what for, Configuration, Compiled or None, error) of every configuration."""
    listed = list(configurations())
    # Not forked: this process may hold a card already, whose driver does not survive that.
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = list(pool.map(compile_one, range(len(listed)), [capability] * len(listed)))
    return [(*listed[number], compiled, error) for number, compiled, error in found]


def warm(capability: int) -> dict[str, int]:
    """Fill Triton's cache for this card; how many were compiled, how many failed."""
    errors = [error for *_, error in compile_all(capability)]
    return {"configurations": len(errors), "failed": sum(map(bool, errors))}


def faults(purpose: str, compiled: Any, capability: int) -> list[str]:
    """Faults of a compiled kernel: what it must not have, or lacks."""
    found = []
    if "x fp8" in purpose and capability == 90 and not compiled.count("QGMMA"):
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
    print(f"{'kernel':24}{'for':58}{'registers':>10}{'spills':>8}{'shared':>9}  loads, copies, matrix instructions")
    bad = 0
    found = compile_all(capability)
    for _, purpose, configuration, compiled, error in found:
        if compiled is None:
            refused = capability < 89 and NO_E4M3 in error
            told = "not for this card, which has no FP8" if refused else f"DOES NOT COMPILE: {error}"
            print(f"{configuration.name:24}{purpose:58}  {told}")
            bad += not refused
            continue
        wrong = faults(purpose, compiled, capability)
        bad += bool(wrong)
        print(
            f"{configuration.name:24}{purpose:58}{compiled.registers:10}{compiled.spill_bytes:8}"
            f"{compiled.shared_bytes:9}  {_instructions(compiled)}{'  FAULT: ' + ', '.join(wrong) if wrong else ''}"
        )
    if capability == 90:
        print_limits((purpose, configuration, compiled) for _, purpose, configuration, compiled, _ in found)
    return 1 if bad else 0


def print_limits(found: Iterable[tuple[str, Any, Any]]) -> None:
    """Print what each kernel moves and computes in a step, and how long the cards take for that at least."""
    print("\nAt least: each byte once, each operation once, at the memory's and the tensor cores' data-sheet rates")
    cards = DATA_SHEETS.values()
    for card in cards:
        print(
            f"  {card.name}: {card.bytes_per_s / 1e12} TB/s, {card.bf16 / 1e12} TFLOP/s, {card.fp8 / 1e12} of FP8"
        )
    heads = "".join(f"{card.name + ', us':>14}" for card in cards)
    print(f"{'kernel':24}{'for':58}{'step':14}{'MB':>12}{'GFLOP':>11}{heads}  limit")
    for purpose, configuration, compiled in found:
        for step, work in problems(configuration):
            fp8 = compiled is not None and compiled.count("QGMMA") > 0
            limits = [card.limit_s(work, fp8) for card in cards]
            times = "".join(f"{seconds * 1e6:14.2f}" for seconds, _ in limits)
            which = " / ".join(dict.fromkeys(what for _, what in limits))
            print(
                f"{configuration.name:24}{purpose:58}{step:14}{work.num_bytes / 1e6:12.3f}"
                f"{work.operations / 1e9:11.3f}{times}  {which}"
            )


def _instructions(compiled: Any) -> str:
    """Loads and copies by the bits that a thread moves; TMA's, which one thread starts for a tile; products."""
    found: Counter[str] = Counter()
    for name, number in compiled.instructions.items():
        kind, *modifiers = name.split(".")
        if kind in ("LDG", "LDGSTS"):
            width = next((part.lstrip("US") for part in modifiers if part in WIDTHS), "32")
            found[f"{kind}.{width}"] += number
        elif kind in ("UTMALDG", "HGMMA", "QGMMA", "HMMA", "QMMA", "IMMA"):
            found[kind] += number
    return " ".join(f"{kind} {number}" for kind, number in sorted(found.items(), key=_order))


WIDTHS = ("128", "64", "U16", "S16", "U8", "S8")


def _order(item: tuple[str, int]) -> tuple[int, str, int]:
    """Loads, copies, products; wide ones first."""
    kind, _, width = item[0].partition(".")
    return int("MMA" in kind), kind, -int(width or 0)


if __name__ == "__main__":
    raise SystemExit(main())
