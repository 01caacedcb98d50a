"""The files of `cierzo batch`, and runs that go on where others were ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from io import FileIO

import pytest
from batch_run import Run, a_line, echo, text_of
from http_house import HttpHouse, until

from cierzo.cli import main
from cierzo.engine.commands import batch
from cierzo.engine.gateway.batch_files import Files


@pytest.fixture
def files(tmp_path):
    return Run(tmp_path)


# --- runs that are ended -----------------------------------------------------------------------------------


def test_a_run_goes_on_wherever_an_earlier_one_was_cut(files):
    names = {*map(str, range(4))}
    files.write(*map(a_line, names))
    with HttpHouse(echo) as server:
        assert files(server) == 0
    whole = files.answers.read_bytes()
    for size in (0, 1, 20, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) // 2, len(whole) - 1):
        files.answers.write_bytes(whole[:size])
        stands = whole[: whole[:size].rfind(b"\n") + 1]
        with HttpHouse(echo) as server:
            assert files(server) == 0
            assert len(server.requests) == 4 - stands.count(b"\n")
        assert {name: text_of(body) for name, body in files.good.items()} == {name: name for name in names}
        assert files.answers.read_bytes().startswith(stands)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_by_a_signal_goes_on(files, number):
    names = {"a", "one", "two", "three", "four", "five"}
    files.write(*map(a_line, sorted(names)))
    with HttpHouse(echo, token_s=0.1) as server:
        process = files.start(server, "--concurrency", "4")
        until(lambda: files.answers.exists() and files.told and len(server.requests) >= 5)
        process.send_signal(number)
        told = process.communicate(timeout=20)
        assert process.returncode == (130 if number == signal.SIGINT else -number), told
        assert number == signal.SIGKILL or told == ("", "cierzo: interrupted\n")
        num_begun, num_left = len(server.requests), 6 - len(files.good)
        if number == signal.SIGINT:
            until(lambda: not server.core.running)
        assert files(server) == 0
        # those that ran when it was killed are joined, those that it has cancelled itself run anew
        num_runs = len(server.core.submits)
        assert num_runs == (6 if number == signal.SIGKILL else num_begun + num_left)
    assert {name: text_of(body) for name, body in files.good.items()} == {name: name for name in names}


def test_another_file_of_answers_is_other_requests(files):
    files.write(a_line("one"))
    with HttpHouse(echo) as server:
        for _ in range(2):
            assert files(server) == 0
            files.answers.unlink()
        assert len(server.core.submits) == 2


def test_a_full_disk_leaves_whole_lines(files, monkeypatch, capsys):
    files.write(*(a_line(str(number)) for number in range(4)))

    class Disk(FileIO):
        left = 900

        def write(self, data):
            if not self.left:
                raise OSError(28, "No space left on device")
            taken = super().write(data[: self.left])
            Disk.left -= taken
            return taken

    def opened(path, mode, **options):
        return Disk(path, "a+") if "a" in mode else open(path, mode, **options)

    with HttpHouse(echo) as server:
        monkeypatch.setattr(batch, "open", opened, raising=False)
        assert files(server) == 1
        assert "No space left" in capsys.readouterr().err
        monkeypatch.undo()
        assert files.answers.read_bytes().endswith(b"\n")
        assert 0 < len(files.told) < 4
        assert files(server) == 0
    assert len(files.good) == 4


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"some text", b"1\n", b'{"custom_id": "a"}\n', b'{"id":"batch_rep', b"\xff\n"])
def test_a_file_that_is_not_of_answers_is_left_alone(files, content, capsys):
    files.write(a_line("one"))
    files.answers.write_bytes(content)
    with HttpHouse(echo) as server:
        assert files(server) == 2
    assert "OUT must be a file of answers (line 1 is none" in capsys.readouterr().err
    assert files.answers.read_bytes() == content


def test_files_that_cannot_be_those_of_a_batch(files, tmp_path, capsys):
    files.write(a_line("one"))
    os.mkfifo(tmp_path / "fifo")
    wrong = [
        (files.requests, files.requests, 2, "OUT must be another file than IN"),
        (tmp_path / "none", files.answers, 1, "none: No such file"),
        (tmp_path, files.answers, 1, "Is a directory"),
        (files.requests, tmp_path / "fifo", 2, "OUT must be a regular file"),
    ]
    for requests, answers, status, told in wrong:
        assert main(["batch", str(requests), str(answers)]) == status
        assert told in capsys.readouterr().err
    assert not files.answers.exists()
    with (
        open(files.requests, "rb") as requests,
        open(files.answers, "ab+", buffering=0) as answers,
        Files(requests, answers, 1000),
    ):
        assert main(["batch", str(files.requests), str(files.answers)]) == 2
    assert "OUT must be a file that no other run writes" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_files(tmp_path):
    """Nor does the order of lines matter: half of them are answered, the last of them first. Then come
    many more names."""
    count = 10_000
    with open(tmp_path / "in", "wb") as file:
        for number in range(count):
            file.write(json.dumps(a_line(f"{number:032}")).encode() + b"\n")
    with open(tmp_path / "out", "wb") as file:
        for number in range(count - 1, count // 2 - 1, -1):
            told = {"id": "x", "custom_id": f"{number:032}", "response": {"status_code": 200}, "error": None}
            file.write(json.dumps(told).encode() + b"\n")
    script = (
        "import re\nfrom cierzo.engine.gateway.batch_files import Files\n"
        "most = lambda: int(re.search('VmHWM: *\\t *([0-9]+) kB', open('/proc/self/status').read())[1])\n"
        "before = most()\n"
        "with open('in', 'rb') as a, open('out', 'ab+', buffering=0) as b, Files(a, b, 9999) as files:\n"
        "    found = sum(work is not None for work in files.lines())\n"
        "    for number in range(300_000):\n"
        "        files._index.add(str(number), 1)\n"
        "    print(files.num_lines(), files.num_standing, found, most() - before)\n"
    )
    told = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    *counts, grown_kib = map(int, told.stdout.split())
    assert counts == [count, count // 2, count // 2]
    assert grown_kib < 6 * 1024  # the names alone have more
