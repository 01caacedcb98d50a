"""The command line that campaigns share."""

from __future__ import annotations

import argparse
import functools
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cierzo.bench.campaign.loop import Campaign, Run
from cierzo.bench.campaign.outcome import Outcome, saved, tell
from cierzo.bench.campaign.store import Store
from cierzo.bench.report import now
from cierzo.bench.revision import current_commit
from cierzo.engine.errors import CierzoError, ConfigError
from cierzo.engine.options import positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The measurement that options ask for. identity: of its samples, beside the commit. outcome: what samples come
    to. settings: for the report."""

    campaign: Campaign[Any, Any]
    identity: dict[str, str]
    rounds: int
    outcome: Callable[[Store], Outcome[Any, Any, Any]]
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A campaign as a command. stem: name of the files that options lead to, without their suffixes. kind: the type
    of its outcomes, as `text` and `picture` tell them; both raise ConfigError."""

    parser: argparse.ArgumentParser
    stem: Callable[[argparse.Namespace], str]
    wanted: Callable[[argparse.Namespace], Wanted]
    kind: Any
    text: Callable[[Any, str], str]
    picture: Callable[[Any, Path], None]

    def main(self, argv: Sequence[str] | None) -> int:
        """Measure what is missing, and tell the outcome: exit status 0 if every cell has a figure, 1 if not, 2 for
        a CierzoError. SIGTERM ends it as Ctrl-C does, so that engines are stopped on the way out."""
        arguments = self.parser.parse_args(argv)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        command = shlex.join(["python", "-m", self.parser.prog, *(sys.argv[1:] if argv is None else argv)])
        try:
            return int(not self._run(arguments, command))
        except CierzoError as error:
            print(f"{self.parser.prog}: {error}", file=sys.stderr)
            return 2

    def _run(self, arguments: argparse.Namespace, command: str) -> bool:
        started, commit, name = now(), arguments.commit or current_commit(), self.stem(arguments)
        samples, stem = arguments.samples or arguments.folder / f"{name}-{commit}.jsonl", arguments.output / name
        if arguments.report and not samples.exists() and (found := saved(stem, self.kind)) is not None:
            print(self.text(found, command))
            return True
        wanted = self.wanted(arguments)
        store = Store(samples, {"commit": commit, **wanted.identity})
        if not arguments.report:
            Run(wanted.campaign, store, functools.partial(print, flush=True)).measure(wanted.rounds)
        outcome = wanted.outcome(store)
        about = {"command": command, "started": started, "settings": wanted.settings}
        picture = functools.partial(self.picture, outcome)
        tell(self.parser.prog.rpartition(".")[2], outcome, self.text(outcome, command), stem, picture, **about)
        return not any(row.error for row in outcome.rows)


def make_parser(prog: str, description: str, folder: str, rounds: str) -> argparse.ArgumentParser:
    """A parser with the options of every campaign. folder: its default for samples and logs; rounds: told as the
    default number of them."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--rounds", type=positive, metavar="N", help=f"default: {rounds}")
    parser.add_argument("--cells", metavar="A,B", help="default: all")
    parser.add_argument("--report", action="store_true", help="measure nothing, report what was measured")
    for option, default, text in (
        ("--folder", folder, "samples, logs, and what is made from checkpoints"),
        ("--checkpoint-folder", "build/checkpoints", "where small4 is"),
        ("--output", "bench/results", "where JSON, table and PNG go"),
    ):
        parser.add_argument(
            option, type=Path, default=Path(default), metavar="DIR", help=f"{text}; default: {default}"
        )
    parser.add_argument("--samples", type=Path, metavar="FILE", help="default: a file in --folder")
    parser.add_argument(
        "--commit", metavar="NAME", help="go on with the samples of this one, though HEAD has changed since"
    )
    return parser


def among(name: str, given: str | None, known: Sequence[str]) -> list[str]:
    """The names that an option lists, separated by commas; without it all. Raises ConfigError for unknown ones."""
    wanted = list(known) if given is None else given.split(",")
    if unknown := [one for one in wanted if one not in known]:
        told = ", ".join(dict.fromkeys(known))
        message = f"unknown {name}: {', '.join(unknown)}; known: {told}"
        raise ConfigError(message, field=name, limit=told, value=unknown)
    return wanted
