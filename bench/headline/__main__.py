"""`make headline`: Small 4 against Small 3, same device, same engine, same load client, in alternation.

On the CPU real servers run small4-mini and small3-mini; with `--device cuda` those of --small4 and --small3; with
`--device simulated:h200` (h100, 4xh100, a device file) the models at true size in virtual time. A run that is
interrupted goes on where it stopped. The table is printed, and goes to --output with JSON and a PNG.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cierzo.bench.campaign import options
from cierzo.bench.campaign.loop import Run
from cierzo.bench.campaign.outcome import SIMULATED, saved, tell
from cierzo.bench.campaign.store import Store
from cierzo.bench.headline.cells import MODELS, Plan, cpu_plan, gpu_plan
from cierzo.bench.headline.measurement import Headline
from cierzo.bench.headline.outcome import outcome_of
from cierzo.bench.headline.plot import picture
from cierzo.bench.headline.serve import Serving, gpu_name
from cierzo.bench.headline.simulate import Simulation
from cierzo.bench.headline.table import Outcome, text
from cierzo.bench.machine import describe_machine
from cierzo.bench.peers.engine import Checkpoint, find_checkpoint, fingerprint
from cierzo.bench.report import now
from cierzo.bench.revision import current_commit
from cierzo.engine.cost.cards import find_device
from cierzo.engine.cost.device import Device
from cierzo.engine.errors import ConfigError
from cierzo.engine.weights.shapes import named_model_config

ROUNDS = 3  # where a machine's mood differs from one to the next; a simulation has none


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The plan and the rounds that were asked for."""

    plan: Plan
    rounds: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, write the outcome; exit status 1 if a cell could not be measured."""
    return options.run(_parser(), _run, argv)


def _run(arguments: argparse.Namespace, command: str) -> bool:
    started = now()
    simulated = arguments.device.startswith(SIMULATED)
    name = Path(arguments.device.removeprefix(SIMULATED)).stem
    stem = f"headline-{'simulated-' if simulated else ''}{name}{'-miniature' if arguments.miniature else ''}"
    samples = arguments.samples or arguments.folder / f"{stem}.jsonl"
    if arguments.report and not samples.exists() and (found := saved(arguments.output / stem, Outcome)) is not None:
        print(text(found, command))
        return True
    plan = _plan(arguments)
    campaign, identity = _campaign(arguments, plan)
    rounds = arguments.rounds or (1 if arguments.miniature or simulated else ROUNDS)
    store = Store(samples, identity)
    if not arguments.report:
        Run(campaign, store, functools.partial(print, flush=True)).measure(rounds)
    found = outcome_of(plan, store, _assumed(arguments.device))
    about = {"command": command, "started": started, "settings": Settings(plan=plan, rounds=rounds)}
    draw = functools.partial(picture, found)
    tell("headline", found, text(found, command), arguments.output / stem, draw, **about)
    return len(found.rows) == len(plan.cells) * len(plan.subjects) and not any(row.error for row in found.rows)


def _plan(arguments: argparse.Namespace) -> Plan:
    """Raises ConfigError for a cell or a number format that there is not."""
    make = cpu_plan if arguments.device == "cpu" else gpu_plan
    plan = make(miniature=arguments.miniature)
    cells = options.among("cells", arguments.cells, [cell.name for cell in plan.cells])
    weights = options.among("weights", arguments.weights, [subject.weights for subject in plan.subjects])
    return msgspec.structs.replace(
        plan,
        cells=tuple(cell for cell in plan.cells if cell.name in cells),
        subjects=tuple(subject for subject in plan.subjects if subject.weights in weights),
        pairs=tuple(pair for pair in plan.pairs if all(one.weights in weights for one in pair)),
        goals=tuple(goal for goal in plan.goals if {goal.ours.weights, goal.against.weights} <= {*weights}),
    )


def _campaign(arguments: argparse.Namespace, plan: Plan) -> tuple[Headline, dict[str, str]]:
    """The plan with the place where it runs, and the identity of its samples. Raises ConfigError."""
    commit, folder = arguments.commit or current_commit(), arguments.folder
    names = {model: getattr(arguments, model) or model for model in MODELS}
    if arguments.device.startswith(SIMULATED):
        device = find_device(arguments.device.removeprefix(SIMULATED))
        found = {model: _model(name) for model, name in names.items()}
        where = f"{SIMULATED}{_told(device)}"
        return Simulation(plan, device, names, folder), {"commit": commit, "device": where, **found}
    if arguments.device not in ("cpu", "cuda"):
        limit = "cpu, cuda or simulated:NAME"
        raise ConfigError(
            f"device must be {limit}, got {arguments.device!r}", field="device", limit=limit, value=arguments.device
        )
    if arguments.device == "cuda" and not (arguments.small4 and arguments.small3):
        raise ConfigError(
            "--device cuda needs --small4 DIR and --small3 DIR", field="small4", value=arguments.small4
        )
    scale = "tiny" if arguments.miniature else "mini"
    checkpoints = {
        model: find_checkpoint(name, arguments.checkpoint_folder, scale) for model, name in names.items()
    }
    machine = describe_machine()
    where = f"{machine.processor}, {machine.cores} cores" if arguments.device == "cpu" else gpu_name()
    found = {model: _checkpoint(checkpoint) for model, checkpoint in checkpoints.items()}
    serving = Serving(plan, arguments.device, checkpoints, folder)
    return serving, {"commit": commit, "device": where, **found}


def _assumed(name: str) -> str:
    """The assumptions about a simulated device, in words; about a real one there are none."""
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


def _parser() -> argparse.ArgumentParser:
    rounds = f"{ROUNDS}; 1 in miniature or a simulation"
    parser = options.make_parser("cierzo.bench.headline", __doc__.splitlines()[0], "build/headline", rounds)
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu, cuda, simulated:h200 (h100, 4xh100, a device file)"
    )
    for model in MODELS:
        parser.add_argument(
            f"--{model}", metavar="DIR", help="checkpoint; on the CPU default: made at random, mini"
        )
    parser.add_argument("--cells", metavar="A,B", help="default: all")
    parser.add_argument("--weights", metavar="A,B", help="number formats of weights, of both models; default: all")
    parser.add_argument("--miniature", action="store_true", help="tiny checkpoints, a few short requests")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
