"""`python -m cierzo.bench.plan.check CHECKPOINT...`: hold plans for this machine's CPU against measurements.

For each workload: calibrate (calibrate.py), load a `cierzo serve` of the checkpoint, calibrate again. The plan is
made from the mean of the two calibrations, since a shared host's memory gives twice as much in one minute as in
another, and from the experts that this traffic chose, as `cierzo plan --experts` does: clients that share most of a
prompt share experts too. Where plans from each calibration alone differ by more than `STEADY` in requests/s, the
machine changed meanwhile, and the workload is measured again, up to `ATTEMPTS` times. The attempt whose
calibrations agree best counts, whatever its result; all are kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cierzo.bench.latency import steady_load
from cierzo.bench.load import LoadSettings
from cierzo.bench.peers.engine import Checkpoint, EngineFailed
from cierzo.bench.peers.ours import CierzoServer
from cierzo.bench.plan.calibrate import Calibrator, mean_device
from cierzo.bench.plan.forecast import Forecast, forecast, left_out
from cierzo.bench.report import Recording
from cierzo.bench.workload import Workload, parse_workload
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.cost.device import Device
from cierzo.engine.cost.work import measured_distinct
from cierzo.engine.errors import CierzoError
from cierzo.engine.expert_statistics import ExpertStatistics
from cierzo.kernels.formats.number_formats import formats_on

PROMISED = 0.15  # of requests/s and completion time, either way
STEADY, ATTEMPTS = 0.15, 3
WORKLOADS = ("64/128@1", "128/64@8", "512/64@16", "1024/16@4", "1152:1024/64@8", "256/32@0.5/s")
OPEN_REQUESTS = 40


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """A measurement and the plan for it; times are medians. bandwidth: GB/s before and after. apart: relative
    difference of requests/s between plans from each calibration alone. experts: chosen by this load's tokens."""

    planned_requests_per_s: float
    measured_requests_per_s: float
    planned_completion_s: float
    measured_completion_s: float
    planned_ttft_s: float
    measured_ttft_s: float
    planned_inter_token_s: float
    measured_inter_token_s: float
    bandwidth: tuple[float, float]
    apart: float
    experts: ExpertStatistics | None = None

    @property
    def errors(self) -> dict[str, float]:
        """Relative errors of the plan: planned over measured, less one."""
        names = ("requests_per_s", "completion_s", "ttft_s", "inter_token_s")
        found = ((name, getattr(self, f"planned_{name}"), getattr(self, f"measured_{name}")) for name in names)
        return {name: planned / measured - 1 if measured else 0.0 for name, planned, measured in found}

    @property
    def within(self) -> bool:
        """Whether the plan is as close as promised."""
        return all(abs(self.errors[name]) <= PROMISED for name in ("requests_per_s", "completion_s"))


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """A workload and its attempts. counts: the index of the attempt that counts."""

    checkpoint: str
    weights: str
    workload: str
    requests: int
    attempts: list[Attempt]
    counts: int

    @property
    def counted(self) -> Attempt:
        """The attempt that counts."""
        return self.attempts[self.counts]


def check(checkpoint: Path, workloads: list[Workload], folder: Path, weights: str) -> Iterator[Checked]:
    """Measure a checkpoint's workloads, one after another."""
    options = options_of(checkpoint, weights)
    config, calibrator = resolve(options), Calibrator(options)
    with serve(config, checkpoint, folder) as server:
        yield from attempts_of(config, calibrator, server, workloads)


def options_of(checkpoint: Path, weights: str) -> EngineOptions:
    """Options of the engine that is served and calibrated."""
    return msgspec.convert({"model": str(checkpoint), "device": "cpu", "weights": weights}, EngineOptions)


def serve(config: EngineConfig, checkpoint: Path, folder: Path) -> CierzoServer:
    """Start `cierzo serve` with the checkpoint; it counts experts."""
    options = {"weights": config.weights, "expert_statistics": config.model.moe is not None}
    where = Checkpoint(name=checkpoint.name, path=checkpoint)
    return CierzoServer(where, options, folder / f"{checkpoint.name}.log")


def attempts_of(
    config: EngineConfig, calibrator: Calibrator, server: CierzoServer, workloads: list[Workload]
) -> Iterator[Checked]:
    """Measure each workload, again while the machine changes."""
    before = calibrator.measure()
    number = 0  # of a load: none finds the prompts of an earlier one in the prefix cache
    for workload in workloads:
        attempts: list[Attempt] = []
        while len(attempts) < ATTEMPTS and all(one.apart > STEADY for one in attempts):
            number += 1
            attempt, before = _attempt(config, calibrator, server, workload, before, number)
            attempts.append(attempt)
        yield Checked(
            checkpoint=config.name,
            weights=config.weights,
            workload=str(workload),
            requests=_requests(workload),
            attempts=attempts,
            counts=min(range(len(attempts)), key=lambda index: attempts[index].apart),
        )


def _attempt(
    config: EngineConfig,
    calibrator: Calibrator,
    server: CierzoServer,
    workload: Workload,
    before: Device,
    number: int,
) -> tuple[Attempt, Device]:
    """Load, calibrate, plan; the calibration serves the next workload too."""
    requests = _requests(workload)
    settings = LoadSettings(
        rpc="",
        requests=requests,
        concurrency=workload.concurrency,
        rate=workload.rate,
        input_tokens=workload.input_tokens,
        shared_tokens=workload.shared_tokens,
        output_tokens=workload.output_tokens,
        seed=1000 * number,
    )
    steady = steady_load(server.load(settings), left_out(requests, workload.concurrency))
    experts, after = server.chosen_experts(), calibrator.measure()
    distinct = None if experts is None else measured_distinct(experts)

    def planned(device: Device) -> Forecast:
        loaded = msgspec.structs.replace(workload, requests=requests, seed=settings.seed)
        return forecast(config, loaded, device=device, distinct=distinct)

    plan, first, last = planned(mean_device([before, after])), planned(before), planned(after)
    attempt = Attempt(
        planned_requests_per_s=plan.requests_per_s,
        measured_requests_per_s=steady.requests_per_s,
        planned_completion_s=plan.completion_s.p50,
        measured_completion_s=steady.end_to_end_s.p50,
        planned_ttft_s=plan.time_to_first_token_s.p50,
        measured_ttft_s=steady.time_to_first_token_s.p50,
        planned_inter_token_s=plan.inter_token_s.p50,
        measured_inter_token_s=steady.inter_token_s.p50,
        bandwidth=(before.bytes_per_s / 1e9, after.bytes_per_s / 1e9),
        experts=experts,
        apart=abs(first.requests_per_s / last.requests_per_s - 1),
    )
    return attempt, after


def _requests(workload: Workload) -> int:
    return workload.requests or (max(8, 4 * workload.concurrency) if workload.concurrency else OPEN_REQUESTS)


HEADER = (
    f"{'checkpoint, workload':26}{'requests/s':>16}{'':>7}{'completion, s':>16}{'':>7}{'TTFT, s':>16}{'':>7}"
    f"{'inter-token, ms':>16}{'':>7}{'GB/s':>10}"
)


def line(checked: Checked) -> str:
    """A row of the table: planned / measured and the error of each figure."""
    one, cells = checked.counted, []
    for name, factor in (("requests_per_s", 1.0), ("completion_s", 1.0), ("ttft_s", 1.0), ("inter_token_s", 1e3)):
        planned, measured = (getattr(one, f"{side}_{name}") * factor for side in ("planned", "measured"))
        cells.append(f"{f'{planned:.3g} / {measured:.3g}':>16}{one.errors[name]:>+7.0%}")
    bandwidth = f"{one.bandwidth[0]:.0f}, {one.bandwidth[1]:.0f}"
    repeated = f"  {len(checked.attempts)} attempts" if len(checked.attempts) > 1 else ""
    return f"{f'{checked.checkpoint} {checked.workload}':26}{''.join(cells)}{bandwidth:>10}{repeated}"


def verdict(found: list[Checked]) -> str:
    """The closing line: how many workloads are as close as promised, and which are not."""
    missed = [f"{one.checkpoint} {one.workload}" for one in found if not one.counted.within]
    held = f"requests/s and completion within {PROMISED:.0%}: {len(found) - len(missed)} of {len(found)} workloads"
    return held + (f"; not {', '.join(missed)}" if missed else "")


def main(argv: list[str] | None = None) -> int:
    """Check, print as it goes; exit status 1 if a workload is farther off than promised, 2 if it cannot be run."""
    parser = argparse.ArgumentParser(description="Hold plans for this machine's CPU against measurements.")
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", type=Path)
    parser.add_argument(
        "--workloads", nargs="+", default=WORKLOADS, metavar="LOAD", help="as cierzo plan takes them"
    )
    parser.add_argument("--weights", default="auto", choices=("auto", *formats_on("cpu")), help="of the weights")
    parser.add_argument("--folder", type=Path, default=Path("build/plan-check"), help="for the servers' logs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write plans and measurements here")
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments, ["python", "-m", "cierzo.bench.plan.check", *(argv or sys.argv[1:])])
    except (CierzoError, EngineFailed) as error:
        print(f"plan_check: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace, command: list[str]) -> int:
    workloads = [parse_workload(text) for text in arguments.workloads]
    for checkpoint in arguments.checkpoints:  # refuse a wrong one now, not after half an hour
        resolve(options_of(checkpoint, arguments.weights))
    report = Recording("plan_check", arguments.json, command)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    settings = {"workloads": list(arguments.workloads), "weights": arguments.weights, "promised": PROMISED}
    print(f"planned / measured; GB/s: memory read, before and after\n{HEADER}", flush=True)
    found: list[Checked] = []
    for checkpoint in arguments.checkpoints:
        for checked in check(checkpoint, workloads, arguments.folder, arguments.weights):
            found.append(checked)
            print(line(checked), flush=True)
            report.write(settings, found)  # after each workload, in case the run is cut short
    print(verdict(found))
    return int(not all(one.counted.within for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
