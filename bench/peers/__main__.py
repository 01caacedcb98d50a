"""`make peers`: cierzo beside transformers, vLLM and llama.cpp, on the same checkpoints, in one run.

Engines are measured in alternation, one in memory at a time; a run that is interrupted goes on where it stopped, as
long as the code is the same. The table is printed, and goes to --output with JSON of every round and a PNG. A round
of all takes about an hour and a half on two cores.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cierzo.bench.peers.cells import cells
from cierzo.bench.peers.engine import CHECKPOINTS, Peer, find_checkpoint
from cierzo.bench.peers.llamacpp import LlamaCpp
from cierzo.bench.peers.ours import Cierzo
from cierzo.bench.peers.outcome import write_outcome
from cierzo.bench.peers.run import Plan, Run
from cierzo.bench.peers.samples import Samples
from cierzo.bench.peers.transformers import Transformers
from cierzo.bench.peers.vllm import Vllm
from cierzo.bench.report import current_commit
from cierzo.engine.errors import CierzoError
from cierzo.engine.options import positive

PEERS: dict[str, Peer] = {
    "cierzo": Cierzo(),
    "transformers": Transformers(),
    "vllm": Vllm(),
    "llamacpp": LlamaCpp(),
}
ENGINES = {engine.name: engine for peer in PEERS.values() for engine in peer.engines}
USUAL = [name for name, engine in ENGINES.items() if engine.usual]
ROUNDS, CLOSE_ROUNDS = 3, 5


def main(argv: Sequence[str] | None = None) -> int:
    """Make what is missing, measure, write the outcome; exit status 1 if a cell could not be measured."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines are stopped on the way out
    try:
        return _run(arguments, sys.argv[1:] if argv is None else argv)
    except CierzoError as error:
        print(f"cierzo.bench.peers: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    folder = arguments.folder.resolve()
    all_cells = cells(quick=arguments.quick)
    plan = Plan(
        checkpoints=[find_checkpoint(name, arguments.checkpoint_folder) for name in arguments.checkpoints],
        engines=[ENGINES[name] for name in arguments.engines],
        cells=[cell for cell in all_cells if cell.name in (arguments.cells or [c.name for c in all_cells])],
        rounds=arguments.rounds or (1 if arguments.quick else ROUNDS),
        close_rounds=arguments.rounds or (1 if arguments.quick else CLOSE_ROUNDS),
        folder=folder,
    )
    commit = arguments.commit or current_commit()
    samples = Samples(arguments.samples or folder / "samples.jsonl", commit)
    if not arguments.report:
        Run(plan, PEERS, samples, commit).measure()
    stem = arguments.output / ("peers-quick" if arguments.quick else "peers")
    command = shlex.join(["python", "-m", "cierzo.bench.peers", *argv])
    complete = write_outcome(plan, samples, stem, command=command, started=started, commit=commit)
    return 0 if complete else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cierzo.bench.peers", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    names = [cell.name for cell in cells(quick=True)]
    parser.add_argument("--quick", action="store_true", help="one round; fewer tokens, requests and clients")
    parser.add_argument(
        "--engines", type=_among(list(ENGINES)), default=USUAL, metavar="A,B", help=f"of {', '.join(ENGINES)}"
    )
    parser.add_argument("--cells", type=_among(names), metavar="A,B", help=f"of {', '.join(names)}; default: all")
    parser.add_argument(
        "--checkpoints", type=_split, default=CHECKPOINTS, metavar="A,B", help="small4, small3, or folders"
    )
    parser.add_argument(
        "--rounds", type=positive, metavar="N", help=f"default: {ROUNDS}, {CLOSE_ROUNDS} where a ratio is close"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing, report what was measured")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/peers"), metavar="DIR", help="environments, conversions, logs"
    )
    parser.add_argument(
        "--checkpoint-folder", type=Path, default=Path("build/checkpoints"), metavar="DIR", help="where small4 is"
    )
    parser.add_argument("--samples", type=Path, metavar="FILE", help="default: samples.jsonl in --folder")
    parser.add_argument(
        "--commit", metavar="NAME", help="go on with the samples of this one, though HEAD has changed since"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("bench/results"), metavar="DIR", help="where JSON, table and PNG go"
    )
    return parser


def _split(text: str) -> list[str]:
    return text.split(",")


def _among(known: list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = _split(text)
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    raise SystemExit(main())
