"""The command line that campaigns share."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cierzo.engine.errors import CierzoError, ConfigError
from cierzo.engine.options import positive


def make_parser(prog: str, description: str, folder: str, rounds: str) -> argparse.ArgumentParser:
    """A parser with the options of every campaign. folder: its default for samples and logs; rounds: told as the
    default number of them."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--rounds", type=positive, metavar="N", help=f"default: {rounds}")
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


def run(
    parser: argparse.ArgumentParser, body: Callable[[argparse.Namespace, str], bool], argv: Sequence[str] | None
) -> int:
    """Parse, and run `body` with the options and the command: exit status 0 if it has every figure, 1 if not, 2 for
    a CierzoError. SIGTERM ends it as Ctrl-C does, so that engines are stopped on the way out."""
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    command = shlex.join(["python", "-m", parser.prog, *(sys.argv[1:] if argv is None else argv)])
    try:
        return 0 if body(arguments, command) else 1
    except CierzoError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
