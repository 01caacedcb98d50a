"""`python -m cierzo.bench.plan.check CHECKPOINT...`: hold plans for this machine's CPU against measurements.

Each workload is measured between two calibrations, and again, up to `ATTEMPTS` times, while plans from both differ
by more than `STEADY` in requests/s; all attempts are kept (docs/architecture.md, section 10).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import msgspec

from cierzo.bench.campaign.table import grid_of, text
from cierzo.bench.latency import LoadResult, steady_load
from cierzo.bench.load import LoadSettings
from cierzo.bench.peers.engine import EngineFailed
from cierzo.bench.peers.ours import CierzoServer
from cierzo.bench.plan.calibrate import Calibrator
from cierzo.bench.plan.forecast import Forecast, forecast, left_out
from cierzo.bench.report import Recording
from cierzo.bench.workload import Workload, parse_workload
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.cost.device import Device
from cierzo.engine.cost.work import measured_distinct
from cierzo.engine.errors import CierzoError, refusal
from cierzo.engine.expert_statistics import ExpertStatistics
from cierzo.kernels.formats.number_formats import formats_on

PROMISED = 0.15  # of requests/s and completion time, either way
STEADY, ATTEMPTS = 0.15, 3
WORKLOADS = ("64/128@1", "128/64@8", "512/64@16", "1024/16@4", "1152:1024/64@8", "256/32@0.5/s")
OPEN_REQUESTS = 40
PROGRAM = "cierzo.bench.plan.check"
HEADS = {  # figure -> heading; of times the medians
    "requests_per_s": "requests/s",
    "completion_s": "completion, s",
    "ttft_s": "TTFT, s",
    "inter_token_s": "inter-token, s",
}


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """A measurement and the plan for it, by figure of HEADS. bandwidth: GB/s before and after. apart: relative
    difference of requests/s between plans from each calibration alone. experts: chosen by this load's tokens."""

    planned: dict[str, float]
    measured: dict[str, float]
    bandwidth: tuple[float, float]
    apart: float
    experts: ExpertStatistics | None = None

    @property
    def errors(self) -> dict[str, float]:
        """Relative errors of the plan: planned over measured, less one."""
        pairs = ((name, self.planned[name], self.measured[name]) for name in HEADS)
        return {name: planned / measured - 1 if measured else 0.0 for name, planned, measured in pairs}

    @property
    def within(self) -> bool:
        """Whether the plan is as close as promised."""
        return all(abs(self.errors[name]) <= PROMISED for name in ("requests_per_s", "completion_s"))


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """A workload and its attempts."""

    checkpoint: str
    weights: str
    workload: str
    requests: int
    attempts: list[Attempt]

    @property
    def counted(self) -> Attempt:
        """The attempt that counts: whose calibrations agree best."""
        return min(self.attempts, key=lambda attempt: attempt.apart)


def check(engine: EngineOptions, workloads: Sequence[Workload], folder: Path) -> Iterator[Checked]:
    """Calibrate and serve a checkpoint, and measure workloads, each again while the machine changes. Raises
    EngineFailed."""
    config, calibrator = resolve(engine), Calibrator(engine)
    served = {"weights": config.weights, "expert_statistics": config.model.moe is not None}
    with CierzoServer(Path(config.checkpoint), served, folder / f"{config.name}.log") as server:
        before, seed = calibrator.measure(), 0
        for workload in workloads:
            clients = workload.concurrency
            requests = workload.requests or (max(8, 4 * clients) if clients else OPEN_REQUESTS)
            attempts: list[Attempt] = []
            while len(attempts) < ATTEMPTS and all(one.apart > STEADY for one in attempts):
                seed += 1000  # no load finds the prompts of an earlier one in the prefix cache
                load = msgspec.structs.replace(workload, requests=requests, seed=seed)
                attempt, before = _attempt(config, calibrator, server, load, before)
                attempts.append(attempt)
            about = {"checkpoint": config.name, "weights": config.weights, "workload": str(workload)}
            yield Checked(**about, requests=requests, attempts=attempts)


def _attempt(
    config: EngineConfig, calibrator: Calibrator, server: CierzoServer, load: Workload, before: Device
) -> tuple[Attempt, Device]:
    """Load, calibrate, plan; the calibration serves the next workload too."""
    result = server.load(LoadSettings(rpc="", **msgspec.structs.asdict(load)))
    steady = steady_load(result, left_out(load.requests or 0, load.concurrency))
    experts, after = server.experts, calibrator.measure()
    distinct = None if experts is None else measured_distinct(experts)
    plans = [figures(forecast(config, load, device=device, distinct=distinct)) for device in (before, after)]
    attempt = Attempt(
        planned={name: fmean([plan[name] for plan in plans]) for name in HEADS},
        measured=figures(steady),
        bandwidth=(before.bytes_per_s / 1e9, after.bytes_per_s / 1e9),
        experts=experts,
        apart=abs(plans[0]["requests_per_s"] / plans[1]["requests_per_s"] - 1),
    )
    return attempt, after


def figures(found: Forecast | LoadResult) -> dict[str, float]:
    """The figures that a plan and a measurement are compared by."""
    completion_s = found.completion_s if isinstance(found, Forecast) else found.end_to_end_s
    times = (completion_s.p50, found.time_to_first_token_s.p50, found.inter_token_s.p50)
    return dict(zip(HEADS, (found.requests_per_s, *times), strict=True))


def table(found: Sequence[Checked]) -> str:
    """Planned / measured and the error of each figure, and how many workloads are as close as promised."""
    rows, missed = [], []
    for checked in found:
        one, name = checked.counted, f"{checked.checkpoint} {checked.workload}"
        missed += [] if one.within else [name]
        row = {"checkpoint, workload": name}
        for figure, error in one.errors.items():
            row[HEADS[figure]] = f"{one.planned[figure]:.3g} / {one.measured[figure]:.3g} {error:+4.0%}"
        rows.append(row | {"GB/s": "{:.0f}, {:.0f}".format(*one.bandwidth), "attempts": str(len(checked.attempts))})
    grid = text(grid_of("planned / measured; GB/s: memory read, before and after", rows))
    held = f"requests/s and completion within {PROMISED:.0%}: {len(found) - len(missed)} of {len(found)} workloads"
    return f"{grid}\n{held}" + (f"; not {', '.join(missed)}" if missed else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Check, print; exit status 1 if a workload is farther off than promised, 2 if it cannot be run."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Hold plans for this machine's CPU against loads.")
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+")
    parser.add_argument(
        "--workloads", nargs="+", default=WORKLOADS, metavar="LOAD", help="loops, as cierzo plan takes them"
    )
    parser.add_argument("--weights", default="auto", choices=("auto", *formats_on("cpu")), help="of the weights")
    parser.add_argument("--folder", type=Path, default=Path("build/plan-check"), help="for the servers' logs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write plans and measurements here")
    try:
        return _run(parser.parse_args(argv))
    except (CierzoError, EngineFailed) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    workloads = [parse_workload(text) for text in arguments.workloads]
    if traces := [str(workload) for workload in workloads if workload.trace]:
        raise refusal("workloads", "loops", traces[0], "a trace can be planned, not sent")
    given = {"device": "cpu", "weights": arguments.weights}
    engines = [msgspec.convert({"model": model, **given}, EngineOptions) for model in arguments.checkpoints]
    for engine in engines:  # refuse a wrong one now, not after half an hour
        resolve(engine)
    report = Recording("plan_check", arguments.json, ["python", "-m", PROGRAM, *sys.argv[1:]])
    arguments.folder.mkdir(parents=True, exist_ok=True)
    settings = {"workloads": list(arguments.workloads), "weights": arguments.weights, "promised": PROMISED}
    found: list[Checked] = []
    for engine in engines:
        for checked in check(engine, workloads, arguments.folder):
            found.append(checked)
            print(table([checked]), flush=True)
            report.write(settings, found)  # after each workload, in case the run is cut short
    print(f"\n{table(found)}")
    return int(not all(one.counted.within for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
