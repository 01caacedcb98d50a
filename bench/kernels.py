"""`python -m cierzo.bench.kernels`: every operation of a step, at the sizes of the benchmark checkpoints.

One line per operation, size and implementation: time, bytes and operations of a call, and its share of the
machine's ceiling, measured in the same run. A call's ceiling is the longer of its bytes at the memory's bandwidth
and its operations at the best product's rate; what small calls read lies in a cache, so that they may pass it.
Implementations run in turn, round by round, and are compared by the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from cierzo.bench import attention_cases  # noqa: F401 (registers its cases)
from cierzo.bench.kernel_cases import CASES, MODELS, SIZES, Call, Maker, Size
from cierzo.bench.machine import Ceiling, Ceilings, measure_ceilings
from cierzo.bench.report import check_writable, make_report, write_report
from cierzo.bench.stats import median, paired_ratio
from cierzo.engine.cost.operations import Work
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.formats.number_formats import PACKED_FORMATS
from cierzo.kernels.registry import bind, implementations, operations, reference

ROUND_S = 0.01  # of one implementation, in each round
COLUMNS = {
    "operation": -28,
    "size": -12,
    "by": -7,
    "us": 10,
    "MB": 8,
    "GB/s": 7,
    "GFLOP/s": 8,
    "share": 6,
    "times": 6,
}
HEADER = " ".join(name.ljust(-width) if width < 0 else name.rjust(width) for name, width in COLUMNS.items())


class KernelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is timed. `weights`: the number format of packed weights."""

    operations: tuple[str, ...]
    models: tuple[str, ...]
    sizes: tuple[str, ...]
    weights: str
    rounds: int


class KernelRow(msgspec.Struct, frozen=True, kw_only=True):
    """One implementation at one size.

    samples_us: microseconds of a call, one sample per round. share: of the ceiling, by the median. speedup: how
    many times as fast as the reference, by rounds; 1 for itself.
    """

    operation: str
    model: str
    size: str
    implementation: str
    num_bytes: int
    flops: int
    samples_us: tuple[float, ...]
    share: float
    speedup: float

    @property
    def us(self) -> float:
        """Microseconds of a call."""
        return median(self.samples_us)


class KernelResults(msgspec.Struct, frozen=True, kw_only=True):
    """Every row, and the ceilings that the shares refer to."""

    ceilings: Ceilings
    rows: tuple[KernelRow, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print a table, write JSON if asked."""
    arguments = _parser().parse_args(argv)
    settings = KernelSettings(
        operations=tuple(arguments.operation or operations()),
        models=tuple(arguments.model),
        sizes=tuple(arguments.size),
        weights=arguments.weights,
        rounds=arguments.rounds,
    )
    if arguments.json is not None:
        check_writable(arguments.json)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    ceilings = measure_ceilings()
    print(ceilings)
    rows = []
    for model in settings.models:
        print(f"\n{model}\n{HEADER}")
        for row in measure(settings, MODELS[model], ceilings):
            rows.append(row)
            print(_line(row), flush=True)
    if arguments.json is not None:
        command = shlex.join(["python", "-m", "cierzo.bench.kernels", *(sys.argv[1:] if argv is None else argv)])
        results = KernelResults(ceilings=ceilings, rows=tuple(rows))
        report = make_report("kernels", command=command, started=started, settings=settings, results=results)
        write_report(report, arguments.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cierzo.bench.kernels", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--operation", nargs="+", choices=operations(), metavar="NAME", help="default: all")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="default: both")
    names = [size.name for size in SIZES]
    parser.add_argument("--size", nargs="+", choices=names, default=names, metavar="NAME", help="default: all")
    parser.add_argument("--weights", choices=PACKED_FORMATS, default="bf16", help="number format of packed weights")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="in which implementations take turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and results here")
    return parser


def measure(settings: KernelSettings, model: ModelSizes, ceilings: Ceilings) -> Iterator[KernelRow]:
    """The rows of one model, operation by operation."""
    sizes = [size for size in SIZES if size.name in settings.sizes]
    for operation in tqdm(settings.operations, desc=model.name, delay=2.0, leave=False, disable=None):
        for size in sizes:
            yield from _measure_case(settings, operation, model, size, ceilings)


def _measure_case(
    settings: KernelSettings, operation: str, model: ModelSizes, size: Size, ceilings: Ceilings
) -> Iterator[KernelRow]:
    """One row per implementation; none where the model has no such operation."""
    calls: dict[str, Call] = {}
    runs: dict[str, Callable[[int], None]] = {}
    for choice in implementations(operation, "cpu"):
        call = CASES[operation](model, size, Maker(native=choice.name == "native", format=settings.weights))
        if call is None:
            return
        calls[choice.name], runs[choice.name] = call, _runner(choice.load(), call)
    samples = _time_in_turn(runs, settings.rounds)
    for name, call in calls.items():
        seconds = median(samples[name])
        yield KernelRow(
            operation=operation,
            model=model.name,
            size=size.name,
            implementation=name,
            num_bytes=int(call.work.num_bytes),
            flops=int(call.work.operations),
            samples_us=tuple(sample * 1e6 for sample in samples[name]),
            share=least_seconds(call.work, ceilings, settings.weights if name == "native" else "bf16") / seconds,
            speedup=paired_ratio(samples[reference()[operation]], samples[name]),
        )


def least_seconds(work: Work, ceilings: Ceilings, weights: str) -> float:
    """Seconds that the machine needs at least: for the bytes or the operations, whichever take longer."""
    rates: dict[str, Ceiling | None] = {"float32": ceilings.float32, "bf16": ceilings.bf16}
    product = rates.get(weights, ceilings.int8) or ceilings.bf16
    return float(max(work.seconds(ceilings.read.rate * 1e9, product.rate * 1e9)))


def _runner(function: Callable[..., Any], call: Call) -> Callable[[int], None]:
    """Makes a number of calls, each with the next of the arguments."""
    turn = 0

    def run(count: int) -> None:
        nonlocal turn
        for _ in range(count):
            function(*call.arguments[turn])
            turn = (turn + 1) % len(call.arguments)

    return run


def _time_in_turn(runs: dict[str, Callable[[int], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call: one sample per implementation and round. Single operations inside a reference are bound to
    the implementation that is timed."""
    counts = {}
    for name, run in runs.items():
        _bind_all(name)
        run(1)
        start = time.perf_counter()
        run(1)
        counts[name] = max(1, int(ROUND_S / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            _bind_all(name)
            start = time.perf_counter()
            run(counts[name])
            samples[name].append((time.perf_counter() - start) / counts[name])
    return samples


def _bind_all(name: str) -> None:
    """Bind the C++ kernels, or the references of all operations."""
    bind(KernelsConfig(implementations={} if name == "native" else reference()), "cpu")


def _line(row: KernelRow) -> str:
    rate = f"{row.flops / row.us / 1e3:8.1f}" if row.flops else f"{'':8}"
    return (
        f"{row.operation:28} {row.size:12} {row.implementation:7} {row.us:10.1f} {row.num_bytes / 1e6:8.2f} "
        f"{row.num_bytes / row.us / 1e3:7.1f} {rate} {row.share:6.1%} {row.speedup:6.2f}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
