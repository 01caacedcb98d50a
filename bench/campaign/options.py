"""The command line that campaigns share."""

from __future__ import annotations

import argparse
import functools
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cierzo.bench.campaign.loop import Campaign, Run
from cierzo.bench.campaign.outcome import Outcome, saved
from cierzo.bench.campaign.store import Store, has_samples
from cierzo.bench.report import Recording
from cierzo.bench.revision import current_commit
from cierzo.engine.errors import CierzoError, ConfigError
from cierzo.engine.options import positive

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The measurement that options ask for. identity: of its samples, beside the commit. outcome: what samples come
    to. settings: for the report, which has the rounds."""

    campaign: Campaign[Any, Any]
    identity: dict[str, str]
    rounds: int
    outcome: Callable[[Store], Outcome[Any, Any, Any]]
    settings: dict[str, Any] = field(default_factory=dict)


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    stem_of: Callable[[argparse.Namespace], str],
    wanted_of: Callable[[argparse.Namespace], Wanted],
    kind: Any,
    text: Callable[[Any, str], str],
    picture: Callable[[Any, Path], None],
) -> int:
    """Measure what is missing, and tell the outcome: exit status 0 if every cell has a figure, 1 if not, 2 for a
    CierzoError. SIGTERM ends it as Ctrl-C does, so that engines are stopped on the way out.

    stem_of: name of the files that options lead to, without their suffixes. kind: type of the outcomes that `text`
    (with the command) and `picture` tell.
    """
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    words = ["python", "-m", parser.prog, *(sys.argv[1:] if argv is None else argv)]
    command, benchmark = shlex.join(words), parser.prog.rpartition(".")[2]
    commit, name = arguments.commit or current_commit(), stem_of(arguments)
    samples, stem = arguments.samples or arguments.folder / f"{name}-{commit}.jsonl", arguments.output / name
    try:
        if arguments.report and not has_samples(samples):
            print(text(saved(stem, kind), command))
            return 0
        stem.parent.mkdir(parents=True, exist_ok=True)
        report, wanted = Recording(benchmark, Path(f"{stem}.json"), words), wanted_of(arguments)
        store = Store(samples, {"commit": commit, **wanted.identity})
        if not arguments.report:
            Run(wanted.campaign, store, functools.partial(print, flush=True)).measure(wanted.rounds)
        outcome = wanted.outcome(store)
    except CierzoError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    told = text(outcome, command)
    Path(f"{stem}.txt").write_text(told + "\n", encoding="utf-8")
    report.write({"rounds": wanted.rounds, **wanted.settings}, outcome)
    print(f"\n{told}")  # behind the files: a reader of the terminal may go away
    try:
        picture(outcome, Path(f"{stem}.png"))
    except ConfigError as error:
        print(f"no picture: {error}")
    return int(any(row.error for row in outcome.rows))


def make_parser(name: str, description: str, rounds: str) -> argparse.ArgumentParser:
    """A parser with the options of every campaign. rounds: told as the default number of them."""
    parser = argparse.ArgumentParser(prog=f"cierzo.bench.{name}", description=description, allow_abbrev=False)
    parser.add_argument("--rounds", type=positive, metavar="N", help=f"default: {rounds}")
    parser.add_argument("--cells", metavar="A,B", help="default: all")
    parser.add_argument("--report", action="store_true", help="measure nothing, report what was measured")
    for option, default, told in (
        ("--folder", f"build/{name}", "samples, logs, and what is made from checkpoints"),
        ("--checkpoint-folder", "build/checkpoints", "where small4 is"),
        ("--output", "bench/results", "where JSON, table and PNG go"),
    ):
        parser.add_argument(option, type=Path, default=default, metavar="DIR", help=f"{told}; default: {default}")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="default: a file in --folder")
    parser.add_argument(
        "--commit", metavar="NAME", help="go on with the samples of this one, though HEAD has changed since"
    )
    return parser


def among(name: str, given: str | None, known: Mapping[str, T]) -> list[T]:
    """Choose what an option names, separated by commas; without it all. Raises ConfigError for what is unknown."""
    wanted = list(known) if given is None else given.split(",")
    if unknown := [one for one in wanted if one not in known]:
        message = f"unknown {name}: {', '.join(unknown)}; known: {', '.join(known)}"
        raise ConfigError(message, field=name, limit=", ".join(known), value=unknown)
    return [value for one, value in known.items() if one in wanted]
