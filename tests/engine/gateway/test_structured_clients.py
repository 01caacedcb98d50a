"""Clients of OpenAI and Mistral before a real engine with random weights: what answers must hold, they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import openai
import pydantic
import pytest
import word_folders
from chaos.server import Server
from mistralai.client import Mistral
from structured.asking import LIKELY, bias_of
from structured.judge import fault

from cierzo.bench.peers.process import HOST, free_port
from cierzo.engine.frontend.client import SyncClient
from cierzo.engine.text.short_tekken import short_tekken
from cierzo.engine.weights.make import make_checkpoint

TURNS = [{"role": "user", "content": "How is the wind at sea?"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "at": {"enum": ["sea", "größe", "x y"]},
        "knots": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["at", "knots"],
    "additionalProperties": False,
}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": PARAMETERS, **fields}}


TOOLS = [tool("wind", strict=True), tool("wave", strict=True), tool("any_arguments")]
NAMES = {"wind", "wave", "any_arguments"}


class Wind(pydantic.BaseModel):
    """What an answer is to be."""

    at: Literal["sea", "land"]
    knots: int
    gusts: list[bool]


class Door:
    """A server with a door. extra: what brings answers to an end, thoughts among them."""

    def __init__(self, server: Server, url: str, bias: dict[int, float]) -> None:
        self.server, self.url = server, url
        self.extra: dict[str, Any] = {
            "logit_bias": {str(token_id): value for token_id, value in bias.items()},
            "max_thinking_tokens": 8,
        }
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.mistral = Mistral(api_key="none", server_url=url)

    def asked(self, seed: int = 1, turns: list[Any] = TURNS, **asked: Any) -> dict[str, Any]:
        """The arguments of a chat completion."""
        extra = self.extra | asked.pop("extra_body", {})
        plain = {"model": "tiny", "messages": turns, "seed": seed, "max_tokens": 400, "temperature": 1.0}
        return plain | asked | {"extra_body": extra}

    def chat(self, *given: Any, **asked: Any) -> Any:
        """A chat completion, and its first choice."""
        answer = self.openai.chat.completions.create(**self.asked(*given, **asked))
        return answer, answer.choices[0]


def with_tags(folder: Path) -> Path:
    """A checkpoint whose chat template marks thoughts and calls by tags, and calls are JSON."""
    checkpoint = make_checkpoint(folder / "tags", like="small3", dtype="float32")
    word_folders.TOKENIZERS["bytes"].save(str(checkpoint / "tokenizer.json"))
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(word_folders.ROLES))
    (checkpoint / "chat_template.jinja").write_text(word_folders.FAMILIES["thinking"])
    return checkpoint


@pytest.fixture(scope="module", params=["tekken", "tags"])
def door(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    folder = tmp_path_factory.mktemp("door")
    checkpoint = (
        with_tags(folder)
        if request.param == "tags"
        else make_checkpoint(folder / "tiny", like="small4", tokenizer=short_tekken)
    )
    http = f"{HOST}:{free_port()}"
    options = {"threads": 1, "kv_cache_gib": 0.05, "http": http, "served_model_name": "tiny"}
    with Server(checkpoint, options, folder / "server.log") as server:
        with SyncClient(server.address) as client:
            model = client.model_info()
            pieces = client.token_bytes(range(model.vocab_size))
        yield Door(server, f"http://{http}", bias_of(pieces, model.eos_token_ids))


def test_a_model_of_the_caller_s(door):
    for seed in range(4):
        answer = door.openai.chat.completions.parse(**door.asked(seed), response_format=Wind)
        assert isinstance(answer.choices[0].message.parsed, Wind)
        assert answer.choices[0].finish_reason == "stop"


def test_a_response_of_it(door):
    answer = door.openai.responses.parse(
        model="tiny", input="Hi", text_format=Wind, store=False, max_output_tokens=400, extra_body=door.extra
    )
    assert answer.status == "completed"
    assert isinstance(answer.output_parsed, Wind)


def test_json_objects(door):
    for seed in range(4):
        _, choice = door.chat(seed, response_format={"type": "json_object"})
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"regex": "[a-f]{3}-(one|two)"}, "[a-f]{3}-(one|two)"),
        ({"choice": ["größe", "x\ny", "😀"]}, "größe|x\ny|😀"),
        ({"grammar": 'start: a | start "," a\na: /[0-9]/ "!"'}, "[0-9]!(,[0-9]!)*"),
        ({"json": {"enum": ["a", 1]}}, '"a"|1'),
    ],
)
def test_patterns_choices_grammars(door, asked, pattern):
    for seed in range(3):
        _, choice = door.chat(seed, extra_body={"structured_outputs": asked})
        assert (choice.finish_reason, bool(re.fullmatch(pattern, choice.message.content))) == ("stop", True)
        completion = door.openai.completions.create(
            model="tiny",
            prompt="Hi",
            max_tokens=400,
            seed=seed,
            extra_body=door.extra | {"structured_outputs": asked},
        )
        assert re.fullmatch(pattern, completion.choices[0].text)


@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls(door, parallel):
    numbers = set()
    for seed in range(6):
        _, choice = door.chat(seed, tools=TOOLS, tool_choice="required", parallel_tool_calls=parallel)
        calls = [call.function for call in choice.message.tool_calls]
        numbers.add(len(calls))
        assert choice.finish_reason == "tool_calls"
        assert not choice.message.content
        for call in calls:
            assert call.name in NAMES
            assert not fault(PARAMETERS if call.name != "any_arguments" else {"type": "object"}, call.arguments)
    assert min(numbers) >= 1
    assert parallel or numbers == {1}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_named_calls(door, name):
    for seed in range(3):
        _, choice = door.chat(seed, tools=TOOLS, tool_choice={"type": "function", "function": {"name": name}})
        assert [call.function.name for call in choice.message.tool_calls] == [name]
        assert isinstance(json.loads(choice.message.tool_calls[0].function.arguments), dict)


def test_a_stream_says_the_same(door):
    for asked in ({"response_format": {"type": "json_object"}}, {"tools": TOOLS, "tool_choice": "required"}):
        _, whole = door.chat(7, **asked)
        stream = door.openai.chat.completions.create(**door.asked(7, **asked), stream=True)
        events = [choice for event in stream for choice in event.choices]
        assert "".join(event.delta.content or "" for event in events) == (whole.message.content or "")
        pieces = [call.function for event in events for call in event.delta.tool_calls or ()]
        calls = [call.function.arguments for call in whole.message.tool_calls or ()]
        assert "".join(piece.arguments for piece in pieces) == "".join(calls)
        assert events[-1].finish_reason == whole.finish_reason


def test_a_conversation_of_required_and_named_calls(door):
    """Each turn goes on with what the one before it called, and its prompt begins with that one's tokens."""
    turns: list[Any] = [*TURNS]
    choices = ["required", {"type": "function", "function": {"name": "wave"}}] * 2
    cached = []
    for number, wanted in enumerate(choices):
        answer, choice = door.chat(number, turns, tools=TOOLS, tool_choice=wanted)
        calls = choice.message.tool_calls
        assert {call.function.name for call in calls} <= (NAMES if wanted == "required" else {"wave"})
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        turns.append(choice.message.model_dump(exclude_none=True))
        turns += [{"role": "tool", "tool_call_id": call.id, "content": "12 knots"} for call in calls]
    _, last = door.chat(9, turns, tools=TOOLS, tool_choice="none", max_tokens=8)
    assert not last.message.tool_calls
    assert cached == sorted(cached)
    assert cached[-1] > 0


def test_thoughts_come_first(door):
    """A thought is the model's own; the form holds for what comes behind it."""
    with SyncClient(door.server.address) as client:
        token_ids = client.tokenize(text="<think>[THINK]", special_tokens=False, control_tokens=True)
    bias = door.extra["logit_bias"] | dict.fromkeys(map(str, token_ids), LIKELY)
    thoughts = []
    for seed in range(6):
        extra = {"logit_bias": bias, "response_format": {"type": "json_object"}}
        _, choice = door.chat(seed, reasoning_effort="high", extra_body=extra)
        assert isinstance(json.loads(choice.message.content), dict)
        thoughts.append(getattr(choice.message, "reasoning_content", ""))
    assert any(thoughts)


def test_max_tokens_within_a_schema(door):
    _, choice = door.chat(
        max_tokens=3, reasoning_effort="none", extra_body={"structured_outputs": {"regex": "a{9}"}}
    )
    assert (choice.finish_reason, choice.incomplete) == ("length", True)
    _, choice = door.chat(reasoning_effort="none", extra_body={"structured_outputs": {"regex": "a{9}"}})
    assert (choice.finish_reason, getattr(choice, "incomplete", None)) == ("stop", None)


def test_several_samples_hold_it_each(door):
    answer, _ = door.chat(n=3, response_format={"type": "json_object"})
    contents = [choice.message.content for choice in answer.choices]
    assert all(isinstance(json.loads(content), dict) for content in contents)


@pytest.mark.parametrize(
    ("asked", "place"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": []}}}},
         "response_format.json_schema.schema"),
        ({"extra_body": {"structured_outputs": {"regex": "(a"}}}, "structured_outputs.regex"),
        ({"extra_body": {"structured_outputs": {"regex": "a" * 300_000}}}, "structured_outputs.regex"),
        ({"extra_body": {"structured_outputs": {"grammar": "start: <[2]>"}}}, "structured_outputs.grammar"),
        ({"extra_body": {"structured_outputs": {"choice": []}}}, "structured_outputs.choice"),
        ({"tools": [tool("f", strict=True, parameters={"type": "object", "not": {}})]},
         "tools[0].function.parameters"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nobody"}}},
         "tool_choice.function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)  # fmt: skip
def test_refusals_name_the_place(door, asked, place):
    with pytest.raises(openai.BadRequestError) as refused:
        door.chat(**asked)
    assert refused.value.param == place, refused.value.body
    assert refused.value.code == "invalid_request"


def test_mistral_s_client(door):
    answer = door.mistral.chat.complete(
        model="tiny", messages=TURNS, tools=TOOLS, tool_choice="any", parallel_tool_calls=False, max_tokens=4000,
        random_seed=3, temperature=1.0, reasoning_effort="none",
    )  # fmt: skip
    (choice,) = answer.choices
    assert choice.message.tool_calls[0].function.name in NAMES
    assert choice.finish_reason in ("tool_calls", "length")  # it cannot say what would bring it to an end


def test_a_batch(door, tmp_path):
    from cierzo.cli import main

    lines = [
        {"custom_id": "json", "body": {"response_format": {"type": "json_object"}}},
        {"custom_id": "call", "body": {"tools": TOOLS, "tool_choice": "required"}},
        {"custom_id": "refused", "body": {"structured_outputs": {"regex": "("}}},
    ]
    common = {"messages": TURNS, "max_tokens": 400, "seed": 1, "temperature": 1.0, **door.extra}
    with (tmp_path / "in.jsonl").open("wb") as file:
        for line in lines:
            line |= {"method": "POST", "url": "/v1/chat/completions", "body": common | line["body"]}
            file.write(msgspec.json.encode(line) + b"\n")
    status = main(["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--rpc", door.server.address])
    assert status == 1  # as one was refused
    told = {line["custom_id"]: line["response"] for line in map(json.loads, (tmp_path / "out.jsonl").open())}
    assert isinstance(json.loads(told["json"]["body"]["choices"][0]["message"]["content"]), dict)
    assert told["call"]["body"]["choices"][0]["message"]["tool_calls"][0]["function"]["name"] in NAMES
    assert (told["refused"]["status_code"], told["refused"]["body"]["error"]["param"]) == (
        400,
        "structured_outputs.regex",
    )
