"""`python -m cierzo.bench.gpu kernels|models`: measures this machine's GPU within a given time; see __init__.py.

Results go to gpu-<card>-<commit>.jsonl in a folder, behind those that lie there, or else in bench/results, already:
what was measured is not measured again, what failed or hung only with --retry.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from math import inf, isclose
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from cierzo.bench.campaign.isolation import Isolated
from cierzo.bench.campaign.loop import Block, Campaign, DeviceLost, Run, Session
from cierzo.bench.campaign.store import TIME_OVER, Store
from cierzo.bench.gpu import BEGAN, carried, runs
from cierzo.bench.gpu.runs import Group
from cierzo.bench.revision import ROOT, current_commit, output
from cierzo.engine.cost.data_sheets import DATA_SHEETS
from cierzo.engine.errors import ConfigError
from cierzo.kernels import registry
from cierzo.kernels.fault import DeviceFault, is_device_error

RESULTS = ROOT / "bench" / "results"
CARRIED = ROOT / "build" / "gpu-bundle" / "kernels"
RUNS = {"kernels": (runs.kernels, 270.0), "models": (runs.models, 300.0)}  # what it measures, and seconds for all
CELL_S = 40.0
READY_S = 60.0  # for a process to have the device; the first one loads the driver
TOLD_LETTERS = 300
END_S = 10.0  # of a run's time, for the processes' ends


class Measurement(Campaign[str, str]):
    """Groups, each in a process of its own; the next one's is made ready meanwhile.

    deadline: of time.monotonic(); what runs then is cut off.
    """

    def __init__(
        self, groups: Sequence[Group], device: torch.device, store: Store, deadline: float, cell_s: float
    ) -> None:
        self._groups, self._store, self._deadline, self._cell_s = groups, store, deadline, cell_s
        self._prepare = partial(prepared, groups, device)
        self._ready: Isolated | None = None

    @property
    def blocks(self) -> Sequence[Block[str, str]]:
        """A block for each group, by its number."""
        return [Block(str(i), list(group.tasks), [group.subject]) for i, group in enumerate(self._groups)]

    def open(self, block: Block[str, str], subject: str) -> Session[str]:
        """A process that has the device. Raises DeviceLost where it does not get it."""
        number = int(block.name)
        group = self._groups[number]
        if group.bare:
            process = Isolated(partial(prepared, self._groups, None))
        else:
            process, self._ready = self._ready or Isolated(self._prepare), None
        try:
            process.answer(min(READY_S, self._left()))
            if not group.bare:  # it may have waited since it was made ready
                process.ask(min(READY_S, self._left()))
        except (RuntimeError, TimeoutError) as error:
            process.end()
            self._require_time()
            raise DeviceLost(f"no process gets the device: {error}") from None
        if not group.bare:
            self._ready = Isolated(self._prepare)

        def measure(cell: str, _: int) -> Any:
            try:
                return process.ask(min(group.limit_s or self._cell_s, self._left()), number, cell)
            except TimeoutError:
                self._require_time()
                raise

        return Session(measure, process.end)

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _require_time(self) -> None:
        if self._left() <= 0:
            raise RuntimeError(TIME_OVER) from None

    def close(self) -> None:
        """End the process that is ready."""
        if self._ready is not None:
            self._ready.end()

    def told(self, cell: str, result: Any) -> str:
        """Times and rates of a kernel beside what limits it and what was predicted; else all that was found."""
        if "us" in result:
            return self._told(cell, result)
        told = (f"{name} {f'{value:.3g}' if isinstance(value, float) else value}" for name, value in result.items())
        return ", ".join(told)[:TOLD_LETTERS]

    def _told(self, cell: str, result: Any) -> str:
        seconds = result["us"] / 1e6
        told = f"{result['us']:.1f} us, {result['bytes'] / seconds / 1e9:.0f} GB/s"
        told += f", {result['flops'] / seconds / 1e12:.1f} TFLOP/s"
        for limits in self._store.ceilings()[-1:]:
            kind = "fp8" if cell.endswith("x fp8") and "fp8_tflop_per_s" in limits else "bf16"
            arithmetic_s = result["flops"] / limits[f"{kind}_tflop_per_s"] / 1e12
            limit_s = max(result["bytes"] / limits["copy_gb_per_s"] / 1e9, arithmetic_s)
            told += f", {limit_s / seconds:.0%} of the limit"
        if found := predicted(cell, result["bytes"]):
            card = str(self._store.identity["device"]).lower()
            told += f", {found['instructions'] / seconds / 1e9:.0f} G instructions/s"
            for us, roof in (found[name] for name in DATA_SHEETS if name in card):
                told += f", {result['us'] / us:.2f} of the {us:.1f} us predicted ({roof})"
        return told


def predicted(cell: str, num_bytes: float) -> dict[str, Any] | None:
    """Prediction for a cell from today's machine code (bench/gpu/predicted.py); None where there is none, or one of
    other work (two norms of a layer of Small 3 are one cell there)."""
    found = _cells(ROOT / "engine" / "cost" / "predicted.json").get(cell)
    return found if found and isclose(found["bytes"], num_bytes, rel_tol=0.01) else None


@cache
def _cells(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))["cells"]) if path.exists() else {}


def prepared(groups: Sequence[Group], device: torch.device | None) -> Callable[..., Any]:
    """In a new process: have the device, if one is given; what measures a cell of the group of a number there, and
    without one sees whether the device is still there."""
    on_card = device is not None and device.type == "cuda"
    carried.count()
    if device is not None:
        # The defaults of KernelsConfig, for a machine without msgspec.
        registry.bind(SimpleNamespace(implementations={}, instruction_set="auto"), "cuda")  # type: ignore[arg-type]
        touch(device)

    def measure(number: int | None = None, cell: str = "") -> Any:
        if number is None:
            return device and touch(device)
        carried.counted.clear()
        try:
            with torch.inference_mode():
                result = groups[number].tasks[cell]()
            if on_card:
                torch.cuda.synchronize()  # an error that comes late is this cell's
                torch.cuda.empty_cache()
        except Exception as error:
            if isinstance(error, DeviceFault) or is_device_error(error):
                raise DeviceLost(f"{type(error).__name__}: {error}") from error
            raise
        return result | dict(carried.counted)

    return measure


def touch(device: torch.device) -> float:
    """Have a device do something. Raises what its driver raises."""
    return float(torch.zeros(1, device=device).add(1).item())


def main(argv: Sequence[str] | None = None, device_type: str = "cuda") -> int:
    """Measure; exit status 1 if a cell failed. device_type: "cpu" for tests, which interpret the kernels."""
    parser = argparse.ArgumentParser(
        prog="cierzo.bench.gpu", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("run", choices=RUNS, help="what is measured")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    told = ", ".join(f"{seconds:.0f} for {run}" for run, (_, seconds) in RUNS.items())
    parser.add_argument(
        "--budget-s", type=_seconds, default=0.0, metavar="S", help=f"seconds for all; default: {told}"
    )
    parser.add_argument(
        "--cell-s", type=_seconds, default=CELL_S, metavar="S", help=f"of a kernel's cell; {CELL_S:.0f}"
    )
    parser.add_argument(
        "--cells", nargs="+", default=[""], metavar="TEXT", help="only cells with one of these in `subject: cell`"
    )
    parser.add_argument("--commit", metavar="NAME", help="of these sources; default: what git says")
    parser.add_argument(
        "--retry", action="store_true", help="try cells again that failed, hung or took the run along"
    )
    arguments = parser.parse_args(argv)
    card = device_type
    if device_type == "cuda":
        card = output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").partition("\n")[0]
        if not card:
            print("cierzo.bench.gpu: nvidia-smi finds no GPU here", file=sys.stderr)
            return 2
        print(carried.use(CARRIED))
    groups, budget_s = RUNS[arguments.run]
    commit, device = arguments.commit or current_commit(), torch.device(device_type)
    path = arguments.output / f"gpu-{card.lower().replace(' ', '-')}-{commit}.jsonl"
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        if not path.exists() and (RESULTS / path.name).exists():  # brought along
            shutil.copy(RESULTS / path.name, path)
        store = Store(path, {"commit": commit, "device": card})
    except (ConfigError, OSError) as error:
        print(f"cierzo.bench.gpu: {error}", file=sys.stderr)
        return 2
    deadline = BEGAN + (arguments.budget_s or budget_s) - END_S
    chosen = [_chosen(group, arguments.cells) for group in groups(device)]
    if not any(group.tasks for group in chosen):
        print(f"cierzo.bench.gpu: --cells must be in a cell's name, got {arguments.cells}", file=sys.stderr)
        return 2
    campaign = Measurement(chosen, device, store, deadline, arguments.cell_s)
    say = partial(print, flush=True)
    run = Run(campaign, store, say, deadline, announce=True, retry=arguments.retry, start=BEGAN)
    try:
        run.measure(1)
    except DeviceLost as error:
        run.failed += 1
        say(f"{error}; cells that are left stay untried")
    except KeyboardInterrupt:
        say("interrupted: run it again for the rest")
        return 130
    finally:
        campaign.close()
    for line in summary(chosen, store):
        say(line)
    return 1 if run.failed else 0


def _seconds(text: str) -> float:
    """Read an option. Raises ArgumentTypeError."""
    with suppress(ValueError):
        if 0 < (seconds := float(text)) < inf:
            return seconds
    raise argparse.ArgumentTypeError(f"must be seconds above 0, got {text!r}")


def _chosen(group: Group, texts: Sequence[str]) -> Group:
    """The group with those of its tasks whose names, behind the subject's, have one of the texts."""
    named = {cell: f"{group.subject}: {cell}" for cell in group.tasks}
    chosen = {cell: task for cell, task in group.tasks.items() if any(text in named[cell] for text in texts)}
    return replace(group, tasks=chosen)


def summary(groups: Sequence[Group], store: Store) -> list[str]:
    """How many cells of each subject are measured, failed and left, in this run and those before."""
    counts: dict[str, Counter[str]] = {}
    for group in groups:
        for cell in group.tasks:
            measured, failed = store.measured(cell, group.subject), store.failed(cell, group.subject)
            state = "measured" if measured else "failed" if failed else "left"
            counts.setdefault(group.subject, Counter())[state] += 1
    return [
        f"{subject}: {', '.join(f'{n} {what}' for what, n in found.items())}" for subject, found in counts.items()
    ]


if __name__ == "__main__":
    raise SystemExit(main())
