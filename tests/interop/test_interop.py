"""A client in another language, written from docs/rpc.md alone, against `cierzo serve`: the interop list.

The cases are in interop.mjs; what Node saw there is compared with what the client in Python sees.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cierzo.engine.errors import CierzoError
from cierzo.engine.frontend.answer import Answer
from cierzo.engine.frontend.client import SyncClient
from cierzo.engine.messages import FEATURES
from cierzo.engine.testing.words import MARKERS
from cierzo.engine.text.tokenizer import _BYTE_OF
from cierzo.engine.weights.make import make_checkpoint

HERE = Path(__file__).parent
NODE = shutil.which("node")
VOCAB = 300
SLOW_READER_S, KEEPALIVE_S, MAX_FRAME_BYTES = 3.0, 0.5, 8192
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
pytestmark = pytest.mark.skipif(NODE is None, reason="there is no node here to run the client with")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose configuration the fake runner reads; every token but a few is a byte of text. Those that mark
    thoughts and calls come at random too."""
    folder = make_checkpoint(tmp_path_factory.mktemp("interop") / "tiny", like="small3")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (config.get("text_config") or config)["vocab_size"] = VOCAB
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({char: token for token, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>", *MARKERS])
    inner.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def address(checkpoint, tmp_path_factory):
    """A server's address, once it is ready."""
    folder = tmp_path_factory.mktemp("socket")
    where = f"unix:{folder / 'rpc.sock'}"
    command = [sys.executable, "-m", "cierzo", "serve", str(checkpoint), "--runner", "fake", "--rpc", where]
    limits = ["--slow-reader-s", SLOW_READER_S, "--keepalive-s", KEEPALIVE_S, "--max-frame-bytes", MAX_FRAME_BYTES]
    with subprocess.Popen(
        [*command, *map(str, limits)], stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(folder)}
    ) as server:
        try:
            assert any(line.startswith("ready: ") for line in server.stdout)
            yield where
        finally:
            server.terminate()
            server.communicate(timeout=60)


@pytest.fixture
def client(address):
    """The client in Python; whatever a case has left at the server is seen at its end."""
    with SyncClient(address) as client:
        yield client
        assert client.stats().streams == 0


def node(address, case, **request):
    """What a case tells."""
    shown = json.dumps(request)
    if (seed := request.get("sampling", {}).get("seed", 0)) >= 2**53:
        shown = shown.replace(str(seed), f'"int:{seed}"')  # JSON's numbers are floats there
    command = [NODE, str(HERE / "interop.mjs"), address, case, shown]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def expected(client, **request):
    """Tokens and texts of each sample, as the client in Python gets them."""
    samples = client.complete(**request).samples
    return [sample.token_ids for sample in samples], [sample.text for sample in samples]


SAMPLING = {"max_tokens": 40, "seed": 11, "ignore_eos": True}
TURN = {"role": "user", "content": "¿Qué viento sopla en Zaragoza?"}


@pytest.mark.parametrize(
    "prompt",
    [{"token_ids": [1, 2, 3]}, {"text": "Le vent se lève …"}, {"messages": [TURN]}],
    ids=["token_ids", "text", "messages"],
)
@pytest.mark.parametrize(
    "more", [{}, {"n": 3}, {"seed": 2**63 - 1}, {"stop_token_ids": [7], "logprobs": 0}], ids=str
)
def test_the_same_answers_as_in_python(address, client, prompt, more):
    request = prompt | {"sampling": SAMPLING | more}
    told = node(address, "plain", **request)
    assert (told["tokens"], told["text"]) == expected(client, **request)
    assert any(told["text"])
    assert int(told["final"]["seed"]) == request["sampling"]["seed"]
    assert int(told["accepted"]["seed"]) == request["sampling"]["seed"]
    assert len(told["accepted"]["request_id"]) == 32


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_same_parts_as_in_python(address, client, seed):
    """Calls here are random bytes, hence broken, but for what may come of "{}"."""
    request = {"token_ids": [1, 2, 3], "sampling": SAMPLING | {"max_tokens": 2000, "seed": seed, "n": 2}}
    told, ends = node(address, "plain", **request), client.complete(**request).samples
    answers = [Answer(), Answer()]
    for answer, end in zip(answers, ends, strict=True):
        answer.end(end)
    shown = [[msgspec.structs.asdict(part) for part in answer.parts] for answer in answers]
    assert told["parts"] == shown
    assert {part["kind"] for parts in shown for part in parts} == {"text", "thinking", "call"}
    for parts, tokens, sample, end in zip(shown, told["tokens"], told["final"]["samples"], ends, strict=True):
        assert sum(part["num_tokens"] for part in parts) == len(tokens)
        assert sample["broken_calls"] == end.broken_calls
        assert sample["finish_reason"] == "length"


@pytest.mark.parametrize("case", ["plain", "resume"])
def test_log_probabilities_of_the_prompt(address, client, case):
    """More than the credit of a stream: the server waits for it."""
    token_ids = [number * 7 % 250 for number in range(3000)]
    request = {"token_ids": token_ids, "sampling": SAMPLING | {"prompt_logprobs": 20}}
    told, entries = node(address, case, **request), client.complete(**request).prompt_logprobs
    assert told["prompt_logprobs"] == [list(msgspec.structs.astuple(entry)) for entry in entries]
    assert [entry.token_id for entry in entries] == token_ids[1:]
    assert told["tokens"] == expected(client, **request)[0]


def test_control_messages(address, client):
    told = node(address, "control")
    assert told["types"] == ["pong", "health_reply", "stats_reply", "model_reply"]
    assert told["health"] == "ready"


def test_tokens_of_a_text_and_text_of_tokens(address, client):
    told = node(address, "words", text="né")
    assert told["token_ids"] == client.tokenize(text="né")
    assert told["text"] == "né"
    assert [piece.encode("latin1") for piece in told["pieces"]] == client.token_bytes(told["token_ids"])
    assert told["kind"] == client.tokenizer_info().kind == "tokenizers"


@pytest.mark.parametrize(
    "case",
    [
        "cancel_at_once",
        "cancel_after_begin",
        "cancel_after_first_response",
        "cancel_by_id",
    ],
)
def test_cancelling(address, client, case):
    told = node(address, case, token_ids=[1, 2, 3])
    (sample,) = told["final"]["samples"]
    assert sample["finish_reason"] == "cancelled"
    assert sample["output_tokens"] >= sum(map(len, told["tokens"]))  # what waited to be sent is dropped
    if case == "cancel_after_first_response":
        assert sample["output_tokens"] >= 1
    if case == "cancel_by_id":
        assert (told["done"], told["unknown"]) == ("done", "not_found")


def test_a_slow_consumer_gets_everything_later_and_holds_up_nobody(address, client):
    request = {"token_ids": [4, 2], "sampling": SAMPLING | {"max_tokens": 6000}}
    told = node(address, "slow_consumer", **request)
    assert told["quick"]["tokens"], told["quick"]
    assert 0 < told["held"] <= 2 * told["credit"]
    if "error" in told:  # this machine was busy for longer than the server waits
        assert told["error"]["code"] == "slow_reader"
    else:
        assert (told["tokens"], told["text"]) == expected(client, **request)


def test_where_nobody_consumes_the_server_ends_the_stream_and_no_other(address, client):
    told = node(address, "no_consumer", token_ids=[4, 2])
    error = told["error"]
    assert (error["code"], error["field"], error["limit"]) == ("slow_reader", "slow_reader_s", str(SLOW_READER_S))
    assert told["quick"]["tokens"]


@pytest.mark.parametrize("n", [1, 2])
def test_resuming_on_another_connection(address, client, n):
    request = {"text": "Go on", "sampling": SAMPLING | {"max_tokens": 3000, "n": n}}
    told = node(address, "resume", **request)
    assert (told["tokens"], told["text"]) == expected(client, **request)
    assert told["same"]
    assert any(told["received"])
    assert told["final"]["usage"]["output_tokens"] == 3000 * n


def test_a_key_generates_once(address, client):
    request = {"token_ids": [1, 2, 3], "sampling": {"max_tokens": 30, "ignore_eos": True}}  # with a seed of its own
    before = client.stats().accepted
    told = node(address, "idempotency", **request)
    first, second = told["answers"]
    assert first["tokens"] == second["tokens"]
    assert first["accepted"]["request_id"] == second["accepted"]["request_id"]
    assert told["reused"]["error"]["code"] == "key_reused"
    assert client.stats().accepted == before + 1


@pytest.mark.parametrize(
    "prompt",
    [
        {"token_ids": [number * 7 % 250 for number in range(20_000)]},
        {"text": "Zaragoza …" * 2000},
        {"messages": [TURN | {"content": "x" * 9000}, TURN | {"role": "assistant"}, TURN]},
    ],
    ids=["token_ids", "text", "messages"],
)
def test_a_prompt_longer_than_a_frame(address, client, prompt):
    request = prompt | {"sampling": SAMPLING}
    assert len(msgspec.msgpack.encode(prompt)) > MAX_FRAME_BYTES
    told = node(address, "plain", **request)
    assert (told["tokens"], told["text"]) == expected(client, **request)


def test_a_deadline(address, client):
    told = node(address, "plain", token_ids=[1], deadline_s=0.2, sampling=SAMPLING | {"max_tokens": 250_000})
    (sample,) = told["final"]["samples"]
    assert sample["finish_reason"] == "deadline"
    assert sample["output_tokens"] == len(told["tokens"][0])
    assert told["final"]["timings"]["total_s"] >= 0.2


@pytest.mark.parametrize(
    "request_",
    [
        {"token_ids": [1], "sampling": {"top_p": 2.0}},
        {"token_ids": [VOCAB]},
        {"text": "", "deadline_s": -1},
        {"messages": [{"role": "nobody"}]},
        {"token_ids": [1], "sampling": {"max_tokens": "many"}},
    ],
    ids=str,
)
def test_the_fields_of_an_error(address, client, request_):
    told = node(address, "plain", **request_)["error"]
    try:
        client.complete(
            **{key: value for key, value in request_.items() if key != "sampling"}, **request_.get("sampling", {})
        )
    except CierzoError as error:
        seen = (error.code, error.field, error.limit)
    assert (told["code"], told["field"], told["limit"]) == seen
    assert told["retry"] is False


def test_a_hello_of_the_version_before(address, client):
    request = {"token_ids": [1, 2, 3], "sampling": SAMPLING}
    told = node(address, "version_2", **request)
    assert (told["welcome"]["version"], told["welcome"].get("features", [])) == (2, [])
    tokens, _ = expected(client, **request)
    alphabet = [_BYTE_OF[char] for char in sorted(pre_tokenizers.ByteLevel.alphabet())]
    spelled = bytes(alphabet[token] for token in tokens[0] if token < 256).decode(errors="replace")
    assert (told["tokens"], told["text"]) == (tokens, [spelled])
    refused = node(address, "feature_not_granted", **request, idempotency_key="k")["error"]
    assert (refused["code"], refused["field"]) == ("invalid_request", "idempotency_key")


def test_pings_are_answered(address, client):
    told = node(address, "keepalive", token_ids=[1], sampling=SAMPLING)
    assert told["welcome"]["limits"]["keepalive_s"] == KEEPALIVE_S
    assert len(told["tokens"][0]) == SAMPLING["max_tokens"]


def test_what_a_request_costs(address, client):
    cost = node(address, "plain", token_ids=[1, 2, 3], sampling=SAMPLING)["final"]["cost"]
    assert cost["computed_tokens"] >= SAMPLING["max_tokens"]
    assert cost["steps"] >= SAMPLING["max_tokens"]


def test_every_feature_is_asked_for(address, client):
    assert set(node(address, "control")["welcome"].get("features", [])) == set(FEATURES)
