"""`cierzo serve --http` and `cierzo gateway`, as processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import httpx2
import openai
import pytest
from http_house import MESSAGES

from cierzo.cli import main
from cierzo.engine.weights.make import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small one; the fake runner reads its config.json alone."""
    return make_checkpoint(tmp_path_factory.mktemp("served") / "tiny", like="small3")


@pytest.fixture
def started(tmp_path):
    """Start a command; the process, and what it says up to the line that begins with `until`."""
    processes = []

    def start(*words, until="ready: "):
        process = subprocess.Popen(
            [sys.executable, "-m", "cierzo", *words],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        processes.append(process)
        told = []
        for line in process.stdout:
            told.append(line.rstrip())
            if line.startswith(until):
                return process, told
        raise AssertionError(told)

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def served(started, checkpoint, tmp_path):
    """A server with both doors: process, address of HTTP, address of the RPC."""
    rpc = f"unix:{tmp_path / 'rpc.sock'}"
    options = ("--runner", "fake", "--rpc", rpc, "--flight-folder", "", "--http", "127.0.0.1:0")
    process, told = started("serve", str(checkpoint), *options)
    (http,) = [line.split()[1] for line in told if line.startswith("HTTP ")]
    return process, http, rpc


def _asked(http):
    """Output tokens of an answer at once and in a stream."""
    prompt = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 5, "extra_body": {"ignore_eos": True}}
    with openai.OpenAI(base_url=f"http://{http}/v1", api_key="none", max_retries=0) as client:
        whole = client.completions.create(**prompt)
        options = {"include_usage": True}
        *_, last = client.completions.create(**prompt, stream=True, stream_options=options)
    return whole.usage.completion_tokens, last.usage.completion_tokens


def test_a_server_with_a_door_and_a_gateway_before_it(served, started):
    process, http, rpc = served
    assert _asked(http) == (5, 5)
    assert httpx2.get(f"http://{http}/metrics").status_code == 200
    gateway, told = started("gateway", "--rpc", rpc, "--http", "127.0.0.1:0")
    through = told[-1].rpartition(" ")[2]
    assert _asked(through) == (5, 5)
    gateway.send_signal(signal.SIGTERM)
    assert gateway.wait(20) == 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://{http}/version")


def test_a_chat_without_a_template_is_refused_with_the_reason(served):
    _, http, _ = served
    answer = httpx2.post(f"http://{http}/v1/chat/completions", json={"messages": MESSAGES})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("serve", "nowhere", "--http", "nonsense"), "http must be HOST:PORT"),
        (("gateway", "--http", "0.0.0.0:0"), "reached from other machines"),
        (("gateway", "--http", "127.0.0.1:0", "--http-tls-key", "nowhere"), "tls_certificate"),
        (("gateway", "--max-body-bytes", "3"), "--max-body-bytes"),
    ],
)
def test_settings_that_are_none(words, named, capsys, checkpoint):
    words = [str(checkpoint) if word == "nowhere" and words[0] == "serve" else word for word in words]
    assert main(words) == 2
    assert named in capsys.readouterr().err


def test_packages_that_are_missing_are_named(monkeypatch, capsys):
    monkeypatch.setattr("cierzo.engine.gateway.config.find_spec", lambda name: None)
    assert main(["gateway"]) == 2
    assert "starlette, uvicorn, httptools is not installed" in capsys.readouterr().err


def test_the_demo_is_called_demo_too(monkeypatch, checkpoint):
    served = []
    monkeypatch.setattr("cierzo.engine.commands.serve.serve", lambda options, http: served.append(http) or 0)
    monkeypatch.setattr("cierzo.engine.options.checkpoint_folder", lambda name: str(checkpoint))
    assert main(["serve", "demo", "--served-model-name", "small"]) == 0
    assert main(["serve", str(checkpoint)]) == 0
    assert [http.served_model_name for http in served] == [("small", "demo"), ()]
