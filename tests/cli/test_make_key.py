"""`cierzo make-key`: the key on stdout alone, its digest in the file, and no digest of a key that nobody has."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cierzo.cli import main
from cierzo.engine.commands import make_key as make_key_command
from cierzo.engine.frontend.keys import digest_of, read_key_file

BEFORE = '# ours\n{"tenant": "search", "weight": 2}'  # without an end of the line


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    path.write_text(BEFORE, encoding="utf-8")
    return path


def make_key(*words: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cierzo", "make-key", *words]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, check=False)


def test_its_digest_is_added_with_its_rights(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-key", "search", "--keys", str(keys), "--right", "stats", "--right", "stats"]) == 0
    out, err = capsys.readouterr()
    access = read_key_file(str(keys)).keys[digest_of(out.removesuffix("\n"))]
    assert (access.tenant.name, access.tenant.weight, access.rights) == ("search", 2.0, {"stats"})
    assert keys.read_text(encoding="utf-8").startswith(BEFORE + "\n")
    assert keys.read_text(encoding="utf-8").splitlines()[-1] in err
    assert "is new there" not in err


def test_a_tenant_that_is_new_is_told(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-key", "serach", "--keys", str(keys)]) == 0
    err = capsys.readouterr().err
    assert "the tenant serach is new there" in err
    assert '{"tenant": "serach"}' in err
    assert sorted(read_key_file(str(keys)).tenants) == ["search", "serach"]


def test_without_a_file_both_lines_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-key", "search"]) == 0
    out, err = capsys.readouterr()
    told = tmp_path / "told"
    told.touch(mode=0o600)
    told.write_text("\n".join(err.splitlines()[1:]), encoding="utf-8")
    assert [*read_key_file(str(told)).keys] == [digest_of(out.removesuffix("\n"))]


def test_a_file_is_made_for_its_owner_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-key", "search", "--keys", str(tmp_path / "new")]) == 0
    assert [*read_key_file(str(tmp_path / "new")).keys] == [digest_of(capsys.readouterr().out.strip())]


@pytest.mark.parametrize("name", ["bad name", "", "-x", "a/b", "é", "x" * 65, "a\n"])
def test_a_name_that_is_none_is_refused_by_the_rule(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-key", "--", name]) == 2
    assert "must be text like [A-Za-z0-9][A-Za-z0-9._-]{0,63}, got" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["missing folder", "folder", "pipe", "wrong", "open to others"])
def test_a_file_that_cannot_be_had_is_given_wrongly(
    keys: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = "nonsense\n" if kind == "wrong" else BEFORE
    path = keys
    if kind == "missing folder":
        path = keys.parent / "none" / "keys"
    elif kind == "folder":
        path = keys.parent
    elif kind == "pipe":
        path = keys.parent / "pipe"
        os.mkfifo(path, 0o600)
    elif kind == "wrong":
        keys.write_text(before, encoding="utf-8")
    else:
        keys.chmod(0o644)
    assert main(["make-key", "search", "--keys", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert keys.read_text(encoding="utf-8") == before


def test_a_key_that_nobody_could_read_opens_nothing(keys: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = make_key("mail", "--keys", str(keys), stdout=full.fileno())
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert keys.read_text(encoding="utf-8") == BEFORE


def test_what_another_adds_while_it_waits_is_seen_and_kept(
    keys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = f'{BEFORE}\n{{"tenant": "mail"}}\n'

    def waits(_: object, how: int) -> None:
        assert how == fcntl.LOCK_EX
        keys.write_text(theirs, encoding="utf-8")

    monkeypatch.setattr(make_key_command.fcntl, "flock", waits)
    assert main(["make-key", "mail", "--keys", str(keys)]) == 0
    assert "is new there" not in capsys.readouterr().err
    added = keys.read_text(encoding="utf-8").removeprefix(theirs)
    assert [line[:7] for line in added.splitlines()] == ['{"key":']


def test_several_at_once_keep_each_other_s_lines(keys: Path) -> None:
    with ThreadPoolExecutor(4) as threads, open("/dev/full", "wb") as full:
        lost = [threads.submit(make_key, "mail", "--keys", str(keys), stdout=full.fileno()) for _ in range(4)]
        made = [threads.submit(make_key, f"t{each % 2}", "--keys", str(keys)) for each in range(4)]
        assert [each.result().returncode for each in (*lost, *made)] == [1] * 4 + [0] * 4
    file = read_key_file(str(keys))
    assert sorted(file.tenants) == ["search", "t0", "t1"]
    assert {*file.keys} == {digest_of(each.result().stdout.strip()) for each in made}
