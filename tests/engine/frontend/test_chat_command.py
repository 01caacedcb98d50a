"""`cierzo chat` as a process: what is no text, and Ctrl-C."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from marked import ids

from cierzo.cli import main
from cierzo.engine.commands import chat as command
from cierzo.engine.commands.screen import DIM, UNDIM, Screen, remark
from cierzo.engine.messages import Abort, Delta, Part, Ready, SamplingParams
from cierzo.engine.testing.words import EOS, marked_prompts, marked_tokenizer
from cierzo.engine.text.chat import ChatTemplate
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.template_chat import TemplateChat

DEADLINE_S = 60
CIERZO = """
import signal, sys
from cierzo.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
sys.exit(main())
"""
HELLO = [ord(char) for char in "Salut"]


def chats_with(served) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """The words that start `cierzo chat` against a server."""
    chats = []

    def start(*words: str | bytes) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", CIERZO, "chat", "--rpc", served.address, *words]
        pipe = subprocess.PIPE
        chats.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe))
        return chats[-1]

    yield start
    for each in chats:
        each.kill()
        each.communicate()


@pytest.fixture
def chat(served, cores):
    """Start `cierzo chat` against a server whose every answer is "Salut", one token a step."""
    cores.answer = lambda submit, sample: HELLO
    yield from chats_with(served)


@pytest.fixture
def marked_chat(serves):
    """The same, of a model that marks thoughts and calls."""
    yield from chats_with(serves(words=marked_prompts()))


def lines_of(text: bytes) -> list[str]:
    return [line for line in text.decode().splitlines() if line]


@pytest.mark.parametrize("option", ["--message", "--system", "--stop"])
def test_bytes_that_are_no_text_are_refused_in_one_line(chat, option):
    words = [option, b"caf\xe9", *([] if option == "--message" else ["--message", "Hi"])]
    refused = chat(*words)
    out, err = refused.communicate(timeout=DEADLINE_S)
    assert (refused.returncode, out) == (2, b"")
    assert lines_of(err) == [err.decode().strip()]
    assert err.startswith(f"cierzo chat: error: argument {option}: must be text in UTF-8".encode())


def test_a_line_that_is_no_text_is_refused_and_the_conversation_goes_on(chat, cores):
    talk = chat()
    out, err = talk.communicate(b"caf\xe9\nHi\n", timeout=DEADLINE_S)
    assert talk.returncode == 0, err
    assert out.count(b"Salut") == 1
    (line,) = lines_of(err)
    assert line.startswith("cierzo: invalid_request: messages[0].content holds a lone surrogate")
    (submit,) = cores.now.submits
    assert bytes(token for token in submit.prompt_token_ids if token < 256) == b"[user]Hi[assistant]"


@pytest.mark.parametrize("words", [("--message", "Hi"), ()])
def test_an_effort_is_that_of_each_turn(serves, cores, words):
    cores.answer = lambda submit, sample: HELLO
    tokenizer = marked_tokenizer()
    template = TemplateChat(ChatTemplate("{{ messages[-1].content }}, {{ reasoning_effort }}"), tokenizer)
    (start,) = itertools.islice(chats := chats_with(serves(words=PromptEncoder(tokenizer, template))), 1)
    talk = start("--reasoning-effort", "high", *words)
    _, err = talk.communicate(b"" if words else b"Hi\nHi\n", timeout=DEADLINE_S)
    assert talk.returncode == 0, err
    assert [bytes(each.prompt_token_ids) for each in cores.now.submits] == [b"Hi, high"] * (1 if words else 2)
    talk = start("--reasoning-effort", "odd", "--message", "Hi")
    _, err = talk.communicate(timeout=DEADLINE_S)
    assert talk.returncode
    assert b"reasoning_effort is 'odd', allowed: none, low, medium, high" in err
    chats.close()


THOUGHT = Part(kind="thinking", text="hm", num_tokens=3)
CALL = Part(kind="call", name="wind", id="abcdefghi", num_tokens=4)
PIECES = [
    ([THOUGHT], ""),
    ([Part(kind="text")], ""),
    ([Part(kind="thinking", text=" so")], ""),
    ([], "It "),
    ([], "blows."),
    ([CALL], ""),
    ([Part(kind="call", text='{"at": 1'), Part(kind="call", text="}"), Part(kind="call", call=1, name="rain")], ""),
]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_thoughts_are_dimmed_on_a_terminal_and_calls_are_calls(monkeypatch, capsys, is_terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    screen = Screen()
    for parts, text in PIECES:
        screen.show(parts, text)
    screen.close()
    dim, undim = (DIM, UNDIM) if is_terminal else ("", "")
    assert capsys.readouterr().out == f'{dim}hm so{undim}\n\nIt blows.\n\nwind({{"at": 1}})\n\nrain()'


def test_an_interrupted_thought_does_not_leave_the_terminal_dim(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)

    class Interrupted:
        def generate(self, **_):
            return self

        def cancel(self):
            pass

        def __iter__(self):
            yield Delta(stream=1, parts=[THOUGHT])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command.turn(Interrupted(), [], SamplingParams())
    assert capsys.readouterr().out.endswith(UNDIM)


def test_a_conversation_keeps_thoughts(marked_chat, cores):
    said = "[THINK]hm[/THINK]Salut"
    cores.answer = lambda submit, sample: [*ids(said), EOS]
    talk = marked_chat()
    out, err = talk.communicate(b"one\ntwo\n", timeout=DEADLINE_S)
    assert talk.returncode == 0, err
    assert out.count(b"hm\n\nSalut\n\n[") == 2
    _, second = cores.now.submits
    assert second.prompt_token_ids == ids(f"[user]one[assistant]{said}[user]two")


@pytest.mark.parametrize(
    ("said", "ends", "told"),
    [
        ("Salut", True, ""),
        ("Salut", False, "[cut at its limit of tokens]"),
        ("[TOOL_CALLS]wind[ARGS]{", True, "[broken or unfinished, and not called: wind]"),
        (
            "[TOOL_CALLS]wind[ARGS]{}[TOOL_CALLS]rain[ARGS]{",
            False,
            "[cut at its limit of tokens; broken or unfinished, and not called: rain]",
        ),
    ],
)
def test_an_answer_that_is_cut_or_broken_is_told_and_the_conversation_goes_on(marked_chat, cores, said, ends, told):
    cores.answer = lambda submit, sample: [*ids(said), EOS] if ends else ids(said)
    talk = marked_chat()
    out, err = talk.communicate(b"one\ntwo\nthree\n", timeout=DEADLINE_S)
    assert (talk.returncode, err) == (0, b"")
    assert len(cores.now.submits) == 3
    lines = [line for line in lines_of(out) if line.startswith("[") and "prompt tokens" not in line]
    assert lines == ([told] * 3 if told else [])


def test_a_remark_is_dimmed_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    remark("deadline", [], [], sys.stdout)
    assert capsys.readouterr().out == f"{DIM}[cut at its deadline]{UNDIM}\n"


def test_a_line_is_the_result_of_a_call(marked_chat, cores):
    said = "[TOOL_CALLS]wind[ARGS]{}[TOOL_CALLS]rain[ARGS]{}"
    cores.answer = lambda submit, sample: [*(ids(said) if len(cores.now.submits) == 1 else HELLO), EOS]
    talk = marked_chat()
    out, err = talk.communicate(b"one\nblows\nfalls\ntwo\n", timeout=DEADLINE_S)
    assert talk.returncode == 0, err
    assert b"> wind({})\n\nrain({})\n\n[" in out
    assert b"\nwind> rain> Salut" in out
    _, second, third = cores.now.submits
    assert second.prompt_token_ids == ids(f"[user]one[assistant]{said}[tool]blows[tool]falls")
    assert third.prompt_token_ids == ids(
        f"[user]one[assistant]{said}[tool]blows[tool]falls[assistant]Salut[user]two"
    )


def test_an_interrupt_ends_the_answer_alone(chat, served, cores):
    cores.free = False
    talk = chat()
    talk.stdin.write(b"one\n")
    talk.stdin.flush()
    served.do(lambda: cores.until(lambda: cores.now.submits))
    served.do(cores.now.step)
    said = b""
    while said != b"> S":
        said += os.read(talk.stdout.fileno(), 100)
        assert b"> S".startswith(said)
    talk.send_signal(signal.SIGINT)
    served.do(lambda: cores.until(lambda: cores.now.aborts))
    served.do(lambda: setattr(cores, "free", True))
    out, err = talk.communicate(b"two\n", timeout=DEADLINE_S)
    assert (talk.returncode, lines_of(err)) == (0, ["cierzo: the answer was cancelled"])
    assert out.count(b"Salut") == 1
    prompt = cores.now.submits[-1].prompt_token_ids  # the turn is forgotten
    assert bytes(token for token in prompt if token < 256) == b"[user]two[assistant]"


def test_an_interrupted_message_ends_the_command(chat, served, cores):
    cores.free = False
    talk = chat("--message", "Hi")
    served.do(lambda: cores.until(lambda: cores.now.submits))
    talk.send_signal(signal.SIGINT)
    _, err = talk.communicate(timeout=DEADLINE_S)
    assert (talk.returncode, lines_of(err)) == (130, ["cierzo: interrupted"])
    served.do(lambda: cores.until(lambda: cores.now.aborts))


def test_an_answer_that_failed_is_no_success(chat, served, cores):
    cores.free = False
    talk = chat("--message", "Hi")
    served.do(lambda: cores.until(lambda: cores.now.submits))
    request_id = cores.now.submits[0].request_id
    served.do(lambda: cores.now.abort(Abort(request_id=request_id, reason="failed")))
    _, err = talk.communicate(timeout=DEADLINE_S)
    assert (talk.returncode, lines_of(err)) == (1, ["cierzo: core_failed: the answer failed"])


def test_a_server_that_loads_is_waited_for(served, cores, monkeypatch, capsys):
    cores.silent = True
    served.do(cores.now.kill)
    served.do(lambda: cores.until(lambda: len(cores.lives) == 2 and cores.now.hello))
    plain = command.SyncClient.wait_ready

    def ready_soon(client, timeout_s=None):
        served.do(lambda: cores.now.say(Ready(startup="fake core")))
        plain(client, timeout_s)

    monkeypatch.setattr(command.SyncClient, "wait_ready", ready_soon)
    cores.answer = lambda submit, sample: HELLO
    assert command.chat(served.address, "Hi", None, SamplingParams()) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Salut\n\n[")
    assert err == "the server still loads its model ...\n"


def test_a_server_that_drains_is_told_in_one_line(served, capsys):
    served.do(served.house.frontend.drain)
    assert main(["chat", "--rpc", served.address, "--message", "Hi"]) == 1
    assert capsys.readouterr().err == "cierzo: draining: the server drains: it takes no new requests\n"
