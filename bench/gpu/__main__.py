"""`python -m cierzo.bench.gpu`: conformance, kernels and served models on this machine's GPU; see __init__.py.

Without --parts all of them, in order. The figures' shares refer to what the same run measured of the card.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from cierzo.bench.gpu import conformance, kernels
from cierzo.bench.gpu.cases import SINGLE, formats_of, models_of
from cierzo.bench.gpu.cells import ROOT, Cells, commit, describe
from cierzo.bench.gpu.timing import ceilings
from cierzo.bench.kernel_cases import Size
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels import registry

PART_S = 480  # no cell is begun after this many seconds of a part
Task = tuple[str, Callable[[], Any]]


class Choice:
    """What KernelsConfig says by default, on a machine without msgspec."""

    implementations: ClassVar[dict[str, str]] = {}
    instruction_set = "auto"


def compile_tasks(device: torch.device) -> Iterator[Task]:
    """Every kernel of every model, side by side, before anything is timed."""
    from cierzo.bench.gpu import compiled

    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        yield "all", lambda: compiled.warm(10 * capability[0] + capability[1])


def conformance_tasks(device: torch.device) -> Iterator[Task]:
    """Every operation, model, size and number format."""
    seed = time.time_ns() % (1 << 31)
    for operation in SINGLE:
        for model in models_of(operation, hostile=True):
            for size in conformance.SIZES:
                for format in formats_of(operation):
                    name = f"{operation}, {model.name}, {size.name}, {format}"

                    def run(
                        operation: str = operation,
                        model: ModelSizes = model,
                        size: Size = size,
                        format: str = format,
                    ) -> Any:
                        found = conformance.check(operation, model, size, format, device, seed)
                        return None if found is None else found | {"seed": seed}

                    yield name, run


def kernel_tasks(device: torch.device, limits: dict[str, float]) -> Iterator[Task]:
    """Every operation at the sizes of a step."""
    for size in kernels.SIZES:
        for operation in SINGLE:
            for model in models_of(operation):
                for format in formats_of(operation):
                    name = f"{operation}, {model.name}, {size.name}, {format}"

                    def run(
                        operation: str = operation,
                        model: ModelSizes = model,
                        size: Size = size,
                        format: str = format,
                    ) -> Any:
                        return kernels.measure(operation, model, size, format, device, limits)

                    yield name, run


def run_part(cells: Cells, part: str, tasks: Iterator[Task], part_s: float) -> int:
    """Measure what is missing; the number of cells that failed. A cell that fails leaves the others."""
    begin, failed = time.monotonic(), 0
    for name, task in tasks:
        if cells.has(part, name):
            continue
        if time.monotonic() - begin > part_s:
            print(f"{part}: {part_s:.0f} s are over; run it again for the rest", flush=True)
            break
        try:
            results = task()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever it is: it is written down, and the next cell has its turn
            failed += 1
            cells.add(part, name, None, f"{type(error).__name__}: {error}"[:2000])
            print(f"{part}  {name}  FAILED  {type(error).__name__}: {str(error)[:300]}", flush=True)
            if torch.cuda.is_available() and "CUDA error" in str(error):
                print("the device is lost for this process: run the command again, it goes on behind this cell")
                return failed
        else:
            cells.add(part, name, results)
            print(f"{part}  {name}  {_short(results)}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return failed


def _short(results: Any) -> str:
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


PARTS = ("compile", "conformance", "ceilings", "kernels", "served")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; exit status 1 if a cell failed."""
    arguments = _parser().parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("cierzo.bench.gpu: torch finds no GPU here", file=sys.stderr)
        return 2
    device = torch.device(arguments.device)
    described = describe(device)
    card = str(described.get("card", device.type)).lower().replace(" ", "-")
    cells = Cells(arguments.output or ROOT / "bench" / "results" / f"gpu-{card}-{commit()}.jsonl")
    cells.add("machine", "machine", described)
    registry.bind(Choice(), "cuda")  # type: ignore[arg-type]
    failed = 0
    with torch.inference_mode():
        for part in arguments.parts:
            failed += run_part(cells, part, _tasks(part, device, cells), arguments.part_s)
    return 1 if failed else 0


def _tasks(part: str, device: torch.device, cells: Cells) -> Iterator[Task]:
    if part == "compile":
        return compile_tasks(device)
    if part == "conformance":
        return conformance_tasks(device)
    if part == "ceilings":
        return iter([("ceilings", lambda: ceilings(device))])
    if part == "kernels":
        known = [cell["results"] for cell in cells.of("ceilings") if not cell["error"]]
        return kernel_tasks(device, known[-1] if known else ceilings(device))
    from cierzo.bench.gpu import served  # takes msgspec

    return served.tasks(device)


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
