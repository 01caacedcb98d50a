"""`cierzo batch` before a fake server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from io import FileIO

import pytest
from http_house import HttpHouse
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from tqdm import tqdm

from cierzo.cli import main
from cierzo.engine.commands import batch
from cierzo.engine.errors import Draining, KeyReused, NotFound, Overloaded
from cierzo.engine.gateway.batch_files import Files
from cierzo.engine.messages import Generate
from cierzo.engine.testing.fake_core import FakeCore


def _line(name, url="/v1/chat/completions", method="POST", **body):
    if not body or url == "/v1/chat/completions":
        body = {"messages": [{"role": "user", "content": f"I am {name}"}], **body}
    return {"custom_id": name, "method": method, "url": url, "body": body}


class Run:
    """The two files of a test, and the command."""

    def __init__(self, folder):
        self.requests, self.answers = folder / "in.jsonl", folder / "out.jsonl"
        self.lines = []

    def write(self, *lines):
        self.lines = lines
        told = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        self.requests.write_bytes(b"".join(each + b"\n" for each in told))

    def words(self, server, *options):
        return ["batch", str(self.requests), str(self.answers), "--rpc", server.address, *options]

    def __call__(self, server, *options):
        return main(self.words(server, *options))

    def start(self, server, *options):
        """The command as a process of its own."""
        words = [sys.executable, "-m", "cierzo", *self.words(server, *options)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @property
    def told(self):
        return [json.loads(line) for line in self.answers.read_bytes().split(b"\n")[:-1]]

    @property
    def good(self):
        """custom_id -> body of what is answered."""
        found = [each for each in self.told if each["response"] and each["response"]["status_code"] == 200]
        assert all(each["error"] is None for each in found)
        names = Counter(each["custom_id"] for each in found)
        assert not names or max(names.values()) == 1, names
        return {each["custom_id"]: each["response"]["body"] for each in found}

    @property
    def bad(self):
        """custom_id -> status and error of what is not; by line what is no request."""
        found = {}
        for each in self.told:
            if each["error"]:
                assert each["response"] is None
                found[each["error"]["line"]] = each["custom_id"], each["error"]
            elif each["response"]["status_code"] != 200:
                found[each["custom_id"]] = each["response"]["status_code"], each["response"]["body"]["error"]
        return found


@pytest.fixture
def files(tmp_path):
    return Run(tmp_path)


def _text(body):
    return body["choices"][0]["message"]["content"]


def _until(is_there, seconds=20.0):
    end = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < end
        time.sleep(0.005)


def _echo(message: Generate):
    return message.messages[-1].content.removeprefix("I am ") if message.messages else "text"


# --- answers -----------------------------------------------------------------------------------------------


def test_each_endpoint_is_answered_as_over_http(files, capsys):
    files.write(
        _line("chat", n=2, user="me", logprobs=True),
        _line("long", messages=[{"role": "user", "content": "x" * 2000}, {"role": "user", "content": "long"}] * 20),
        b"  ",
        _line("text", "/v1/completions", prompt=["a", "b"], max_tokens=3, echo=True),
        _line("response", "/v1/responses", input="Hi"),
    )
    with HttpHouse(_echo, max_model_len=60_000) as server:
        assert files(server) == 0
        url = {line["custom_id"]: line["url"] for line in files.lines if isinstance(line, dict)}
        for name, body in files.good.items():
            (line,) = [each for each in files.lines if isinstance(each, dict) and each["custom_id"] == name]
            over_http = server.post(url[name], line["body"]).json()
            assert _without_names(body) == _without_names(over_http)
    assert {*files.good} == {"chat", "long", "text", "response"}
    assert [choice.message.content for choice in ChatCompletion.model_validate(files.good["chat"]).choices] == [
        *("chat", "chat")
    ]
    assert Completion.model_validate(files.good["text"]).choices[0].text == "atex"
    assert Response.model_validate(files.good["response"]).output_text == "Hi"
    passed = {each["custom_id"]: each["response"].get("passed_over") for each in files.told}
    assert passed == {"chat": ["user"], "long": None, "text": None, "response": None}
    assert capsys.readouterr().out == f"4 answers, 0 of all are errors: {files.answers}\n"
    ids = [each["id"] for each in files.told] + [each["response"]["request_id"] for each in files.told]
    assert len({*ids}) == 8


def _without_names(body):
    """An answer without what two of one request differ in."""
    if isinstance(body, dict):
        left = {"id", "created", "created_at", "cached_tokens"}
        return {name: _without_names(value) for name, value in body.items() if name not in left}
    return [*map(_without_names, body)] if isinstance(body, list) else body


def test_lines_that_are_no_requests_are_named_and_end_nothing(files, capsys, monkeypatch):
    files.write(
        _line("one"),
        b"{nonsense",
        b"\xff\xfe",
        b'{"custom_id": "\\ud800", "method": "POST", "url": "/v1/responses", "body": {}}',
        _line("one", temperature=0.5),
        _line("got", method="GET"),
        _line("where", "/v1/nowhere"),
        _line("") | {"custom_id": ""},
        _line("more") | {"more": 1},
        {"custom_id": "less", "method": "POST", "url": "/v1/responses"},
        b'{"custom_id": "large", "method": "POST", "url": "/v1/responses", "body": {"input": "%b"}}'
        % (b"x" * 70_000),
        _line("stream", stream=True),
        _line("strange", strange=1),
        _line("other", model="other"),
        b'{"custom_id": "twice", "method": "POST", "url": "/v1/responses", "body": {"input": "a", "input": "b"}}',
        _line("last"),
    )
    bars = []

    class Bar(tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(batch, "tqdm", lambda **options: Bar(**options | {"disable": False}))
    with HttpHouse(_echo) as server:
        assert files(server, "--max-body-bytes", "1024") == 1
        assert len(server.requests) == 2
        told = files.told
        assert files(server, "--max-body-bytes", "1024") == 1
        assert (len(server.requests), files.told) == (2, told)
    assert {*bars} == {(16, 16)}
    assert {name: _text(body) for name, body in files.good.items()} == {"one": "one", "last": "last"}
    bad = files.bad
    assert {place: bad[place][0] for place in bad if isinstance(place, int)} == {
        2: None,
        3: None,
        4: None,
        5: "one",
        6: "got",
        7: "where",
        8: "",
        9: "more",
        10: "less",
        11: None,
    }
    said = {
        2: "JSON",
        5: "line 1",
        6: "'GET'",
        7: "/v1/responses",
        8: "custom_id",
        9: "`more`",
        10: "`body`",
        11: "bytes",
    }
    for place, text in said.items():
        message = bad[place][1]["message"]
        assert message.startswith(f"line {place}: ")
        assert text in message
    assert {place: bad[place][0] for place in bad if isinstance(place, str)} == {
        "stream": 400,
        "strange": 400,
        "other": 404,
        "twice": 400,
    }
    assert (bad["stream"][1]["param"], bad["strange"][1]["param"]) == ("stream", "strange")
    assert capsys.readouterr().out.endswith(
        f"16 answers, 16 of them before, 14 of all are errors: {files.answers}\n"
    )


def test_a_line_that_was_mended_is_asked(files):
    files.write(_line("one", method="GET"), _line("two"))
    with HttpHouse(_echo) as server:
        assert files(server) == 1
        files.write(_line("one"), _line("two"))
        assert files(server) == 1  # the error stands
        assert {*files.good} == {"one", "two"}
        assert len(server.requests) == 2


def test_a_limited_number_of_lines_is_asked_at_a_time(files):
    files.write(*(_line(str(number)) for number in range(40)))
    open_at_a_time = []

    def answer(message):
        open_at_a_time.append(len(server.requests) - files.answers.read_bytes().count(b"\n"))
        return "yes"

    with HttpHouse(answer) as server:
        assert files(server, "--concurrency", "3") == 0
        assert len(files.good) == 40
    assert 2 <= max(open_at_a_time) <= 4  # the front end may hear of a line before the file has the one before


# --- servers that are busy, or gone ------------------------------------------------------------------------


def test_what_is_refused_for_now_is_asked_for_as_long_as_it_takes(files):
    files.write(*(_line(str(number)) for number in range(30)))
    with HttpHouse(_echo) as server:
        server.refuse(Overloaded, times=5, when=lambda message: message.messages[-1].content == "I am 7")
        server.refuse(Overloaded, times=25, retry_after_s=0.01)
        server.refuse(Draining, times=5)
        assert files(server) == 0
    assert {*files.good} == {*map(str, range(30))}


def test_a_server_without_room_for_keys_is_asked_without(files):
    files.write(*(_line(str(number)) for number in range(20)))
    with HttpHouse(_echo, max_idempotency_keys=3) as server:
        assert files(server, "--concurrency", "2") == 0
        keys = [request.idempotency_key for request in server.requests]
        assert len(files.good) == 20
        assert keys.count(None) == 17


def test_a_server_that_still_loads_is_waited_for(files):
    files.write(_line("one"), _line("two"))
    with HttpHouse(_echo, health="loading") as server:
        thread = threading.Timer(0.3, setattr, (server, "health", "ready"))
        thread.start()
        assert files(server) == 0
        thread.join()
    assert len(files.good) == 2


def test_a_key_that_stands_for_something_else_is_not_used_again(files):
    files.write(_line("one"))
    with HttpHouse(_echo) as server:
        server.refuse(KeyReused("another request", field="idempotency_key"))
        server.refuse(NotFound("its answer is kept no longer", field="idempotency_key"))
        assert files(server) == 0
        assert [request.idempotency_key[-4:] for request in server.requests] == ["-0-0", "-1-0", "-2-0"]


def test_a_deadline_of_a_line_is_kept(files):
    files.write(_line("long " * 9, deadline_s=0.1), _line("short", deadline_s=20))
    with HttpHouse(_echo, token_s=0.03) as server:
        assert files(server) == 1
        assert len(server.requests) == 2
    assert {name: error[0] for name, error in files.bad.items()} == {"long " * 9: 504}


def test_a_key_that_is_taken_back_ends_the_run(files, tmp_path, capsys):
    files.write(*(_line(str(number)) for number in range(20)))
    keys, key = tmp_path / "keys", tmp_path / "key"
    assert main(["make-key", "mine", "--keys", str(keys)]) == 0
    key.write_text(capsys.readouterr().out)
    assert main(["make-key", "other", "--keys", str(tmp_path / "others")]) == 0

    def answer(message):
        if len(server.requests) == 5:
            (tmp_path / "others").replace(keys)
            server._running.server.reload()
        return _echo(message)

    with HttpHouse(answer, keys=str(keys)) as server:
        assert files(server, "--key-file", str(key), "--concurrency", "2") == 1
    assert "cierzo: unauthorized: " in capsys.readouterr().err
    assert 3 <= len(files.good) <= 5
    assert not files.bad


@pytest.mark.parametrize("after_deltas", [0, 2])
def test_a_lost_connection_costs_no_second_run(files, after_deltas):
    files.write(*(_line(f"number {number}") for number in range(6)))
    with HttpHouse(_echo) as server:
        server.reset(after_deltas=after_deltas, times=4)
        assert files(server, "--concurrency", "2") == 0
        assert len(server.core.submits) == 6
    assert {name: _text(body) for name, body in files.good.items()} == {
        f"number {n}": f"number {n}" for n in range(6)
    }


def test_answers_that_a_server_has_lost_or_left_are_asked_for_again(files):
    files.write(*(_line(f"number {number}") for number in range(4)))
    with HttpHouse(_echo, token_s=0.02, drain_s=0.05) as server:

        def disturb():
            _until(lambda: len(server.requests) == 4)
            server.restart(down_s=0.3)
            _until(lambda: len(server.requests) == 8)
            server.health = "draining"
            _until(lambda: not server.core.running)
            server.health = "ready"

        thread = threading.Thread(target=disturb)
        thread.start()
        assert files(server) == 0
        thread.join()
        keys = Counter(request.idempotency_key for request in server.requests)
    assert len(files.good) == 4
    assert sorted(key[-4:] for key in keys) == ["-0-0"] * 4 + ["-1-0"] * 4


def test_an_answer_that_fails_again_and_again_is_an_error(files, monkeypatch):
    next_token, num_failed = FakeCore._next, Counter()

    def fail(core, key):
        prompt = bytes(token for token in core.running[key].submit.prompt_token_ids if token < 256)
        name = "twice" if b"twice" in prompt else "always" if b"always" in prompt else ""
        if not name or (name == "twice" and num_failed[name] == 2):
            return next_token(core, key)
        num_failed[name] += 1
        return core.end(key, "failed")

    monkeypatch.setattr(FakeCore, "_next", fail)
    files.write(*map(_line, ("twice", "always", "never")))
    with HttpHouse(_echo) as server:
        assert files(server) == 1
    assert {*files.good} == {"twice", "never"}
    assert files.bad["always"][0] == 500
    assert "a step of the model failed" in files.bad["always"][1]["message"]
    assert num_failed == {"twice": 2, "always": 3}


def test_a_server_that_has_failed_or_gone_ends_the_run_and_another_goes_on(files, capsys):
    files.write(*(_line(str(number)) for number in range(9)))
    with HttpHouse(_echo) as server:
        server.health = "failed"
        assert files(server) == 1
        assert "cierzo: core_failed: " in capsys.readouterr().err
        assert not files.told

        def answer(message):
            if len(server.requests) == 5:
                threading.Thread(target=server.leave).start()
            return _echo(message)

    with HttpHouse(answer) as server:
        assert files(server, "--away-s", "0.2", "--concurrency", "1") == 1
        assert "cierzo: connection_lost: " in capsys.readouterr().err
        assert 3 <= len(files.good) < 9
    with HttpHouse(_echo) as server:
        before = len(files.good)
        assert files(server) == 0
        assert len(server.requests) == 9 - before
    assert {*files.good} == {*map(str, range(9))}


def test_no_server_and_a_key_that_it_does_not_know(files, tmp_path, capsys):
    files.write(_line("one"))
    with HttpHouse(_echo) as server:
        words = files.words(server)
    assert main(words) == 1
    assert "cierzo: connection_lost: " in capsys.readouterr().err
    assert main(["make-key", "mine", "--keys", str(tmp_path / "keys")]) == 0
    key = tmp_path / "key"
    key.write_text(capsys.readouterr().out)
    with HttpHouse(_echo, keys=str(tmp_path / "keys")) as server:
        assert files(server) == 1
        assert "cierzo: unauthorized: " in capsys.readouterr().err
        assert files.answers.read_bytes() == b""
        assert files(server, "--key-file", str(key)) == 0


# --- runs that are ended -----------------------------------------------------------------------------------


def test_a_run_goes_on_wherever_an_earlier_one_was_cut(files):
    names = {*map(str, range(4))}
    files.write(*map(_line, names))
    with HttpHouse(_echo) as server:
        assert files(server) == 0
    whole = files.answers.read_bytes()
    for size in (0, 1, 20, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) // 2, len(whole) - 1):
        files.answers.write_bytes(whole[:size])
        stands = whole[: whole[:size].rfind(b"\n") + 1]
        with HttpHouse(_echo) as server:
            assert files(server) == 0
            assert len(server.requests) == 4 - stands.count(b"\n")
        assert {name: _text(body) for name, body in files.good.items()} == {name: name for name in names}
        assert files.answers.read_bytes().startswith(stands)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_by_a_signal_goes_on(files, number):
    names = {"a", "one", "two", "three", "four", "five"}
    files.write(*map(_line, sorted(names)))
    with HttpHouse(_echo, token_s=0.1) as server:
        process = files.start(server, "--concurrency", "4")
        _until(lambda: files.answers.exists() and files.told and len(server.requests) == 5)
        process.send_signal(number)
        told = process.communicate(timeout=20)
        assert process.returncode == (130 if number == signal.SIGINT else -number), told
        assert number == signal.SIGKILL or told == ("", "cierzo: interrupted\n")
        num_left = 6 - len(files.good)
        if number == signal.SIGINT:
            _until(lambda: not server.core.running)
        assert files(server) == 0
        # those that ran when it was killed are joined, those that it has cancelled itself run anew
        num_runs = len(server.core.submits)
        assert num_runs == 6 if number == signal.SIGKILL else 5 + num_left
    assert {name: _text(body) for name, body in files.good.items()} == {name: name for name in names}


def test_another_file_of_answers_is_other_requests(files):
    files.write(_line("one"))
    with HttpHouse(_echo) as server:
        for _ in range(2):
            assert files(server) == 0
            files.answers.unlink()
        assert len(server.core.submits) == 2


def test_a_full_disk_leaves_whole_lines(files, monkeypatch, capsys):
    files.write(*(_line(str(number)) for number in range(4)))

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

    with HttpHouse(_echo) as server:
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
    files.write(_line("one"))
    files.answers.write_bytes(content)
    with HttpHouse(_echo) as server:
        assert files(server) == 2
    assert "OUT must be a file of answers (line 1 is none" in capsys.readouterr().err
    assert files.answers.read_bytes() == content


def test_files_that_cannot_be_those_of_a_batch(files, tmp_path, capsys):
    files.write(_line("one"))
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
    """Nor does the order of lines matter: half of them are answered, the last of them first."""
    count = 30_000
    with open(tmp_path / "in", "wb") as file:
        for number in range(count):
            file.write(json.dumps(_line(f"{number:032}")).encode() + b"\n")
    with open(tmp_path / "out", "wb") as file:
        for number in range(count - 1, count // 2 - 1, -1):
            told = {"id": "x", "custom_id": f"{number:032}", "response": {"status_code": 200}, "error": None}
            file.write(json.dumps(told).encode() + b"\n")
    script = (
        "import resource, sys\nfrom cierzo.engine.gateway.batch_files import Files\n"
        "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nbefore = most()\n"
        "with open('in', 'rb') as a, open('out', 'ab+', buffering=0) as b, Files(a, b, 9999) as files:\n"
        "    found = sum(work is not None for work in files.lines())\n"
        "    print(files.num_lines(), files.num_standing, found, most() - before)\n"
    )
    told = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    *counts, grown_kib = map(int, told.stdout.split())
    assert counts == [count, count // 2, count // 2]
    assert grown_kib < 6 * 1024  # a set of the names alone has more
