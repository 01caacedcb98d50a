"""`make peers`: cierzo beside transformers, vLLM and llama.cpp, on the same checkpoints, in one run.

Engines are measured in alternation, one in memory at a time; a run that is interrupted goes on where it stopped, as
long as the code is the same. The table is printed, and goes to --output with JSON of every round and a PNG. A round
of all takes about an hour and a half on two cores.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cierzo.bench.campaign import options
from cierzo.bench.campaign.loop import Run
from cierzo.bench.campaign.outcome import saved, tell
from cierzo.bench.campaign.store import Store
from cierzo.bench.machine import describe_machine
from cierzo.bench.peers import campaign, llamacpp, ours, transformers, vllm
from cierzo.bench.peers.cells import BY_PRODUCTS, Cell, cells
from cierzo.bench.peers.engine import CHECKPOINTS, Engine, Peer, find_checkpoint
from cierzo.bench.peers.environments import RECIPES, Recipe
from cierzo.bench.peers.plot import picture
from cierzo.bench.peers.results import Outcome, outcome_of
from cierzo.bench.peers.table import text
from cierzo.bench.report import now
from cierzo.bench.revision import current_commit

PEERS: dict[str, Peer] = {
    "cierzo": ours,
    "transformers": transformers,
    "vllm": vllm,
    "llamacpp": llamacpp,
}
ENGINES = {engine.name: engine for peer in PEERS.values() for engine in peer.ENGINES}
ROUNDS, CLOSE_ROUNDS = 3, 5


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The engines and cells that were asked for, and the versions of the peers."""

    checkpoints: list[str]
    engines: list[Engine]
    cells: list[Cell]
    rounds: int
    close_rounds: int
    recipes: dict[str, Recipe]


def main(argv: Sequence[str] | None = None) -> int:
    """Make what is missing, measure, write the outcome; exit status 1 if a cell could not be measured."""
    return options.run(_parser(), _run, argv)


def _run(arguments: argparse.Namespace, command: str) -> bool:
    started, commit = now(), arguments.commit or current_commit()
    stem = arguments.output / ("peers-quick" if arguments.quick else "peers")
    samples = arguments.samples or arguments.folder / f"samples-{commit}.jsonl"
    if arguments.report and not samples.exists() and (found := saved(stem, Outcome)) is not None:
        print(text(found, command))
        return True
    plan = _plan(arguments)
    machine = describe_machine()
    identity = {"commit": commit, "device": f"{machine.processor}, {machine.cores} cores"}
    store = Store(samples, identity)
    if not arguments.report:
        Run(campaign.Peers(plan, PEERS), store).measure(max(plan.rounds, plan.close_rounds))
    return write(plan, store, stem, command, started)


def write(plan: campaign.Plan, store: Store, stem: Path, command: str, started: str) -> bool:
    """Print the table, write `stem`.txt, .json and .png; whether every cell that was tried has a figure."""
    found = outcome_of(store, plan.checkpoints, plan.engines, [*plan.cells, *BY_PRODUCTS])
    settings = Settings(
        checkpoints=[checkpoint.name for checkpoint in plan.checkpoints],
        engines=plan.engines,
        cells=plan.cells,
        rounds=plan.rounds,
        close_rounds=plan.close_rounds,
        recipes=RECIPES,
    )
    about = {"command": command, "started": started, "settings": settings}
    tell("peers", found, text(found, command), stem, functools.partial(picture, found), **about)
    return not any(row.error for row in found.rows)


def _plan(arguments: argparse.Namespace) -> campaign.Plan:
    """Raises ConfigError for what there is not."""
    all_cells = cells(quick=arguments.quick)
    names = options.among("cells", arguments.cells, [cell.name for cell in all_cells])
    engines = options.among("engines", arguments.engines or ",".join(ENGINES), list(ENGINES))
    checkpoints = arguments.checkpoints.split(",")
    return campaign.Plan(
        checkpoints=[find_checkpoint(name, arguments.checkpoint_folder) for name in checkpoints],
        engines=[ENGINES[name] for name in engines],
        cells=[cell for cell in all_cells if cell.name in names],
        rounds=arguments.rounds or (1 if arguments.quick else ROUNDS),
        close_rounds=arguments.rounds or (1 if arguments.quick else CLOSE_ROUNDS),
        folder=arguments.folder.resolve(),
    )


def _parser() -> argparse.ArgumentParser:
    rounds = f"{ROUNDS}, {CLOSE_ROUNDS} where a ratio is close"
    parser = options.make_parser("cierzo.bench.peers", __doc__.splitlines()[0], "build/peers", rounds)
    names = ", ".join(cell.name for cell in cells(quick=True))
    parser.add_argument("--quick", action="store_true", help="one round; fewer tokens, requests and clients")
    parser.add_argument("--engines", metavar="A,B", help=f"of {', '.join(ENGINES)}; default: all")
    parser.add_argument("--cells", metavar="A,B", help=f"of {names}; default: all")
    parser.add_argument(
        "--checkpoints", default=",".join(CHECKPOINTS), metavar="A,B", help="small4, small3, or folders"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
