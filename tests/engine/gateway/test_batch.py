"""`cierzo batch` before a fake server: what it is answered, and what it waits for."""

from __future__ import annotations

import threading
from collections import Counter
from functools import partial

import pytest
from batch_run import Run, a_line, echo, text_of
from http_house import HttpHouse, until
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from tqdm import tqdm

from cierzo.cli import main
from cierzo.engine.commands import batch
from cierzo.engine.errors import Draining, KeyReused, NotFound, Overloaded
from cierzo.engine.testing.fake_core import FakeCore


@pytest.fixture
def files(tmp_path):
    return Run(tmp_path)


# --- answers -----------------------------------------------------------------------------------------------


def test_each_endpoint_is_answered_as_over_http(files, capsys):
    files.write(
        a_line("chat", n=2, user="me", logprobs=True),
        a_line(
            "long", messages=[{"role": "user", "content": "x" * 2000}, {"role": "user", "content": "long"}] * 20
        ),
        b"  ",
        a_line("text", "/v1/completions", prompt=["a", "b"], max_tokens=3, echo=True),
        a_line("response", "/v1/responses", input="Hi"),
    )
    with HttpHouse(echo, max_model_len=60_000) as server:
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
        a_line("one"),
        b"{nonsense",
        b"\xff\xfe",
        b'{"custom_id": "\\ud800", "method": "POST", "url": "/v1/responses", "body": {}}',
        a_line("one", temperature=0.5),
        a_line("got", method="GET"),
        a_line("where", "/v1/nowhere"),
        a_line("") | {"custom_id": ""},
        a_line("more") | {"more": 1},
        {"custom_id": "less", "method": "POST", "url": "/v1/responses"},
        b'{"custom_id": "large", "method": "POST", "url": "/v1/responses", "body": {"input": "%b"}}'
        % (b"x" * 70_000),
        a_line("stream", stream=True),
        a_line("strange", strange=1),
        a_line("other", model="other"),
        b'{"custom_id": "twice", "method": "POST", "url": "/v1/responses", "body": {"input": "a", "input": "b"}}',
        a_line("last"),
    )
    bars = []

    class Bar(tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(batch, "tqdm", lambda **options: Bar(**options | {"disable": False}))
    with HttpHouse(echo) as server:
        assert files(server, "--max-body-bytes", "1024") == 1
        assert len(server.requests) == 2
        told = files.told
        assert files(server, "--max-body-bytes", "1024") == 1
        assert (len(server.requests), files.told) == (2, told)
    assert {*bars} == {(16, 16)}
    assert {name: text_of(body) for name, body in files.good.items()} == {"one": "one", "last": "last"}
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
    files.write(a_line("one", method="GET"), a_line("two"))
    with HttpHouse(echo) as server:
        assert files(server) == 1
        files.write(a_line("one"), a_line("two"))
        assert files(server) == 1  # the error stands
        assert {*files.good} == {"one", "two"}
        assert len(server.requests) == 2


def test_a_limited_number_of_lines_is_asked_at_a_time(files):
    files.write(*(a_line(str(number)) for number in range(40)))
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
    files.write(*(a_line(str(number)) for number in range(30)))
    with HttpHouse(echo) as server:
        server.refuse(Overloaded, times=5, when=lambda message: message.messages[-1].content == "I am 7")
        server.refuse(Overloaded, times=25, retry_after_s=0.01)
        server.refuse(Draining, times=5)
        assert files(server) == 0
    assert {*files.good} == {*map(str, range(30))}


def test_of_many_prompts_those_that_are_refused_are_asked_again(files):
    """The others of the line go on meanwhile."""
    files.write(a_line("many", "/v1/completions", prompt=[*map(str, range(16))]))
    with HttpHouse(echo, token_s=0.1) as server:
        server.refuse(Overloaded, times=3, when=lambda message: message.text == "7")
        server.refuse(Overloaded, times=12, when=lambda message: int(message.text) > 3)
        assert files(server) == 0
        assert len(server.core.submits) == 16
    assert len(files.good["many"]["choices"]) == 16


def test_a_server_without_room_for_keys_is_asked_without(files):
    files.write(*(a_line(str(number)) for number in range(20)))
    with HttpHouse(echo, max_idempotency_keys=3) as server:
        assert files(server, "--concurrency", "2") == 0
        keys = [request.idempotency_key for request in server.requests]
        assert len(files.good) == 20
        assert keys.count(None) == 17


def test_a_server_that_still_loads_is_waited_for(files):
    files.write(a_line("one"), a_line("two"))
    with HttpHouse(echo, health="loading") as server:

        def load():
            until(lambda: server.frontend.counters.refused)
            server.health = "ready"

        thread = threading.Thread(target=load)
        thread.start()
        assert files(server) == 0
        thread.join()
    assert len(files.good) == 2


def test_a_key_that_stands_for_something_else_is_not_used_again(files):
    files.write(a_line("one"))
    with HttpHouse(echo) as server:
        server.refuse(KeyReused("another request", field="idempotency_key"))
        server.refuse(NotFound("its answer is kept no longer", field="idempotency_key"))
        assert files(server) == 0
        assert [request.idempotency_key[-4:] for request in server.requests] == ["-0-0", "-1-0", "-2-0"]


def test_a_deadline_of_a_line_is_kept(files):
    files.write(a_line("long " * 9, deadline_s=0.1), a_line("short", deadline_s=20))
    with HttpHouse(echo, token_s=0.03) as server:
        assert files(server) == 1
        assert len(server.requests) == 2
    assert {name: error[0] for name, error in files.bad.items()} == {"long " * 9: 504}


def test_a_key_that_is_taken_back_ends_the_run(files, tmp_path, capsys):
    files.write(*(a_line(str(number)) for number in range(20)))
    keys, key = tmp_path / "keys", tmp_path / "key"
    assert main(["make-key", "mine", "--keys", str(keys)]) == 0
    key.write_text(capsys.readouterr().out)
    assert main(["make-key", "other", "--keys", str(tmp_path / "others")]) == 0

    def answer(message):
        if len(server.requests) == 5:
            (tmp_path / "others").replace(keys)
            server._running.server.reload()
        return echo(message)

    with HttpHouse(answer, keys=str(keys)) as server:
        assert files(server, "--key-file", str(key), "--concurrency", "2") == 1
    assert "cierzo: unauthorized: " in capsys.readouterr().err
    assert 3 <= len(files.good) <= 5
    assert not files.bad


@pytest.mark.parametrize("after_deltas", [0, 2])
def test_a_lost_connection_costs_no_second_run(files, after_deltas):
    files.write(*(a_line(f"number {number}") for number in range(6)))
    with HttpHouse(echo) as server:
        server.reset(after_deltas=after_deltas, times=4)
        assert files(server, "--concurrency", "2") == 0
        assert len(server.core.submits) == 6
    assert {name: text_of(body) for name, body in files.good.items()} == {
        f"number {n}": f"number {n}" for n in range(6)
    }


def test_answers_that_a_server_has_lost_or_left_are_asked_for_again(files):
    files.write(*(a_line(f"number {number}") for number in range(4)))
    with HttpHouse(echo, token_s=0.02, drain_s=0.05) as server:

        def disturb():
            until(lambda: len(server.requests) == 4)
            server.restart(down_s=0.3)
            until(lambda: len(server.requests) == 8)
            server.health = "draining"
            until(lambda: not server.core.running)
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
    files.write(*map(a_line, ("twice", "always", "never")))
    with HttpHouse(echo) as server:
        assert files(server) == 1
    assert {*files.good} == {"twice", "never"}
    assert files.bad["always"][0] == 500
    assert "a step of the model failed" in files.bad["always"][1]["message"]
    assert num_failed == {"twice": 2, "always": 3}


def test_a_server_that_has_failed_or_gone_ends_the_run_and_another_goes_on(files, capsys):
    files.write(*(a_line(str(number)) for number in range(9)))
    with HttpHouse(echo) as server:
        server.health = "failed"
        assert files(server) == 1
        assert "cierzo: core_failed: " in capsys.readouterr().err
        assert not files.told

    def answer(message):
        if len(server.requests) == 5:
            threading.Thread(target=end).start()
        return echo(message)

    with HttpHouse(answer, token_s=0.05) as server:
        end = partial(setattr, server, "health", "failed")
        assert files(server, "--concurrency", "1") == 1
        assert "cierzo: core_failed: " in capsys.readouterr().err
        assert len(files.good) == 4
        files.answers.unlink()
    with HttpHouse(answer) as server:
        end = server.leave
        assert files(server, "--away-s", "0.2", "--concurrency", "1") == 1
        assert "cierzo: connection_lost: " in capsys.readouterr().err
        assert 3 <= len(files.good) < 9
    with HttpHouse(echo) as server:
        before = len(files.good)
        assert files(server) == 0
        assert len(server.requests) == 9 - before
    assert {*files.good} == {*map(str, range(9))}


def test_no_server_and_a_key_that_it_does_not_know(files, tmp_path, capsys):
    files.write(a_line("one"))
    with HttpHouse(echo) as server:
        words = files.words(server)
    assert main(words) == 1
    assert "cierzo: connection_lost: " in capsys.readouterr().err
    assert main(["make-key", "mine", "--keys", str(tmp_path / "keys")]) == 0
    key = tmp_path / "key"
    key.write_text(capsys.readouterr().out)
    with HttpHouse(echo, keys=str(tmp_path / "keys")) as server:
        assert files(server) == 1
        assert "cierzo: unauthorized: " in capsys.readouterr().err
        assert files.answers.read_bytes() == b""
        assert files(server, "--key-file", str(key)) == 0
