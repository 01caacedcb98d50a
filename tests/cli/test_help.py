"""Every command explains itself and refuses what it does not know."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import pytest

from cierzo.bench import rpc
from cierzo.cli import Parser, build_parser
from cierzo.engine.frontend.config import FrontendConfig


def _commands(parser: Parser, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, child in _children(parser).items():
        yield from _commands(child, (*path, name))


def _children(parser: Parser) -> dict[str, Parser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


def _find(path: tuple[str, ...]) -> Parser:
    """The parser of a subcommand, with all its arguments."""
    parser = build_parser()
    for name in path:
        parser = _children(parser)[name]
    parser.complete()
    return parser


def _words(action: argparse.Action) -> list[str]:
    """A use of the option or argument; a subcommand has none."""
    if isinstance(action, argparse._SubParsersAction):
        return []
    return [*action.option_strings[:1], str(next(iter(action.choices))) if action.choices else "1"]


COMMANDS = [pytest.param(path, id=" ".join(("cierzo", *path))) for path in _commands(build_parser())]


def test_the_commands_are_those_promised() -> None:
    promised = {"serve", "generate", "chat", "demo", "make-checkpoint", "info", "plan", "bench"}
    assert promised <= set(_children(build_parser()))
    assert "load" in _children(_find(("bench",)))


@pytest.mark.parametrize("path", COMMANDS)
def test_help_says_what_every_option_is(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([*path, "--help"])
    assert ended.value.code == 0
    assert "usage: cierzo" in capsys.readouterr().out
    bare = [
        action.option_strings or action.dest
        for action in _find(path)._actions
        if not isinstance(action, argparse._SubParsersAction) and not (action.help or "").strip()
    ]
    assert not bare, f"without a help text: {bare}"


def test_settings_of_a_server_stand_in_their_groups_once_each() -> None:
    groups = {group.title: group._group_actions for group in _find(("serve",))._action_groups}
    names = {title: [action.dest for action in actions] for title, actions in groups.items()}
    assert names["who may come"] == ["keys", "tls_certificate", "tls_key", "tls_client_ca", "insecure"]
    assert names["what is told"] == ["usage_file", "max_usage_bytes", "metrics", "log_format"]
    told = [*names["who may come"], *names["what is told"], *names["limits of the front end"]]
    assert sorted(told) == sorted({*FrontendConfig.__struct_fields__} - {"address"})
    metavars = {action.dest: action.metavar for actions in groups.values() for action in actions}
    assert (metavars["keys"], metavars["usage_file"], metavars["flight_folder"]) == ("FILE", "FILE", "FOLDER")


def test_no_default_is_shown_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--help"])
    out = capsys.readouterr().out
    assert "(default: )" not in out
    assert "(default: 127.0.0.1:7071)" in out


@pytest.mark.parametrize("path", COMMANDS)
def test_unknown_options_are_refused(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    groups = _find(path)._mutually_exclusive_groups
    needed = [action for action in _find(path)._actions if action.required]
    needed += [group._group_actions[0] for group in groups if group.required]
    words = [word for action in needed for word in _words(action)]
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([*path, *words, "--no-such-option", "1"])
    assert ended.value.code == 2
    if not _children(_find(path)):
        assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "status"), [("--help", 0), ("extra", 2)])
def test_the_benchmark_of_the_rpc_does_not_run_for_help(
    word: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rpc, "LIMITS", ())  # else it would take a minute
    monkeypatch.setattr(sys, "argv", ["rpc", word])
    with pytest.raises(SystemExit) as ended:
        rpc.main()
    assert ended.value.code == status
    assert "usage: cierzo.bench.rpc" in "".join(capsys.readouterr())
