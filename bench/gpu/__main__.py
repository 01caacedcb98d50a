"""`python -m cierzo.bench.gpu`: conformance, kernels and served models on this machine's GPU; see __init__.py.

Without --parts all of them, in order. The figures' shares refer to what the same run measured of the card.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from cierzo.bench.campaign.loop import Block, Campaign, DeviceLost, Run, Session
from cierzo.bench.campaign.store import Sample, Store
from cierzo.bench.gpu import compiled, conformance, timing
from cierzo.bench.gpu.calls import cells
from cierzo.bench.gpu.cases import CASES
from cierzo.bench.revision import ROOT, current_commit, installed_versions, output
from cierzo.engine.errors import ConfigError
from cierzo.kernels import registry

PARTS = ("compile", "conformance", "ceilings", "kernels", "served")
PART_S = 480  # no cell is begun after this many seconds of a part
Tasks = Mapping[str, Callable[[], Any]]  # by cell
Subjects = Mapping[str, Callable[[], Tasks]]  # the part itself, or each model that is served


class Part(Campaign[str, str]):
    """A block of one round, whose subjects have the same cells."""

    def __init__(self, name: str, subjects: Subjects) -> None:
        self._name, self._subjects = name, subjects

    @property
    def blocks(self) -> Sequence[Block[str, str]]:
        """The one."""
        first, *_ = self._subjects.values()
        return [Block(self._name, list(first()), list(self._subjects))]

    def open(self, block: Block[str, str], subject: str) -> Session[str]:
        """Make the tasks; the first that needs a model loads it."""
        tasks = dict(self._subjects[subject]())
        return Session(partial(_measure, tasks), partial(_let_go, tasks))

    def told(self, cell: str, result: Any) -> str:
        """Times and rates of a kernel; else all that was found."""
        if result is None:
            return "not in this model"
        if "us" in result:
            beside = f", torch {result['torch']['us']:.1f} us" if "torch" in result else ""
            return (
                f"{result['us']:.1f} us, {result['gb_per_s']:.0f} GB/s, {result['tflop_per_s']:.1f} TFLOP/s, "
                f"{result['share']:.0%} of the limit{beside}"
            )
        return ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in result.items()
        )


def _measure(tasks: Tasks, cell: str, _: int) -> Any:
    """Raises RuntimeError, or DeviceLost where the driver takes no more calls from this process."""
    try:
        result = tasks[cell]()
        torch.cuda.empty_cache()  # nothing where there is no GPU
        return result
    except Exception as error:
        kind = DeviceLost if "CUDA error" in str(error) else RuntimeError
        raise kind(f"{type(error).__name__}: {error}"[:2000]) from error


def _let_go(tasks: dict[str, Callable[[], Any]]) -> None:
    """Let go of a model, which the tasks hold: the plan of the next one asks the driver what is free."""
    tasks.clear()
    gc.collect()
    with suppress(RuntimeError):  # a lost device is told by the cell that lost it
        torch.cuda.empty_cache()


def subjects_of(part: str, device: torch.device, store: Store) -> Subjects:
    """Make the tasks of a part: those of each model that is served, else of the part itself."""
    tasks: dict[str, Callable[[], Any]] = {}
    match part:
        case "compile":  # every kernel, side by side, before anything is timed
            if device.type == "cuda":
                major, minor = torch.cuda.get_device_capability(device)
                tasks["all"] = partial(compiled.warm, 10 * major + minor)
        case "conformance":  # every operation, model, size and number format, on inputs that are new in every run
            seed = time.time_ns() % (1 << 31)
            hostile = {operation: known.hostile for operation, known in CASES.items()}
            for name, cell in cells(conformance.SIZES, hostile):
                tasks[name] = partial(conformance.check, *cell, device, seed)
        case "ceilings":
            tasks["ceilings"] = partial(timing.ceilings, device)
        case "kernels":  # every operation at the sizes of a step, beside the ceilings that were measured last
            limits = (store.ceilings() or [timing.ceilings(device)])[-1]
            for size in timing.SIZES:
                for name, cell in cells([size]):
                    tasks[name] = partial(timing.measure, *cell, device, limits)
        case "served":
            from cierzo.bench.gpu import served  # takes msgspec

            return served.subjects(device)
    return {part: lambda: tasks}


def describe(device: torch.device) -> dict[str, Any]:
    """The card that figures belong to, its driver and the versions of packages, as JSON."""
    found: dict[str, Any] = {"device": str(device), "versions": installed_versions()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": driver.partition("\n")[0],
        }
    return found


def main(argv: Sequence[str] | None = None, device_type: str = "cuda") -> int:
    """Run the parts; exit status 1 if a cell failed. device_type: "cpu" for tests, which interpret the kernels."""
    parser = argparse.ArgumentParser(
        prog="cierzo.bench.gpu", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--part-s", type=float, default=PART_S, metavar="S", help="seconds of a part, at most")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: in bench/results")
    arguments = parser.parse_args(argv)
    if device_type == "cuda" and not torch.cuda.is_available():
        print("cierzo.bench.gpu: torch finds no GPU here", file=sys.stderr)
        return 2
    device = torch.device(device_type)
    described, commit = describe(device), current_commit()
    card = str(described.get("card", device.type))
    name = card.lower().replace(" ", "-")
    path = arguments.output or ROOT / "bench" / "results" / f"gpu-{name}-{commit}.jsonl"
    try:
        store = Store(path, {"commit": commit, "device": card})
    except ConfigError as error:
        print(f"cierzo.bench.gpu: {error}", file=sys.stderr)
        return 2
    store.add(Sample(cell="machine", subject="machine", round=0, started="", took_s=0.0, result=described))
    # The defaults of KernelsConfig, for a machine without msgspec.
    registry.bind(SimpleNamespace(implementations={}, instruction_set="auto"), "cuda")  # type: ignore[arg-type]
    failed = 0
    with torch.inference_mode():
        for name in arguments.parts:
            part = Part(name, subjects_of(name, device, store))
            run = Run(part, store, partial(print, flush=True), arguments.part_s)
            try:
                run.measure(1)
            except DeviceLost:
                print("the device is lost for this process: run the command again, it goes on behind this cell")
                return 1
            failed += run.failed
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
