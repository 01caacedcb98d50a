"""The `cierzo` command: a table of subcommands, and what its exit status says.

A subcommand's module is imported when the subcommand is called, be it for its --help: `cierzo --help` imports
nothing of the package but this file. Each module offers `add_arguments(parser)` and `run(arguments)`, which gives
the exit status. A failure is told in one line on stderr, and by the exit status (EPILOG).
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from cierzo import __version__

# Words of the command line, the module below `cierzo` (none: a group of subcommands), help.
COMMANDS = (
    ("serve", "engine.commands.serve", "serve a checkpoint over the RPC, and over HTTP"),
    ("gateway", "engine.commands.gateway", "serve HTTP before servers that speak the RPC"),
    ("generate", "engine.commands.generate", "generate in this process, without a server"),
    ("batch", "engine.commands.batch", "have a running server answer a file of requests"),
    ("chat", "engine.commands.chat", "talk to a running server"),
    ("demo", "engine.commands.demo", "serve the demo model and ask it one question"),
    ("make-key", "engine.commands.make_key", "make a key that opens a server to a tenant"),
    ("make-checkpoint", "engine.commands.make_checkpoint", "write a random checkpoint"),
    ("replay", "engine.commands.replay", "run again what a core that died had recorded"),
    ("usage", "engine.commands.usage", "sum the cost records of a server, by tenant"),
    ("info", "engine.commands.info", "describe a checkpoint"),
    ("plan", "bench.plan.command", "plan a workload on devices that need not be here"),
    ("bench", "", "measure"),
    ("bench load", "bench.load", "load a running server: closed or open loop"),
    ("bench experts", "bench.experts", "count which experts real traffic chooses"),
    ("bench step", "bench.step", "time the step loop, or a model's step by operation"),
    ("bench fairness", "bench.fairness", "what a flood by one tenant takes from the others"),
)
EPILOG = (
    "Exit status: 0 done; 1 the run failed; 2 something was given wrongly: an argument, a setting, a request that "
    "is refused as it stands; 130 interrupted; 141 nobody reads the output any more."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run. Every error is one line on stderr; EPILOG says what the exit status means."""
    try:
        try:
            _print_anything()
            try:
                arguments = build_parser().parse_args(argv)
            except SystemExit as end:  # of --help, too
                return int(end.code or 0)
            return _run(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here a reader that is gone, or a full disk, still has a name
    except KeyboardInterrupt:
        print("cierzo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except UnicodeEncodeError as error:  # a path that is no text, where text is sent or kept
        print(f"cierzo: {error.object[:200]!r} must be text in UTF-8", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"cierzo: out of memory: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a path that cannot be read or written, a full disk
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        print(f"cierzo: {where}{error.strerror or error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    """Run the subcommand; the exit status, that of an error of the engine included."""
    from cierzo.engine.environment import check_environment
    from cierzo.engine.errors import CierzoError, ConfigError, InvalidRequest, ProtocolError

    try:
        check_environment()
        return int(arguments.run(arguments))
    except CierzoError as error:
        print(f"cierzo: {error.code}: {error}", file=sys.stderr)
        given_wrongly = isinstance(error, ConfigError | InvalidRequest) and not isinstance(error, ProtocolError)
        return 2 if given_wrongly else 1


def _print_anything() -> None:
    """Write a character that the terminal's encoding lacks as an escape, so that it ends no command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Forget printed text that cannot be written: the interpreter would fail on it at its end."""
    with suppress(ValueError, AttributeError):  # there is no stdout, or no file behind it
        try:
            sys.stdout.flush()
        except OSError:
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """A parser that imports `module` for its arguments when it is first used."""

    module = ""

    def complete(self) -> None:
        """Add the module's arguments, unless that has been done."""
        if self.module:
            command = importlib.import_module(f"cierzo.{self.module}")
            self.module = ""
            command.add_arguments(self)
            self.set_defaults(run=command.run)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, as `parse_args` and the parser of a group of subcommands ask for it."""
        self.complete()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line that says what is wrong; the usage may be fifty lines."""
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """A formatter that shows a default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default in (None, "") or isinstance(action.default, bool)
        return action.help if hidden else super()._get_help_string(action)


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(prog="cierzo", description="A serving engine for Mistral Small 4.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"cierzo {__version__}")
    groups = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    for words, module, text in COMMANDS:
        group, _, name = words.rpartition(" ")
        description = text[0].upper() + text[1:] + "."
        command = groups[group].add_parser(
            name, help=text, description=description, formatter_class=_Help, allow_abbrev=False
        )
        command.module = module
        if not module:
            groups[words] = command.add_subparsers(required=True, metavar=name.upper())
    return parser
