"""`make peers`: cierzo beside transformers, vLLM and llama.cpp, on the same checkpoints, in one run.

Engines are measured in alternation, one in memory at a time; a run that is interrupted goes on where it stopped, as
long as the code is the same. The table is printed, and goes to --output with JSON of every round and a PNG. A round
of all takes about an hour and a half on two cores.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

from cierzo.bench.campaign import options
from cierzo.bench.machine import describe_machine
from cierzo.bench.peers import llamacpp, ours, transformers, vllm
from cierzo.bench.peers.campaign import Peers
from cierzo.bench.peers.cells import BY_PRODUCTS, cells
from cierzo.bench.peers.engine import CHECKPOINTS, Peer, find_checkpoint
from cierzo.bench.peers.environments import RECIPES
from cierzo.bench.peers.results import Outcome, outcome_of, picture, text

PEERS: dict[str, Peer] = {
    "cierzo": ours,
    "transformers": transformers,
    "vllm": vllm,
    "llamacpp": llamacpp,
}
ENGINES = {engine.name: engine for peer in PEERS.values() for engine in peer.ENGINES}
ROUNDS, CLOSE_ROUNDS = 3, 5


def main(argv: Sequence[str] | None = None) -> int:
    """Make what is missing, measure, write the outcome; exit status 1 if a cell could not be measured."""
    return options.run(_parser(), argv, _stem, _wanted, Outcome, text, picture)


def _stem(arguments: argparse.Namespace) -> str:
    return "peers-quick" if arguments.quick else "peers"


def _wanted(arguments: argparse.Namespace) -> options.Wanted:
    """Raises ConfigError for what there is not."""
    rounds, close_rounds = (arguments.rounds or (1 if arguments.quick else n) for n in (ROUNDS, CLOSE_ROUNDS))
    known = {cell.name: cell for cell in cells(quick=arguments.quick)}
    names = arguments.checkpoints.split(",")
    peers = Peers(
        engines=options.among("engines", arguments.engines, ENGINES),
        cells=options.among("cells", arguments.cells, known),
        checkpoints=[find_checkpoint(name, arguments.checkpoint_folder) for name in names],
        rounds=rounds,
        folder=arguments.folder.resolve(),
        peers=PEERS,
    )
    machine = describe_machine()
    return options.Wanted(
        campaign=peers,
        identity={"device": f"{machine.processor}, {machine.cores} cores"},
        rounds=close_rounds,
        outcome=functools.partial(outcome_of, peers.checkpoints, peers.engines, [*peers.cells, *BY_PRODUCTS]),
        settings={"rounds": rounds, "close_rounds": close_rounds, "engines": peers.engines, "recipes": RECIPES},
    )


def _parser() -> argparse.ArgumentParser:
    rounds = f"{ROUNDS}, {CLOSE_ROUNDS} where a ratio is close"
    parser = options.make_parser("peers", __doc__.splitlines()[0], rounds)
    parser.add_argument("--quick", action="store_true", help="one round; fewer tokens, requests and clients")
    parser.add_argument("--engines", metavar="A,B", help=f"of {', '.join(ENGINES)}; default: all")
    parser.add_argument(
        "--checkpoints", default=",".join(CHECKPOINTS), metavar="A,B", help="small4, small3, or folders"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
