"""`python -m cierzo.bench.gpu`: conformance, kernels and served models on this machine's GPU; see __init__.py.

Without --parts all of them, in order. The figures' shares refer to what the same run measured of the card.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from cierzo.bench.campaign.loop import Block, Campaign, DeviceLost, Run, Session
from cierzo.bench.campaign.store import Sample, Store
from cierzo.bench.gpu import conformance, kernels
from cierzo.bench.gpu.card import describe
from cierzo.bench.gpu.cases import SINGLE, formats_of, models_of
from cierzo.bench.gpu.timing import ceilings
from cierzo.bench.revision import ROOT, current_commit
from cierzo.kernels import registry

PARTS = ("compile", "conformance", "ceilings", "kernels", "served")
PART_S = 480  # no cell is begun after this many seconds of a part
Tasks = Mapping[str, Callable[[], Any]]  # by cell


class Choice:
    """What KernelsConfig says by default, on a machine without msgspec."""

    implementations: ClassVar[dict[str, str]] = {}
    instruction_set = "auto"


@dataclass(frozen=True, slots=True)
class Part:
    """Cells, and what makes their tasks for each subject: the part itself, or each model that is served."""

    cells: Sequence[str]
    subjects: Mapping[str, Callable[[], Tasks]]


class Parts(Campaign[str, str]):
    """A block for each part, of one round."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts

    @property
    def blocks(self) -> Sequence[Block[str, str]]:
        """The parts in order."""
        return [Block(name, part.cells, list(part.subjects)) for name, part in self._parts.items()]

    def open(self, block: Block[str, str], subject: str) -> Session[str]:
        """Make the tasks; the first that needs a model loads it."""
        return TaskSession(self._parts[block.name].subjects[subject]())

    def told(self, cell: str, result: Any) -> str:
        """A result in a few words."""
        return _short(result)


class TaskSession(Session[str]):
    """Tasks, and what they hold of the device between them."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks

    def measure(self, cell: str, number: int) -> Any:
        """Raises RuntimeError, or DeviceLost where the driver takes no more calls from this process."""
        try:
            return self._tasks[cell]()
        except Exception as error:
            kind = DeviceLost if "CUDA error" in str(error) else RuntimeError
            raise kind(f"{type(error).__name__}: {error}"[:2000]) from error
        finally:
            _empty_cache()

    def close(self) -> None:
        """Let go of a model: the plan of the next one asks the driver what is free."""
        self._tasks = {}
        gc.collect()
        _empty_cache()


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _short(results: Any) -> str:
    """Times and rates of a kernel; else all that was found."""
    if results is None:
        return "not in this model"
    if "us" in results:
        torch_us = results.get("torch", {}).get("us")
        beside = f", torch {torch_us:.1f} us" if torch_us else ""
        return (
            f"{results['us']:.1f} us, {results['gb_per_s']:.0f} GB/s, {results['tflop_per_s']:.1f} TFLOP/s, "
            f"{results['share']:.0%} of the limit{beside}"
        )
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in results.items()
    )


def make_part(name: str, device: torch.device, store: Store) -> Part:
    """A part's cells and tasks."""
    if name == "served":
        from cierzo.bench.gpu import served  # takes msgspec

        return Part(served.CELLS, served.subjects(device))
    if name == "kernels":
        known = store.ceilings()
        return Part(
            list(kernel_tasks(device, {})),
            {name: lambda: kernel_tasks(device, known[-1] if known else ceilings(device))},
        )
    makers: dict[str, Callable[[torch.device], Tasks]] = {
        "compile": compile_tasks,
        "conformance": conformance_tasks,
        "ceilings": lambda device: {"ceilings": partial(ceilings, device)},
    }
    tasks = makers[name](device)
    return Part(list(tasks), {name: lambda: tasks})


def compile_tasks(device: torch.device) -> Tasks:
    """Every kernel of every model, side by side, before anything is timed."""
    from cierzo.bench.gpu import compiled

    if device.type != "cuda":
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    return {"all": partial(compiled.warm, 10 * major + minor)}


def conformance_tasks(device: torch.device) -> Tasks:
    """Every operation, model, size and number format, on inputs that are new in every run."""
    seed = time.time_ns() % (1 << 31)
    return {
        f"{operation}, {model.name}, {size.name}, {format}": partial(
            conformance.check, operation, model, size, format, device, seed
        )
        for operation in SINGLE
        for model, size, format in itertools.product(
            models_of(operation, hostile=True), conformance.SIZES, formats_of(operation)
        )
    }


def kernel_tasks(device: torch.device, limits: Mapping[str, float]) -> Tasks:
    """Every operation at the sizes of a step."""
    return {
        f"{operation}, {model.name}, {size.name}, {format}": partial(
            kernels.measure, operation, model, size, format, device, limits
        )
        for size, operation in itertools.product(kernels.SIZES, SINGLE)
        for model, format in itertools.product(models_of(operation), formats_of(operation))
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; exit status 1 if a cell failed."""
    arguments = _parser().parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("cierzo.bench.gpu: torch finds no GPU here", file=sys.stderr)
        return 2
    device = torch.device(arguments.device)
    described, commit = describe(device), current_commit()
    card = str(described.get("card", device.type))
    name = card.lower().replace(" ", "-")
    path = arguments.output or ROOT / "bench" / "results" / f"gpu-{name}-{commit}.jsonl"
    store = Store(path, {"commit": commit, "device": card})
    store.add(Sample(cell="machine", subject="machine", round=0, started="", took_s=0.0, result=described))
    registry.bind(Choice(), "cuda")  # type: ignore[arg-type]
    failed = 0
    with torch.inference_mode():
        for part in arguments.parts:
            run = Run(
                Parts({part: make_part(part, device, store)}), store, partial(print, flush=True), arguments.part_s
            )
            try:
                run.measure(1)
            except DeviceLost:
                print("the device is lost for this process: run the command again, it goes on behind this cell")
                return 1
            failed += run.failed
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cierzo.bench.gpu", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--part-s", type=float, default=PART_S, metavar="S", help="seconds of a part, at most")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: in bench/results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: in Triton's interpreter")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
