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
from typing import Any

import msgspec

from cierzo.bench.campaign import options
from cierzo.bench.headline.cells import CPU_PLAN, GPU_PLAN, MODELS, SIMULATED, Plan
from cierzo.bench.headline.engines import Headline, Serving, Simulation, gpu_name
from cierzo.bench.headline.outcome import Outcome, outcome_of, picture, text
from cierzo.bench.machine import describe_machine
from cierzo.bench.peers.engine import find_checkpoint, fingerprint
from cierzo.engine.cost.cards import find_device
from cierzo.engine.cost.device import Device
from cierzo.engine.errors import ConfigError, refusal
from cierzo.engine.weights.shapes import named_model_config

ROUNDS = 3  # where a machine's mood differs from one to the next; a simulation has none


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, write the outcome; exit status 1 if a cell could not be measured."""
    return options.run(_parser(), argv, _stem, _wanted, Outcome, text, picture)


def _stem(arguments: argparse.Namespace) -> str:
    _, simulated, name = arguments.device.rpartition(SIMULATED)
    return f"headline-{simulated.replace(':', '-')}{Path(name).stem}"


def _wanted(arguments: argparse.Namespace) -> options.Wanted:
    """The plan with the place where it runs. Raises ConfigError."""
    plan, is_simulation = _plan(arguments), arguments.device.startswith(SIMULATED)
    names = {model: getattr(arguments, model) or model for model in MODELS}
    campaign: Headline
    if is_simulation:
        device = find_device(arguments.device.removeprefix(SIMULATED))
        campaign = Simulation(plan, device, names, arguments.folder)
        where = f"{SIMULATED}{device.describe()}; {_digest(device)}"
        identity = {**{model: _model(name) for model, name in names.items()}, "assumed": _assumed(device)}
    elif arguments.device not in ("cpu", "cuda"):
        raise refusal("device", "cpu, cuda or simulated:NAME", arguments.device)
    elif arguments.device == "cuda" and not (arguments.small4 and arguments.small3):
        told = "--device cuda needs --small4 DIR and --small3 DIR"
        raise ConfigError(told, field="small4", value=arguments.small4)
    else:
        checkpoints = {model: find_checkpoint(name, arguments.checkpoint_folder) for model, name in names.items()}
        machine, gpu = describe_machine(), "" if arguments.device == "cpu" else gpu_name()
        campaign = Serving(plan, checkpoints, arguments.folder, gpu)
        where = gpu or f"{machine.processor}, {machine.cores} cores"
        identity = {model: _checkpoint(found) for model, found in checkpoints.items()}
    return options.Wanted(
        campaign=campaign,
        identity={"device": where, **identity},
        rounds=arguments.rounds or (1 if is_simulation else ROUNDS),
        outcome=functools.partial(outcome_of, plan),
    )


def _plan(arguments: argparse.Namespace) -> Plan:
    """Raises ConfigError for a cell or a number format that there is not."""
    plan = CPU_PLAN if arguments.device == "cpu" else GPU_PLAN
    cells = options.among("cells", arguments.cells, {cell.name: cell for cell in plan.cells})
    known = {subject.weights: subject.weights for subject in plan.subjects}
    weights = options.among("weights", arguments.weights, known)
    return msgspec.structs.replace(
        plan,
        cells=tuple(cells),
        subjects=tuple(subject for subject in plan.subjects if subject.weights in weights),
        pairs=tuple(pair for pair in plan.pairs if all(one.weights in weights for one in pair)),
    )


def _assumed(device: Device) -> str:
    """The assumptions about a simulated device, in words."""
    shares = device.shares + "".join(f", {kind} {share:.0%}" for kind, share in device.stated.items())
    measured = f", measured: {', '.join(device.measured)}" if device.measured else ""
    overhead = f"{device.step_overhead_s * 1e3:.2f} ms a step and {device.row_overhead_s * 1e6:.1f} us a sequence"
    return f"shares of its rates: {shares}{measured}; beside them {overhead}; experts as if chosen at random"


def _model(name: str) -> str:
    if config := named_model_config(name):
        return f"{name} at true size, {_digest(config)}"
    return _checkpoint(find_checkpoint(name, Path()))


def _checkpoint(checkpoint: Path) -> str:
    return f"{checkpoint.name}, {_digest(fingerprint(checkpoint))}"


def _digest(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()[:8]


def _parser() -> argparse.ArgumentParser:
    parser = options.make_parser("headline", __doc__.splitlines()[0], f"{ROUNDS}; 1 in a simulation")
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu, cuda, simulated:h200 (h100, 4xh100, a device file)"
    )
    for model in MODELS:
        parser.add_argument(f"--{model}", metavar="DIR", help="checkpoint; default, but for cuda: at random")
    parser.add_argument("--weights", metavar="A,B", help="number formats of weights, of both models; default: all")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
