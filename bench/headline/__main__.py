"""`make headline`: Small 4 against Small 3, same device, same engine, same load client, in alternation.

On the CPU real servers run small4-mini and small3-mini; with `--device cuda` those of --small4 and --small3; with
`--device simulated:h200` (h100, 4xh100, a device file) the models at true size in virtual time. A run that is
interrupted goes on where it stopped. The table is printed, and goes to --output with JSON, a PNG and a page.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import shlex
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from cierzo.bench.headline.cells import MODELS, Plan, cpu_plan, gpu_plan
from cierzo.bench.headline.html import page
from cierzo.bench.headline.outcome import Outcome, ratios, rows, verdicts
from cierzo.bench.headline.plot import plot
from cierzo.bench.headline.records import Identity, Records
from cierzo.bench.headline.run import Backend, Run
from cierzo.bench.headline.serve import Serving, gpu_name
from cierzo.bench.headline.simulate import Simulation
from cierzo.bench.headline.table import head, text
from cierzo.bench.machine import describe_machine
from cierzo.bench.peers.engine import Checkpoint, find_checkpoint
from cierzo.bench.peers.kept import fingerprint
from cierzo.bench.report import current_commit, make_report, write_report
from cierzo.engine.cost.cards import find_device
from cierzo.engine.cost.device import Device
from cierzo.engine.errors import CierzoError, ConfigError
from cierzo.engine.options import positive
from cierzo.engine.weights.shapes import named_model_config

SIMULATED = "simulated:"
ROUNDS = 3  # of a machine whose moods differ; a simulation has none


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for."""

    identity: Identity
    assumed: str
    plan: Plan
    rounds: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, write the outcome; exit status 1 if a cell could not be measured."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped on the way out
    try:
        return _run(arguments, sys.argv[1:] if argv is None else argv)
    except CierzoError as error:
        print(f"cierzo.bench.headline: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    folder = arguments.folder
    plan = _plan(arguments)
    backend, identity = _backend(arguments, folder)
    rounds = arguments.rounds or (1 if arguments.miniature or identity.device.startswith(SIMULATED) else ROUNDS)
    name = arguments.device.removeprefix(SIMULATED)
    stem = f"headline-{'simulated-' if arguments.device.startswith(SIMULATED) else ''}{Path(name).stem}"
    if arguments.miniature:
        stem += "-miniature"
    records = Records(arguments.samples or folder / f"{stem}.jsonl", identity)
    if not arguments.report:
        Run(plan, backend, records, functools.partial(print, flush=True)).measure(rounds)
    command = shlex.join(["python", "-m", "cierzo.bench.headline", *argv])
    settings = Settings(identity=identity, assumed=_assumed(arguments.device), plan=plan, rounds=rounds)
    return 0 if _write(settings, records, arguments.output / stem, command, started) else 1


def _plan(arguments: argparse.Namespace) -> Plan:
    """Raises ConfigError for a cell or a number format that there is not."""
    make = cpu_plan if arguments.device == "cpu" else gpu_plan
    plan = make(miniature=arguments.miniature)
    cells = _among("cells", arguments.cells, [cell.name for cell in plan.cells])
    weights = _among("weights", arguments.weights, [subject.weights for subject in plan.subjects])
    return msgspec.structs.replace(
        plan,
        cells=tuple(cell for cell in plan.cells if cell.name in cells),
        subjects=tuple(subject for subject in plan.subjects if subject.weights in weights),
        pairs=tuple(pair for pair in plan.pairs if all(one.weights in weights for one in pair)),
        goals=tuple(goal for goal in plan.goals if {goal.small4.weights, goal.small3.weights} <= {*weights}),
    )


def _among(name: str, given: str | None, known: list[str]) -> list[str]:
    wanted = known if given is None else given.split(",")
    if unknown := [one for one in wanted if one not in known]:
        told = ", ".join(dict.fromkeys(known))
        raise ConfigError(
            f"unknown {name}: {', '.join(unknown)}; known: {told}", field=name, limit=told, value=unknown
        )
    return wanted


def _backend(arguments: argparse.Namespace, folder: Path) -> tuple[Backend, Identity]:
    commit = arguments.commit or current_commit()
    if arguments.device.startswith(SIMULATED):
        device = find_device(arguments.device.removeprefix(SIMULATED))
        models = {model: getattr(arguments, model) or model for model in MODELS}
        identity = Identity(
            commit=commit, device=f"{SIMULATED}{_told(device)}", **{m: _model(models[m]) for m in MODELS}
        )
        return Simulation(device, models, folder), identity
    if arguments.device not in ("cpu", "cuda"):
        limit = "cpu, cuda or simulated:NAME"
        raise ConfigError(
            f"device must be {limit}, got {arguments.device!r}", field="device", limit=limit, value=arguments.device
        )
    scale = "tiny" if arguments.miniature else "mini"
    names = {model: getattr(arguments, model) or model for model in MODELS}
    if arguments.device == "cuda" and not (arguments.small4 and arguments.small3):
        raise ConfigError(
            "--device cuda needs --small4 DIR and --small3 DIR", field="small4", value=arguments.small4
        )
    checkpoints = {
        model: find_checkpoint(name, arguments.checkpoint_folder, scale) for model, name in names.items()
    }
    machine = describe_machine()
    where = f"{machine.processor}, {machine.cores} cores" if arguments.device == "cpu" else gpu_name()
    found = {model: _checkpoint(checkpoint) for model, checkpoint in checkpoints.items()}
    return Serving(arguments.device, checkpoints, folder), Identity(commit=commit, device=where, **found)


def _assumed(name: str) -> str:
    """Of a simulated device; of a real one nothing is."""
    if not name.startswith(SIMULATED):
        return ""
    device = find_device(name.removeprefix(SIMULATED))
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in device.stated.items())
    measured = f", measured: {', '.join(device.measured)}" if device.measured else ""
    overhead = f"{device.step_overhead_s * 1e3:.1f} ms a step and {device.row_overhead_s * 1e6:.1f} us a sequence"
    return f"shares of its rates: {shares}{measured}; beside them {overhead}; experts as if chosen at random"


def _told(device: Device) -> str:
    return f"{device.describe()}; {_digest(msgspec.json.encode(device))}"


def _model(name: str) -> str:
    config = named_model_config(name)
    if config is None:
        return _checkpoint(find_checkpoint(name, Path()))
    return f"{name} at true size, {_digest(msgspec.json.encode(config))}"


def _checkpoint(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.path.name}, {_digest(msgspec.json.encode(fingerprint(checkpoint.path)))}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


def _write(settings: Settings, records: Records, stem: Path, command: str, started: str) -> bool:
    """Print the table, write `stem`.txt, .json, .png and .html; whether every cell has a figure."""
    plan, identity = settings.plan, settings.identity
    compared = ratios(plan, records)
    outcome = Outcome(
        device=identity.device.removeprefix(SIMULATED),
        assumed=settings.assumed,
        simulation=identity.device.startswith(SIMULATED),
        commit=identity.commit,
        small4=identity.small4,
        small3=identity.small3,
        goals_are_for=plan.goals_are_for,
        rows=rows(plan, records),
        ratios=compared,
        verdicts=verdicts(plan, compared),
    )
    lines = head(outcome, command)
    told = text(outcome, lines)
    print(f"\n{told}")
    stem.parent.mkdir(parents=True, exist_ok=True)
    _with(stem, ".txt").write_text(told + "\n", encoding="utf-8")
    report = make_report("headline", command=command, started=started, settings=settings, results=outcome)
    write_report(report, _with(stem, ".json"))
    picture: Path | None = _with(stem, ".png")
    try:
        plot(outcome, _with(stem, ".png"))
    except ConfigError as error:
        print(f"no picture: {error}")
        picture = None
    _with(stem, ".html").write_text(page(outcome, report, lines, picture), encoding="utf-8")
    return len(outcome.rows) == len(plan.cells) * len(plan.subjects) and not any(row.error for row in outcome.rows)


def _with(stem: Path, suffix: str) -> Path:
    return stem.parent / (stem.name + suffix)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cierzo.bench.headline", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu, cuda, simulated:h200 (h100, 4xh100, a device file)"
    )
    for model in MODELS:
        parser.add_argument(
            f"--{model}", metavar="DIR", help="checkpoint; on the CPU default: made at random, mini"
        )
    parser.add_argument("--rounds", type=positive, metavar="N", help=f"default: {ROUNDS}; of a simulation 1")
    parser.add_argument("--cells", metavar="A,B", help="default: all")
    parser.add_argument("--weights", metavar="A,B", help="number formats of weights, of both models; default: all")
    parser.add_argument("--miniature", action="store_true", help="tiny checkpoints, a few short requests")
    parser.add_argument("--report", action="store_true", help="measure nothing, report what was measured")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/headline"), metavar="DIR", help="samples and logs"
    )
    parser.add_argument(
        "--checkpoint-folder", type=Path, default=Path("build/checkpoints"), metavar="DIR", help="where small4 is"
    )
    parser.add_argument("--samples", type=Path, metavar="FILE", help="default: in --folder, named after the device")
    parser.add_argument(
        "--commit", metavar="NAME", help="go on with the samples of this one, though HEAD has changed since"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("bench/results"), metavar="DIR", help="where JSON, table and PNG go"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
