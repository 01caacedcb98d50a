"""`python -m cierzo.bench.plan.calibrate CHECKPOINT`: this machine's CPU as a device for plans, in a minute.

Operations are timed one by one, then scaled so that together they take as long as the engine's one native call: the
rest of that call (rotations, cache writes, sampling), which engine/cost does not count, is shared out among them.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import msgspec
import numpy as np

from cierzo.bench.machine import limit_device, measure_ceilings
from cierzo.bench.profile import CONTEXT, OperationRow, Profiler, StepProfile
from cierzo.bench.report import check_writable
from cierzo.bench.revision import current_commit
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.cost.device import Device, Kind
from cierzo.engine.cost.step_model import StepModel, price
from cierzo.engine.cost.work import StepShape
from cierzo.engine.errors import CierzoError, ConfigError, refusal
from cierzo.engine.options import add_options, chosen
from cierzo.kernels.cpu import native
from cierzo.kernels.registry import has_native

BATCHES = (1, 2, 8, 32)
PROMPTS = (64, 128, 256, 512)  # and as many tokens as a step has; experts pass from memory to arithmetic in between
LONG = ((1, 2048), (8, 1024), (8, 2048))  # sequences, context: for attention
REPEATS = 3
SMALLEST, LARGEST = 1e-3, 4.0  # of a share
# Shares of what is not measured.
STATED: dict[Kind, float] = {"memory": 0.8, "experts": 0.8, "products": 0.8, "attention": 0.5}
ATTENTION = ("mla_decode", "gqa_decode")
Times = dict[str, dict[float, list[float]]]  # operation -> seconds at the limit -> seconds, of a call
FIXED = {"model", "device", "kernels", "frontend", "runner"}


class Calibrator:
    """A loaded checkpoint, whose operations can be measured again as often as the machine's speed changes. Raises
    ConfigError without native kernels, whose calls are what is timed."""

    def __init__(self, given: EngineOptions) -> None:
        self._options = given
        self._largest = resolve(given).scheduler.budget_tokens
        longest = max(self._largest, *(context for _, context in LONG))
        self._profiler = Profiler(given, max(BATCHES), longest + 64, REPEATS)

    def measure(self) -> Device:
        """Measure ceilings, shares and overheads; half a minute for small4-mini."""
        ceilings, profiler, stamp = measure_ceilings(), self._profiler, stamp_of(resolve(self._options))
        device = msgspec.structs.replace(
            limit_device(ceilings),
            name="cpu",
            source="measured: {checkpoint}, weights {weights}, commit {commit}".format(**stamp),
            stated=STATED,
            calibration=stamp,
        )
        prompts = sorted({*(tokens for tokens in PROMPTS if tokens < self._largest), self._largest})
        decodes = {batch: profiler.decode(batch, ceilings) for batch in BATCHES}
        prefills = {tokens: profiler.prefill(tokens, ceilings) for tokens in prompts}
        model = StepModel(profiler.config, device)
        times: Times = defaultdict(lambda: defaultdict(list))
        for batch, step in decodes.items():
            _add(times, model, StepShape.of([(CONTEXT - 1, 1)] * batch, generated=True), step.operations, step)
        for tokens, step in prefills.items():
            _add(times, model, StepShape.of([(0, tokens)], generated=False), step.operations, step)
        for batch, context in LONG:
            pieces = [(context - 1, 1)] * batch
            rows = profiler.operations(pieces, ceilings, generated=True)
            attention = [row for row in rows if row.operation in ATTENTION]
            _add(times, model, StepShape.of(pieces, generated=True), attention, decodes[batch])
        beyond = [(step.step_ms - step.native_ms) / 1e3 for step in decodes.values()]
        step_overhead_s, row_overhead_s = _line(list(decodes), beyond)
        measured = {
            operation: {
                limit_s: min(max(limit_s / fmean(took_s), SMALLEST), LARGEST) for limit_s, took_s in found.items()
            }
            for operation, found in times.items()
        }
        return msgspec.structs.replace(
            device, measured=measured, step_overhead_s=step_overhead_s, row_overhead_s=row_overhead_s
        )


def read_calibration(path: Path, wanted: EngineOptions) -> Device:
    """Read a calibration that was written for these options. Raises ConfigError for any other file."""
    limit, given = "a file that cierzo.bench.plan.calibrate has written", str(path)
    try:
        device = msgspec.json.decode(path.read_bytes(), type=Device)
    except (OSError, msgspec.MsgspecError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise refusal("calibration", limit, given, why) from error
    if not device.calibration:
        raise refusal("calibration", limit, given, "a device, but not a calibration")
    for name, ours in stamp_of(resolve(wanted)).items():
        theirs = device.calibration.get(name)
        if ours != theirs:
            told = f"calibration {path}: made with {name} {theirs}, and this is {ours}"
            raise ConfigError(told, field="calibration", limit=f"{name} {ours}", value=theirs)
    return device


def stamp_of(config: EngineConfig) -> dict[str, str | int]:
    """The stamp of a calibration made here and now: what it holds for. config: digest of the checkpoint's."""
    text = Path(config.checkpoint, "config.json")
    source = text if text.is_file() else Path(config.checkpoint, "params.json")
    chosen_set = config.kernels.instruction_set
    return {
        "checkpoint": config.name,
        "config": hashlib.sha256(source.read_bytes()).hexdigest()[:16],
        "commit": current_commit(),
        "dtype": config.dtype,
        "weights": config.weights,
        "kv_dtype": config.layout.dtype,
        "threads": config.threads,
        "instruction_set": native.instruction_set() if chosen_set == "auto" and has_native() else chosen_set,
    }


def _add(times: Times, model: StepModel, shape: StepShape, rows: list[OperationRow], step: StepProfile) -> None:
    """Add to `times` the seconds of a call of each operation that engine/cost counts, under its seconds at the
    limit: as timed one by one, times the engine's native time over theirs together."""
    works = {work.operation: work for work in model.work(shape)}
    scale = step.native_ms / sum(row.ms for row in step.operations if row.operation in works)
    for row in rows:
        work = works.get(row.operation)
        limit_s = 0.0 if work is None else float(price(model.device, work).limit_s)
        if work is not None and limit_s > 0:
            times[row.operation][limit_s / work.calls].append(row.ms / 1e3 * scale / work.calls)


def _line(x: list[int], y: list[float]) -> tuple[float, float]:
    """Fit y = a + b x by least relative squares; return a and b, neither below 0."""
    slope, start = np.polyfit(x, y, 1, w=1 / np.array(y))
    if slope < 0:
        return fmean(y), 0.0
    if start < 0:
        return 0.0, fmean([one / other for one, other in zip(y, x, strict=True)])
    return float(start), float(slope)


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate, print the device and write it."""
    parser = argparse.ArgumentParser(
        prog="cierzo.bench.plan.calibrate", description="Measure this machine's CPU as a device for plans."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the device here")
    add_options(parser, EngineOptions, skip=FIXED)
    arguments = parser.parse_args(argv)
    try:
        if arguments.json is not None:
            check_writable(arguments.json)
        given = chosen(arguments, EngineOptions, skip=FIXED)
        device = Calibrator(EngineOptions(model=arguments.checkpoint, device="cpu", **given)).measure()
    except CierzoError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(device.describe())
    for operation, points in device.measured.items():
        shares = ", ".join(f"{share:.0%} at {limit_s * 1e6:,.0f} us" for limit_s, share in sorted(points.items()))
        print(f"  {operation:14} {shares}")
    print(
        f"  beyond them    {device.step_overhead_s * 1e6:,.0f} us a step, {device.row_overhead_s * 1e6:,.0f} a row"
    )
    if arguments.json is not None:
        arguments.json.write_bytes(msgspec.json.encode(device) + b"\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
