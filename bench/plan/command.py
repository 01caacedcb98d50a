"""`cierzo plan CHECKPOINT --device h200,4xh100 --workload 2048/256@64`: plan a workload on devices."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from cierzo.bench.campaign import plot
from cierzo.bench.campaign.table import Grid, text
from cierzo.bench.plan.search import DevicePlan, LatencyLimits, Planner, read_experts
from cierzo.bench.report import Recording, check_writable
from cierzo.bench.stats import Summary
from cierzo.bench.workload import Workload, parse_workload
from cierzo.engine.checkpoint import checkpoint_folder
from cierzo.engine.config import EngineOptions, checkpoint_path
from cierzo.engine.errors import ConfigError, refusal
from cierzo.engine.options import add_options, chosen
from cierzo.engine.weights.shapes import named_model_config

NOT_PLANNED = {"model", "device", "kernels", "frontend", "runner", "expert_statistics"}
SHOWN = 22  # last letters of a device's name: it may be a path
MOST_CHANGES = 6
WORKLOAD = (
    "2048/256@64: tokens in, out, clients; 2048/256@3.5/s: requests a second; 1152:1024/64@16: 1,024 of 1,152 "
    "tokens are the same in all; FILE.jsonl: a trace, each line a request: "
    '{"arrival_s": 0.5, "input_tokens": 1152, "output_tokens": 64, "shared_tokens": 512, "image_tokens": [484]}, '
    "the last two if any"
)
FIGURE_CLIENTS = [2**power for power in range(12)]
FIGURE_INCHES = (4.5, 2.8)
Curve = list[tuple[int, float, float]]  # clients, requests/s, ms between tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, the devices, the workload, the limits and the engine's settings."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a folder, or for GPUs small4, small3: at true size"
    )
    devices = "h100, h200, several as in 4xh100, a device file, or cpu: this machine"
    parser.add_argument("--device", required=True, metavar="NAME[,NAME...]", help=devices)
    parser.add_argument("--workload", required=True, metavar="LOAD", help=WORKLOAD)
    add_options(parser, LatencyLimits)
    file = partial(parser.add_argument, type=Path, metavar="FILE")
    file("--calibration", help="of cierzo.bench.plan.calibrate, for cpu")
    file("--experts", help="what traffic chose, of cierzo bench experts")
    file("--json", help="write everything here")
    file("--png", help="draw throughput over clients here")
    add_options(parser.add_argument_group("settings of the engine"), EngineOptions, skip=NOT_PLANNED)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; exit status 1 if no device can run the workload. Raises ConfigError for bad input."""
    checkpoint = checkpoint_folder(arguments.checkpoint)
    if named_model_config(checkpoint) is None:
        checkpoint_path(checkpoint)  # else each device would be refused for it
    report = Recording("plan", arguments.json)
    options = EngineOptions(model=checkpoint, **chosen(arguments, EngineOptions, skip=NOT_PLANNED))
    workload = parse_workload(arguments.workload)
    if arguments.png is not None:
        check_writable(arguments.png)
        plot.find_matplotlib(arguments.png)
        if workload.trace:
            raise refusal("png", "left out", str(arguments.png), "a trace has no number of clients to draw over")
    limits = LatencyLimits(**chosen(arguments, LatencyLimits))
    names = arguments.device.split(",")
    experts = None if arguments.experts is None else read_experts(arguments.experts)
    path, calibrated = arguments.calibration, None
    if "cpu" in names:
        from cierzo.bench.plan.calibrate import Calibrator, read_calibration  # imports torch

        here = msgspec.structs.replace(options, device="cpu")
        calibrated = Calibrator(here).measure() if path is None else read_calibration(path, here)
    elif path is not None:
        raise refusal("calibration", "left out", str(path), "it is for device cpu, which is not planned for")
    planner = Planner(options, workload, limits, experts=experts, calibrated=calibrated)
    plans = [planner.plan(name) for name in names]
    print(table(plans, checkpoint, workload, limits, arguments.experts))
    asked = {"options": options, "workload": workload, "limits": limits, "devices": names}
    report.write({**asked, "experts": None if arguments.experts is None else str(arguments.experts)}, plans)
    if arguments.png is not None:
        draw(planner, plans, workload, arguments.png)
    return int(all(plan.refused for plan in plans))


def table(
    plans: Sequence[DevicePlan], checkpoint: str, workload: Workload, limits: LatencyLimits, experts: Path | None
) -> str:
    """The plans as text: a column for each device, then what would help."""
    asked = f"{checkpoint}, {workload}"
    if limits.given:
        parts = (("TTFT", limits.max_ttft_ms), ("inter-token time", limits.max_inter_token_ms))
        asked += ", " + ", ".join(f"{name} at most {ms:g} ms" for name, ms in parts if ms is not None)
        asked += f" ({limits.statistic})"
    routing = "as if chosen at random" if experts is None else f"as in {experts}"
    columns = [_column(plan) for plan in plans]
    labels = max(columns, key=len)
    rows = [[label, *(column.get(label, "-") for column in columns)] for label in labels]
    title = f"planned, not measured: {asked}; experts {routing}\n"
    lines = [text(Grid(title, ["", *(plan.device[-SHOWN:] for plan in plans)], rows))]
    for plan in plans:
        if plan.refused:
            lines += ["", f"{plan.device}: cannot run: {plan.refused}"]
        elif plan.changes:
            lines += ["", f"{plan.device}: each change alone, the best first"]
            lines += [f"  {line}" for line in _changes(plan)]
    return "\n".join(lines)


def _column(plan: DevicePlan) -> dict[str, str]:
    found = plan.forecast
    settings = {"shares of the device": plan.shares, "weights, KV cache": f"{plan.weights}, {plan.kv_dtype}"}
    if found is None:
        return {**settings, "fits": "no"}
    gaps_s, kept = found.inter_token_s, "" if found.keeps_up else " (falls behind)"
    room, slots = ("used up" if all else "enough" for all in (found.kv_room_reached, found.max_running_reached))
    return {
        **settings,
        "fits": "yes",
        "weights, of memory, GB": f"{plan.weight_gb:,.1f} of {plan.memory_gb:,.0f}",
        "vision tower, images, GB": f"{plan.tower_gb:,.2f}, {plan.image_gb:,.2f}" if plan.tower_gb else "none",
        "KV room": f"{plan.kv_gb:,.1f} GB, {plan.kv_tokens / 1e3:,.0f}k tok.",
        "load": plan.workload,
        "requests/s": f"{found.requests_per_s:,.2f}{kept}",
        "output tokens/s": f"{found.output_tokens_per_s:,.0f}",
        "TTFT p50, p99, s": _pair(found.time_to_first_token_s, 1.0),
        "inter-token mean, p50, p99, ms": f"{gaps_s.mean * 1e3:,.3g}, {_pair(gaps_s, 1e3)}",
        "completion p50, p99, s": _pair(found.completion_s, 1.0),
        "running, most": f"{found.running:,.1f}, {found.most_running:,}",
        "most waiting": f"{found.most_waiting:,}",
        "time goes to": found.limit,
        "limited by": found.roof,
        "memory, arithmetic": f"{found.memory_share:.0%}, {found.arithmetic_share:.0%}",
        "exchange, overhead": f"{found.exchange_share:.0%}, {found.overhead_share:.0%}",
        "of the limit": f"{found.limit_share:.0%}",
        "KV room, slots": f"{room}, {slots}",
        "distinct experts": f"{found.distinct_experts:,.1f}" if found.distinct_experts else "-",
        "GB, TFLOP a step": f"{found.bytes_per_step / 1e9:,.1f}, {found.operations_per_step / 1e12:,.2f}",
    }


def _pair(latency: Summary, factor: float) -> str:
    return f"{latency.p50 * factor:,.3g}, {latency.p99 * factor:,.3g}"


def _changes(plan: DevicePlan) -> list[str]:
    possible = [change for change in plan.changes if not change.refused]
    lines = [
        f"{change.gain:6.2f} x  {change.what}: {change.requests_per_s:,.2f} requests/s, "
        f"completion {change.completion_p50_s:,.3g} s"
        for change in possible[:MOST_CHANGES]
    ]
    lines += [f"   cannot  {change.what}: {change.refused}" for change in plan.changes if change.refused]
    return lines


def draw(planner: Planner, plans: Sequence[DevicePlan], workload: Workload, path: Path) -> None:
    """Draw requests a second and time between tokens over the number of clients, a line for each device."""
    curves = {
        f"{plan.device} ({plan.shares} shares)": _over_clients(planner, plan.device, workload)
        for plan in plans
        if plan.forecast is not None
    }
    colors = dict(zip(curves, plot.WARM + plot.COLD, strict=False))

    def panel(axis: Any, which: int, title: str) -> None:
        for name, points in curves.items():
            axis.plot([point[0] for point in points], [point[which] for point in points], color=colors[name])
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("clients")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)

    lengths = f"{workload.input_tokens:,} tokens in, {workload.output_tokens:,} out"
    panels = [partial(panel, which=1, title="requests/s"), partial(panel, which=2, title="ms between tokens, mean")]
    plot.plot(path, f"planned, not measured: {lengths}", panels, 2, FIGURE_INCHES, colors)


def _over_clients(planner: Planner, device: str, workload: Workload) -> Curve:
    """Powers of two, as far as the queue goes."""
    found: Curve = []
    for clients in FIGURE_CLIENTS:
        loop = msgspec.structs.replace(workload, concurrency=clients, rate=None, requests=None)
        try:
            one = planner.at(device, loop)
        except ConfigError:
            break
        found.append((clients, one.requests_per_s, one.inter_token_s.mean * 1e3))
    return found
