"""`cierzo plan CHECKPOINT --device h200,4xh100 --workload 2048/256@64`: plan a workload on devices.

The table says for each device whether weights and KV cache fit, how many requests run at once, requests a second,
latencies, what limits, and which change would help most. `small4` and `small3` stand for the models at true size.
Nothing is measured: figures follow from bytes and operations, and from the shares of a device's limits that kernels
reach.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from cierzo.bench.plan.forecast import Percentiles
from cierzo.bench.plan.search import DevicePlan, LatencyLimits, Planner, read_experts
from cierzo.bench.report import Recording, check_writable
from cierzo.bench.workload import Workload, parse_workload
from cierzo.engine.checkpoint import checkpoint_folder
from cierzo.engine.config import EngineOptions, checkpoint_path
from cierzo.engine.cost.device import Device
from cierzo.engine.errors import ConfigError, refusal
from cierzo.engine.options import add_options, chosen, positive_float
from cierzo.engine.weights.shapes import named_model_config

NOT_PLANNED = {"model", "device", "kernels", "frontend", "runner"}
COLUMN, LABEL = 24, 30
MOST_CHANGES = 6
FIGURE_CLIENTS = 2048
FIGURES = [
    *("requests/s", "output tokens/s"),
    *("TTFT p50, p99, s", "inter-token mean, p50, p99, ms", "completion p50, p99, s"),
    *("running, most", "most waiting", "time goes to", "memory, arithmetic", "exchange, overhead", "of the limit"),
    *("KV room, slots", "distinct experts", "GB, TFLOP a step"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, the devices, the workload, the limits and the engine's settings."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a folder, or for GPUs small4, small3: at true size"
    )
    parser.add_argument(
        "--device",
        required=True,
        metavar="NAME[,NAME...]",
        help="h100, h200, several as in 4xh100, a device file, or cpu: this machine",
    )
    parser.add_argument(
        "--workload",
        required=True,
        metavar="LOAD",
        help="2048/256@64: tokens in, out, clients; 2048/256@3.5/s: requests a second; 1152:1024/64@16: 1,024 of "
        "1,152 tokens are the same in all; FILE.jsonl: a trace",
    )
    parser.add_argument(
        "--max-ttft-ms", type=positive_float, metavar="X", help="find the highest load whose first tokens keep this"
    )
    parser.add_argument(
        "--max-inter-token-ms", type=positive_float, metavar="X", help="the same for the time between two tokens"
    )
    parser.add_argument(
        "--statistic", choices=("mean", "p50", "p99"), default="p99", help="of these times that must keep it"
    )
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="of cierzo.bench.plan.calibrate, for cpu")
    parser.add_argument("--experts", type=Path, metavar="FILE", help="what traffic chose, of cierzo bench experts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw throughput over clients here")
    add_options(parser.add_argument_group("settings of the engine"), EngineOptions, skip=NOT_PLANNED)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; exit status 1 if no device can run the workload. Raises ConfigError for bad input."""
    checkpoint = checkpoint_folder(arguments.checkpoint)
    if named_model_config(checkpoint) is None:
        checkpoint_path(checkpoint)  # else each device would be refused for it
    report = Recording("plan", arguments.json)
    if arguments.png is not None:
        check_writable(arguments.png)
    given = chosen(arguments, EngineOptions, skip=NOT_PLANNED)
    options = EngineOptions(model=checkpoint, **given)
    workload = parse_workload(arguments.workload)
    limits = LatencyLimits(
        max_ttft_ms=arguments.max_ttft_ms,
        max_inter_token_ms=arguments.max_inter_token_ms,
        statistic=arguments.statistic,
    )
    names = arguments.device.split(",")
    experts = None if arguments.experts is None else read_experts(arguments.experts)
    calibrated = _calibrated(options, arguments.calibration, names)
    planner = Planner(options, workload, limits, experts=experts, calibrated=calibrated)
    plans = [planner.plan(name) for name in names]
    print(table(plans, checkpoint, workload, limits, arguments.experts))
    if arguments.png is not None:
        draw(planner, plans, workload, arguments.png)
    asked = {"options": options, "workload": workload, "limits": limits, "devices": names}
    report.write(asked | {"experts": None if arguments.experts is None else str(arguments.experts)}, plans)
    return int(all(plan.refused for plan in plans))


def _calibrated(options: EngineOptions, path: Path | None, names: Sequence[str]) -> Device | None:
    """This machine's CPU, where a plan is for it: read from the file, or measured now."""
    if "cpu" not in names:
        if path is not None:
            raise refusal("calibration", "left out", str(path), "it is for device cpu, which is not planned for")
        return None
    from cierzo.bench.plan.calibrate import calibrate, read_calibration  # imports torch

    options = msgspec.structs.replace(options, device="cpu")
    return calibrate(options) if path is None else read_calibration(path, options)


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
    lines = [f"planned, not measured: {asked}; experts {routing}", ""]
    lines.append(" " * LABEL + "".join(f"{plan.device[-COLUMN + 2 :]:>{COLUMN}}" for plan in plans))
    columns = [_column(plan) for plan in plans]
    for label in columns[0]:
        lines.append(f"{label:{LABEL}}" + "".join(f"{column[label]:>{COLUMN}}" for column in columns))
    for plan in plans:
        if plan.refused:
            lines += ["", f"{plan.device}: cannot run: {plan.refused}"]
        elif plan.changes:
            lines += ["", f"{plan.device}: each change alone, the best first"]
            lines += [f"  {line}" for line in _changes(plan)]
    return "\n".join(lines)


def _column(plan: DevicePlan) -> dict[str, str]:
    found, nothing = plan.forecast, plan.forecast is None
    rows: dict[str, Any] = {
        "shares of the device": plan.shares,
        "weights, KV cache": f"{plan.weights}, {plan.kv_dtype}",
        "fits": "no" if nothing else "yes",
        "weights, of memory, GB": "" if nothing else f"{plan.weight_gb:,.1f} of {plan.memory_gb:,.0f}",
        "KV room": "" if nothing else f"{plan.kv_gb:,.1f} GB, {plan.kv_tokens / 1e3:,.0f}k tok.",
        "load": plan.workload,
    }
    if found is None:
        return {**rows, **dict.fromkeys(FIGURES, "-")}

    def share(*parts: float) -> str:
        return ", ".join(f"{part:.0%}" for part in parts)

    kept = "" if found.keeps_up else " (falls behind)"
    figures = (
        f"{found.requests_per_s:,.2f}{kept}",
        f"{found.output_tokens_per_s:,.0f}",
        _pair(found.time_to_first_token_s, 1.0),
        f"{found.inter_token_s.mean * 1e3:,.3g}, {_pair(found.inter_token_s, 1e3)}",
        _pair(found.completion_s, 1.0),
        f"{found.running:,.1f}, {found.most_running:,}",
        f"{found.most_waiting:,}",
        found.limit,
        share(found.memory_share, found.arithmetic_share),
        share(found.exchange_share, found.overhead_share),
        share(found.limit_share),
        f"{_reached(found.kv_room_reached)}, {_reached(found.max_running_reached)}",
        f"{found.distinct_experts:,.1f}" if found.distinct_experts else "-",
        f"{found.bytes_per_step / 1e9:,.1f}, {found.operations_per_step / 1e12:,.2f}",
    )
    return {**rows, **dict(zip(FIGURES, figures, strict=True))}


def _pair(latency: Percentiles, factor: float) -> str:
    return f"{latency.p50 * factor:,.3g}, {latency.p99 * factor:,.3g}"


def _reached(reached: bool) -> str:
    return "used up" if reached else "enough"


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
    """Draw requests a second and time between tokens over the number of clients, a line for each device and a dot
    for its plan. Raises ConfigError without matplotlib, and for a trace, which has no clients."""
    if workload.trace:
        raise ConfigError("a trace has no number of clients to draw over", field="png", value=path)
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(f"{path} needs matplotlib: pip install 'cierzo[bench]'", field="png") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for plan in plans:
        if plan.forecast is None:
            continue
        points = _over_clients(planner, plan, workload)
        clients = [point[0] for point in points]
        (line,) = left.plot(clients, [point[1] for point in points], label=f"{plan.device} ({plan.shares} shares)")
        right.plot(clients, [point[2] for point in points], color=line.get_color())
        dot = {"marker": "o", "color": line.get_color(), "linestyle": "none"}
        at = parse_workload(plan.workload).concurrency or plan.forecast.running
        left.plot([at], [plan.forecast.requests_per_s], **dot)
        right.plot([at], [plan.forecast.inter_token_s.mean * 1e3], **dot)
    for axis, name in ((left, "requests/s"), (right, "ms between tokens, mean")):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("clients")
        axis.set_title(name, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    lengths = f"{workload.input_tokens:,} tokens in, {workload.output_tokens:,} out"
    figure.suptitle(f"planned, not measured: {lengths}; a dot is the plan", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _over_clients(planner: Planner, plan: DevicePlan, workload: Workload) -> list[tuple[int, float, float]]:
    """Points (clients, requests/s, ms between tokens), as far as the queue goes."""
    sizes = {2**power for power in range(FIGURE_CLIENTS.bit_length())}
    planned = parse_workload(plan.workload).concurrency
    points = []
    for clients in sorted(sizes if planned is None else {*sizes, planned}):
        loop = msgspec.structs.replace(workload, concurrency=clients, rate=None, requests=None)
        try:
            found = planner.at(plan.device, loop)
        except ConfigError:
            break
        points.append((clients, found.requests_per_s, found.inter_token_s.mean * 1e3))
    return points
