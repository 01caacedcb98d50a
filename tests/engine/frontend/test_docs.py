"""docs/rpc.md names every message, field, code and limit there is, and its examples are what is sent."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from cierzo.engine import messages
from cierzo.engine.errors import BY_CODE
from cierzo.engine.expert_statistics import ExpertStatistics, StepBucket
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.conversation import MAX_TOOLS
from cierzo.engine.frontend.delta_cost import delta_cost
from cierzo.engine.frontend.frames import pack
from cierzo.engine.frontend.methods import FEATURE_OF
from cierzo.engine.frontend.wire_checks import FEATURE_OF_FIELD, FEATURE_OF_PARAMETER
from cierzo.engine.messages import ClientMessage, SamplingParams, ServerMessage

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "rpc.md").read_text(encoding="utf-8")
PARTS = (
    messages.Limits,
    messages.Usage,
    messages.Timings,
    messages.Cost,
    messages.SampleEnd,
    messages.Part,
    messages.CoreStats,
    ExpertStatistics,
    StepBucket,
)
TURNS = (messages.ChatMessage, messages.ToolCall, messages.Tool, messages.TextChunk, messages.ThinkingChunk)
STRUCTS = [*get_args(ClientMessage), *get_args(ServerMessage), *PARTS, *TURNS]


@pytest.mark.parametrize("struct", [*STRUCTS, SamplingParams], ids=lambda struct: struct.__name__)
def test_every_field_is_described(struct):
    missing = [name for name in struct.__struct_fields__ if f"`{name}`" not in TEXT]
    tag = struct.__struct_config__.tag
    assert not missing
    assert tag is None or f"`{tag}`" in TEXT


def test_every_code_and_limit_is_described():
    limits = set(FrontendConfig.__struct_fields__)
    internal = {"address", "retry_after_s", "inline_chars", "core_start_timeout_s"}
    assert not [name for name in (set(BY_CODE) | limits) - internal if f"`{name}`" not in TEXT]


def test_limits_without_a_setting_are_described():
    operations = (Path(__file__).resolve().parents[3] / "docs" / "operations.md").read_text(encoding="utf-8")
    assert f"call, {MAX_TOOLS} at most" in TEXT
    assert f"{MAX_TOOLS} `tools` of a request" in TEXT
    assert f"{MAX_TOOLS}, with names of 1 to 64 letters" in operations
    assert TEXT.count("1 to 64 of `a-z`, `A-Z`, `0-9`, `_` and `-`") == 2


def test_every_feature_is_described_with_what_belongs_to_it():
    rows = dict(
        re.findall(r"^\| `(\w+)` \| (.*?) \|", TEXT.split("**Features**")[1].split("## 3.")[0], re.MULTILINE)
    )
    assert sorted(rows) == sorted(messages.FEATURES)
    belongings = {kind.__struct_config__.tag: feature for kind, feature in FEATURE_OF.items()}
    belongings |= {"cost": "accounting", "accepted": "resume", "parts": "parts", "broken_calls": "parts"}
    belongings |= FEATURE_OF_FIELD | FEATURE_OF_PARAMETER
    assert not [name for name, feature in belongings.items() if f"`{name}`" not in rows[feature]]


def test_the_formula_of_a_delta_s_cost():
    pattern = (
        r"^(\d+) +\+ +(\d+) x tokens .*`logprobs`: (\d+) \+ (\d+) x its top ids\n"
        r" +\+ +for each of `parts`: (\d+) \+ bytes of its `text`, `name` and `id` in UTF-8$"
    )
    formula = re.search(pattern, TEXT, re.MULTILINE)
    base, token, entry, alternative, part = map(int, formula.groups())
    logprobs = [messages.TokenLogprobs(1, -1.0, [1, 2, 3], [-1.0, -2.0, -3.0])]
    delta = messages.Delta(stream=1, token_ids=[1, 2], text="é", logprobs=logprobs)
    without = base + 2 * token + 2 + entry + 3 * alternative
    assert delta_cost(delta) == without
    parts = [messages.Part(kind="text", text="é"), messages.Part(kind="call", text="{}", name="ñ", id="abc")]
    with_parts = messages.Delta(stream=1, token_ids=[1, 2], text="é", logprobs=logprobs, parts=parts)
    assert delta_cost(with_parts) == without + 2 * part + 2 + 2 + 2 + 3


EXAMPLES = re.findall(r"```\n((?:[0-9a-f]{2}[ \n])+)```\n```json\n(.*?)```", TEXT, re.DOTALL)
MESSAGES = [
    *("hello", "welcome", "generate", "accepted", "delta", "deltas", "final", "error", "credit", "resume"),
    *("cancel_request", "attach", "ping", "pong", "drain", "done"),
    *("tokenize", "tokenized", "detokenize", "detokenized"),
]


def test_the_messages_that_take_explaining_have_an_example():
    assert {json.loads(text)["type"] for _, text in EXAMPLES} == set(MESSAGES)
    assert TEXT.count("```json") == len(EXAMPLES)


@pytest.mark.parametrize(("frame", "text"), EXAMPLES, ids=[json.loads(text)["type"] for _, text in EXAMPLES])
def test_examples_are_what_is_sent(frame, text):
    message = msgspec.json.decode(text, type=ClientMessage | ServerMessage)  # bytes are base64 there
    assert bytes.fromhex(frame) == pack([message])


def test_the_attached_example_is_the_prompt_that_it_says():
    parts = [json.loads(text) for _, text in EXAMPLES]
    data = b"".join(
        base64.b64decode(part["data"]) for part in parts if part["type"] == "attach" and "image" not in part
    )
    prompt = re.search(r"prompt of this generation is `(.*?)`", TEXT).group(1)
    assert msgspec.msgpack.decode(data) == json.loads(prompt)
