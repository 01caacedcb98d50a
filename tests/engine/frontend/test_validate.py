"""Every parameter's limits: the last good value passes, the first bad one is named with field, limit and value."""

from __future__ import annotations

import math

import msgspec
import pytest
from msgspec.structs import replace

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend import validate, wire_checks
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.conversation import MAX_TOOLS
from cierzo.engine.frontend.frames import UNDECODABLE
from cierzo.engine.messages import (
    ChatMessage,
    Generate,
    SamplingParams,
    TextChunk,
    ThinkingChunk,
    Tool,
    ToolCall,
)

CONFIG = FrontendConfig(max_samples=4, max_logprobs=5, max_stop_strings=2, max_stop_chars=3, max_stop_token_ids=2)
PLAIN = Generate(stream=1, token_ids=[1, 2, 3])
NAN, INF = math.nan, math.inf
DEEP: dict = {}
for _ in range(100_000):
    DEEP = {"properties": DEEP}

SAMPLING = {
    "max_tokens": ([1, 10**12], [0, -1]),
    "min_tokens": ([0, 256], [-1, 257]),
    "temperature": ([0, 0.001, 100], [-0.1, 0.0001, 100.1, NAN, INF, -INF]),
    "top_k": ([0, 300], [-1, 301]),
    "top_p": ([0.01, 1], [0, -0.5, 1.01, NAN, INF]),
    "min_p": ([0, 1], [-0.1, 1.1, NAN]),
    "repetition_penalty": ([0.01, 100], [0, -1, 101, NAN, INF]),
    "presence_penalty": ([-2, 2], [-2.1, 2.1, NAN]),
    "frequency_penalty": ([-2, 2], [-2.1, 2.1, NAN, -INF]),
    "n": ([1, 4], [0, -1, 5]),
    "seed": ([0, 2**63 - 1, None], [-1, 2**63]),
    "logprobs": ([0, 5, None], [-1, 6]),
    "stop_token_ids": ([(), (0, 299)], [(300,), (-1,), (1, 2, 3)]),
    "logit_bias": ([{}, {299: -100.0, 0: 100.0}], [{300: 1.0}, {-1: 1.0}, dict.fromkeys(range(1025), 0.0)]),
    "stop": ([(), ("abc", "d")], [("a", "b", "c")]),
}
SAMPLING_CASES = [(name, value, ok) for name, (good, bad) in SAMPLING.items() for ok in (True, False) for value in
                  (good if ok else bad)]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "ok"), SAMPLING_CASES)
def test_sampling_parameters(model_info, name, value, ok):
    message = replace(PLAIN, sampling=SamplingParams(**{name: value}))
    if ok:
        validate.fields(message, CONFIG, model_info)
        return
    with pytest.raises(InvalidRequest) as caught:
        validate.fields(message, CONFIG, model_info)
    assert caught.value.field == f"sampling.{name}"
    assert caught.value.limit is not None
    assert caught.value.value is not None


@pytest.mark.parametrize(
    ("field", "sampling"),
    [
        ("sampling.logit_bias[7]", {"logit_bias": {7: NAN}}),
        ("sampling.logit_bias[7]", {"logit_bias": {7: 100.5}}),
        ("sampling.stop[1]", {"stop": ("a", "")}),
        ("sampling.stop[0]", {"stop": ("abcd",)}),
    ],
)
def test_entries_of_collections(model_info, field, sampling):
    with pytest.raises(InvalidRequest) as caught:
        validate.fields(replace(PLAIN, sampling=SamplingParams(**sampling)), CONFIG, model_info)
    assert caught.value.field == field


USER = [ChatMessage(role="user", content="Hi")]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"token_ids": None}, "text"),
        ({"text": "x"}, "token_ids"),
        ({"messages": USER}, "token_ids"),
        ({"token_ids": None, "messages": []}, "messages"),
        ({"token_ids": None, "messages": [*USER, ChatMessage(role="robot")]}, "messages[1].role"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"priority": 101}, "priority"),
        ({"priority": -101}, "priority"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"deadline_s": NAN}, "deadline_s"),
        ({"deadline_s": INF}, "deadline_s"),
        ({"deadline_s": 86_401.0}, "deadline_s"),
        ({"output_token_ids": [300]}, "output_token_ids"),
        ({"output_token_ids": [1]}, "sampling.seed"),
        ({"output_token_ids": [1], "sampling": SamplingParams(seed=1, n=2)}, "sampling.n"),
        ({"output_token_ids": [1, 2], "sampling": SamplingParams(seed=1, max_tokens=2)}, "output_token_ids"),
        ({"output_token_ids": [1, 257], "sampling": SamplingParams(seed=1)}, "output_token_ids"),
    ],
)
def test_the_other_fields(model_info, changes, field):
    with pytest.raises(InvalidRequest) as caught:
        validate.fields(replace(PLAIN, **changes), CONFIG, model_info)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"token_ids": None, "text": ""},
        {"token_ids": None, "messages": USER, "reasoning_effort": "none"},
        {"priority": -100, "deadline_s": 86_400.0},
        {"output_token_ids": [1, 2], "sampling": SamplingParams(temperature=0)},
        {"output_token_ids": [1, 257], "sampling": SamplingParams(seed=1, ignore_eos=True)},
    ],
)
def test_good_requests_pass(model_info, changes):
    validate.fields(replace(PLAIN, **changes), CONFIG, model_info)


def test_stop_strings_need_a_tokenizer(model_info):
    message = replace(PLAIN, sampling=SamplingParams(stop=("x",)))
    with pytest.raises(InvalidRequest, match="tokenizer") as caught:
        validate.fields(message, CONFIG, replace(model_info, has_tokenizer=False))
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("sampling.stop", "left out", "x")


SPECIAL = {"<s>": 256, "</s>": 257, "<far>": 300}


def test_stop_strings_that_are_special_tokens_become_stop_tokens(model_info):
    """Beyond the limit on stop_token_ids if need be; what the model cannot say is none."""
    params = SamplingParams(stop=("<s>", "x", "<far>", "</s>"), stop_token_ids=(7, 257))
    message = replace(PLAIN, sampling=params)
    validate.fields(message, FrontendConfig(max_stop_token_ids=2), model_info, SPECIAL)
    sampling = validate.request(message, [1], 1, 1, model_info, SPECIAL).sampling
    assert (sampling.stop, sampling.stop_token_ids) == (params.stop, (7, 257, 256))
    assert validate.request(message, [1], 1, 1, model_info).sampling.stop_token_ids == (7, 257)


@pytest.mark.parametrize("string", ["a<s>", "<s>a", "</s><s>", "<far> "])
def test_stop_strings_with_a_special_token_inside(model_info, string):
    message = replace(PLAIN, sampling=SamplingParams(stop=("<s>", string)))
    with pytest.raises(InvalidRequest, match="can never be found") as caught:
        validate.fields(message, FrontendConfig(), model_info, SPECIAL)
    assert (caught.value.field, caught.value.value) == ("sampling.stop[1]", string)
    validate.fields(message, FrontendConfig(), model_info)


def test_the_request_carries_the_seed_and_what_room_there_is(model_info):
    message = replace(PLAIN, sampling=SamplingParams(max_tokens=5000), priority=2)
    submit = validate.request(message, [7] * 4000, 11, 99, model_info)
    assert (submit.request_id, submit.sampling.seed, submit.sampling.max_tokens) == (11, 99, 96)
    assert (submit.priority, len(submit.prompt_token_ids)) == (2, 4000)
    assert validate.request(PLAIN, [7] * 4095, 1, 1, model_info).sampling.max_tokens == 1


@pytest.mark.parametrize(
    ("changes", "prompt", "limit", "value"),
    [
        ({}, [], "at least 1 token", "0"),
        ({}, [1, 300], "0 to 299", "300"),
        ({}, [-1, 5], "0 to 299", "-1"),
        ({}, [1] * 4096, "4095", "4096"),
        ({"output_token_ids": [1] * 10}, [1] * 4086, "4085", "4086"),
    ],
)
def test_bad_prompts(model_info, changes, prompt, limit, value):
    with pytest.raises(InvalidRequest) as caught:
        validate.request(replace(PLAIN, **changes), prompt, 1, 1, model_info)
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("token_ids", limit, value)


def test_the_limit_of_temperature_names_zero_too(model_info):
    with pytest.raises(InvalidRequest, match=r"allowed: 0, or 0.001 to 100"):
        validate.fields(replace(PLAIN, sampling=SamplingParams(temperature=-1)), CONFIG, model_info)


@pytest.mark.parametrize(
    ("text", "message", "field", "limit"),
    [
        (
            "Expected `int`, got `str` - at `$.sampling.top_k`",
            "sampling.top_k: expected int, got str",
            "sampling.top_k",
            "int",
        ),
        (
            "Expected `str | null`, got `int` - at `$.text`",
            "text: expected str | null, got int",
            "text",
            "str | null",
        ),
        (
            "Expected `int`, got `str` - at `key` in `$.sampling.logit_bias`",
            "sampling.logit_bias: expected int, got str",
            "sampling.logit_bias",
            "int",
        ),
        ("Object contains unknown field `x`", "unknown field x", "x", "left out"),
        (
            "Object contains unknown field `x` - at `$.messages[0]`",
            "messages[0]: unknown field x",
            "messages[0].x",
            "left out",
        ),
        ("Object missing required field `stream`", "stream is missing", "stream", "needed"),
    ],
)
def test_what_msgspec_refuses_is_named(text, message, field, limit):
    refusal = wire_checks.mistyped(text)
    assert (refusal.message, refusal.field, refusal.limit) == (message, field, limit)


@pytest.mark.parametrize(
    ("said", "field", "limit", "value"),
    [
        ({"suffix": 3}, "suffix", "str | null", "3"),
        ({"sampling": {"max_thinking_tokens": 1.5}}, "sampling.max_thinking_tokens", "int | null", "1.5"),
        ({"token_ids": [1, None]}, "token_ids[1]", "int", "null"),
        ({"text": b"ab"}, "text", "str | null", "b'ab'"),
        ({"text": ["x" * 60]}, "text", "str | null", "1 entries"),
        ({"deltas": "x" * 60}, "deltas", "bool", "x" * 50 + "..."),
        ({"lora": "mine"}, "lora", "left out", "mine"),
        ({"sampling": {"best_of": 3}}, "sampling.best_of", "left out", "3"),
        ({"foo": {"a": 1}}, "foo", "left out", "{'a': 1}"),
        ({"tools": [{"name": "f"}, {}]}, "tools[1].name", "needed", "left out"),
        ({"tools": [{"name": "f", "type": "function"}]}, "tools[0].type", "left out", "function"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].name", "needed",
         "left out"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages[0].content[0].type", "needed",
         "left out"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0].type",
         "text, thinking, image", "audio"),
        ({"tools": [{"name": "f", "parameters": DEEP}]}, "tools", "a few hundred levels", "more levels"),
        ({"foo": "x" * 2**16}, "foo", "left out", None),
    ],
)  # fmt: skip
def test_what_is_wrong_on_the_wire_is_named(said, field, limit, value):
    message = {"type": "generate", "stream": 1, **said}
    if said.get("tools") and value == "more levels":  # too deep for an encoder
        levels = b"\x81\xa1a" * 100_000 + b"\x80"
        whole = msgspec.msgpack.encode({**message, "tools": [{"name": "f", "parameters": {}}]})
        body = whole.replace(b"\xaaparameters\x80", b"\xaaparameters" + levels)
    else:
        body = msgspec.msgpack.encode(message)
    with pytest.raises(UNDECODABLE) as refused:
        msgspec.msgpack.decode(body, type=Generate)
    refusal = wire_checks.undecodable(refused.value, body)
    assert (refusal.field, refusal.limit, refusal.value) == (field, limit, value)
    assert field.rpartition(".")[2] in refusal.message or "no " in refusal.message


PLAIN_TURN = ChatMessage(role="user", content="a")


@pytest.mark.parametrize(
    ("fields", "feature", "field", "value"),
    [
        ({"suffix": "b"}, "parts", "suffix", "b"),
        ({"tool_choice": "none"}, "parts", "tool_choice", "none"),
        ({"parallel_tool_calls": False}, "parts", "parallel_tool_calls", "False"),
        ({"messages": [ChatMessage(role="assistant", prefix=True)]}, "parts", "messages[0].prefix", "True"),
        ({"messages": [PLAIN_TURN, ChatMessage(role="tool", name="f")]}, "parts", "messages[1].name", "f"),
        ({"messages": [ChatMessage(role="user", content=[])]}, "parts", "messages[0].content", "a list"),
        ({"sampling": SamplingParams(max_thinking_tokens=3)}, "parts", "sampling.max_thinking_tokens", "3"),
        ({"sampling": SamplingParams(bad_words=("a",))}, "masks", "sampling.bad_words", "('a',)"),
        ({"idempotency_key": "secret"}, "resume", "idempotency_key", "given"),
    ],
)
def test_what_needs_a_feature_is_named_with_its_value(fields, feature, field, value):
    with pytest.raises(InvalidRequest) as caught:
        wire_checks.features(Generate(stream=1, **fields), frozenset())
    limit = f"with the feature {feature}"
    assert (caught.value.field, caught.value.limit, caught.value.value) == (field, limit, value)


def test_the_number_that_json_lacks_is_told(model_info):
    for number, value in ((INF, "inf"), (NAN, "nan"), (b"x", "b'x'")):
        parameters = {"properties": {"a": {"enum": [1, "a", None, number]}}}
        with pytest.raises(InvalidRequest) as caught:
            validate.fields(_chat(tools=[Tool(name="f", parameters=parameters)]), CONFIG, model_info)
        assert (caught.value.field, caught.value.value) == ("tools[0].parameters", value)


def test_turns_and_calls_of_a_chat_are_counted(model_info):
    config = FrontendConfig(max_turns=2)
    call = ToolCall(name="f", arguments="")
    turn = ChatMessage(role="assistant", tool_calls=[call])
    chat = Generate(stream=1, messages=[turn, turn])
    validate.fields(chat, config, model_info)
    longer = replace(turn, tool_calls=[call, call])
    for messages, field in (([turn] * 3, "messages"), ([turn, longer], "messages.tool_calls")):
        with pytest.raises(InvalidRequest) as caught:
            validate.fields(replace(chat, messages=messages), config, model_info)
        assert (caught.value.field, caught.value.limit, caught.value.value) == (field, "2", "3")


def _chat(*turns, **fields):
    return Generate(stream=1, messages=[ChatMessage(role="user", content="Hi"), *turns], **fields)


def _said(**fields):
    return ChatMessage(role="assistant", **fields)


def _result(tool_call_id="", **fields):
    return ChatMessage(role="tool", tool_call_id=tool_call_id, **fields)


CALLS = _said(tool_calls=[ToolCall(name="f", arguments="{}", id=each) for each in ("aaaaaaaaa", "bbbbbbbbb")])
OPEN = ThinkingChunk(thinking="x", closed=False)
GOOD_CHATS = {
    "chunks": _chat(_said(content=[ThinkingChunk(thinking="x"), TextChunk(text="a")])),
    "chunks of a user": _chat(ChatMessage(role="user", content=[TextChunk(text="a"), TextChunk(text="b")])),
    "a thought of the system": _chat(ChatMessage(role="system", content=[ThinkingChunk(thinking="x")])),
    "a prefix": _chat(_said(content="a", prefix=True)),
    "an open thought": _chat(_said(content=[OPEN], prefix=True)),
    "results in another order": _chat(CALLS, _result("bbbbbbbbb", name="f"), _result("aaaaaaaaa")),
    "results without ids": _chat(CALLS, _result(), _result()),
    "calls without ids": _chat(_said(tool_calls=[ToolCall(name="f", arguments="")]), _result("zzz")),
    "a result alone": _chat(_result("zzz")),
    "two rounds": _chat(CALLS, _result("aaaaaaaaa"), _result("bbbbbbbbb"), CALLS, _result(), _result(), _said()),
    "tools": _chat(tools=[Tool(name="f"), Tool(name="a-B_9" * 12, parameters={"type": "object"})]),
    "no choice": _chat(tools=[Tool(name="f")], tool_choice="none", parallel_tool_calls=False),
    "tools of attached messages": Generate(stream=1, attached="messages", tools=[Tool(name="f")]),
    "a suffix": Generate(stream=1, text="a", suffix=""),
    "a suffix of an attached text": Generate(stream=1, attached="text", suffix="b"),
}
NOT_NAMES = ["", " ", "a b", "a.b", "é", "f\n", "a" * 65, "<tool_call>"]
BAD_CHATS = {
    "a thought of a user": (
        _chat(ChatMessage(role="user", content=[TextChunk(text="a"), ThinkingChunk(thinking="x")])),
        "messages[1].content[1]",
    ),
    "a thought of a tool": (_chat(_result(content=[ThinkingChunk(thinking="x")])), "messages[1].content[0]"),
    "an open thought without prefix": (_chat(_said(content=[OPEN])), "messages[1].content[0].closed"),
    "an open thought before a text": (
        _chat(_said(content=[OPEN, TextChunk(text="a")], prefix=True)),
        "messages[1].content[0].closed",
    ),
    "an open thought before the end": (_chat(_said(content=[OPEN]), _said()), "messages[1].content[0].closed"),
    "a prefix before the end": (_chat(_said(prefix=True), _said()), "messages[1].prefix"),
    "a prefix of a user": (_chat(ChatMessage(role="user", prefix=True)), "messages[1].prefix"),
    "a prefix with calls": (_chat(replace(CALLS, prefix=True)), "messages[1].prefix"),
    "calls of a user": (
        _chat(ChatMessage(role="user", tool_calls=CALLS.tool_calls)),
        "messages[1].tool_calls",
    ),
    "reasoning of a user": (_chat(ChatMessage(role="user", reasoning="x")), "messages[1].reasoning"),
    "an id of an assistant": (_chat(_said(tool_call_id="x")), "messages[1].tool_call_id"),
    "a name of a user": (_chat(ChatMessage(role="user", name="x")), "messages[1].name"),
    "an id twice": (
        _chat(_said(tool_calls=[*CALLS.tool_calls, CALLS.tool_calls[0]]), _result("aaaaaaaaa")),
        "messages[1].tool_calls[2].id",
    ),
    "a result of no call": (_chat(CALLS, _result("ccccccccc")), "messages[2].tool_call_id"),
    "a result of an earlier round": (
        _chat(CALLS, _result(), _result(), _said(tool_calls=[ToolCall(name="f", arguments="", id="c")]),
              _result("aaaaaaaaa")),
        "messages[5].tool_call_id",
    ),
    "a result twice": (_chat(CALLS, _result("aaaaaaaaa"), _result("aaaaaaaaa")), "messages[3].tool_call_id"),
    "a call without its result": (_chat(CALLS, _result("aaaaaaaaa")), "messages[3]"),
    "a result that is missing": (_chat(CALLS, _result("aaaaaaaaa"), _said()), "messages[3]"),
    "calls without results": (_chat(CALLS, ChatMessage(role="user")), "messages[2]"),
    "too many chunks": (
        _chat(*[ChatMessage(role="user", content=[TextChunk(text="")] * 5)] * 2),
        "messages.content",
    ),
    "a tool twice": (_chat(tools=[Tool(name="f"), Tool(name="g"), Tool(name="f")]), "tools[2].name"),
    "too many tools": (_chat(tools=[Tool(name=f"f{n}") for n in range(MAX_TOOLS + 1)]), "tools"),
    "parameters that are no object": (
        _chat(tools=[Tool(name="f", parameters={"type": "array"})]),
        "tools[0].parameters",
    ),
    "parameters that are no JSON": (
        _chat(tools=[Tool(name="f"), Tool(name="g", parameters={"enum": [b"x"]})]),
        "tools[1].parameters",
    ),
    "a number that JSON lacks": (
        _chat(tools=[Tool(name="f", parameters={"maximum": INF})]),
        "tools[0].parameters",
    ),
    "parameters that are nested too deeply": (
        _chat(tools=[Tool(name="f", parameters=DEEP)]),
        "tools[0].parameters",
    ),
    "an effort of a text": (Generate(stream=1, text="a", reasoning_effort="high"), "reasoning_effort"),
    "tools of a text": (Generate(stream=1, text="a", tools=[Tool(name="f")]), "tools"),
    "calls of no tools": (_chat(tool_choice="required"), "tool_choice"),
    "a tool by another name": (_chat(tools=[Tool(name="f")], tool_choice="g"), "tool_choice"),
    "a suffix of messages": (_chat(suffix="b"), "suffix"),
    "a suffix of ids": (Generate(stream=1, token_ids=[1], suffix="b"), "suffix"),
    **{f"a tool named {name[:9]!r}": (_chat(tools=[Tool(name=name)]), "tools[0].name") for name in NOT_NAMES},
}  # fmt: skip


@pytest.mark.parametrize("message", GOOD_CHATS.values(), ids=GOOD_CHATS)
def test_good_conversations_pass(model_info, message):
    validate.fields(message, FrontendConfig(max_turns=9), model_info)


@pytest.mark.parametrize(("message", "field"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_what_is_wrong_with_a_conversation_is_named(model_info, message, field):
    with pytest.raises(InvalidRequest) as caught:
        validate.fields(message, FrontendConfig(max_turns=9), model_info)
    assert caught.value.field == field
    assert field.partition("[")[0] in caught.value.message
    assert caught.value.limit
    assert caught.value.value is not None


@pytest.mark.parametrize("efforts", [("none", "high"), ()])
def test_an_effort_that_the_model_does_not_know_is_refused(model_info, efforts):
    for effort in ("none", "low", "high", "x" * 100):
        message = _chat(reasoning_effort=effort)
        if effort in efforts:
            validate.fields(message, CONFIG, model_info, efforts=efforts)
            continue
        with pytest.raises(InvalidRequest, match="reasoning_effort") as caught:
            validate.fields(message, CONFIG, model_info, efforts=efforts)
        assert (caught.value.field, caught.value.value) == ("reasoning_effort", effort)
        assert caught.value.limit == (", ".join(efforts) or "left out")
        assert len(caught.value.message) < 200


def test_ids_that_stand_for_an_image_are_refused(model_info):
    for image_ids, refused in (((), False), ({9}, False), ({2, 9}, True)):
        if not refused:
            assert validate.request(PLAIN, [1, 2, 3], 1, 1, model_info, image_token_ids=image_ids)
            continue
        with pytest.raises(InvalidRequest, match=r"token_ids\[1\] is 2, which stands for an image") as caught:
            validate.request(PLAIN, [1, 2, 3], 1, 1, model_info, image_token_ids=image_ids)
        assert (caught.value.field, caught.value.value) == ("token_ids", "2")
    chat = _chat()  # what a template writes is its own affair
    assert validate.request(chat, [1, 2, 3], 1, 1, model_info, image_token_ids={2})


def test_a_prefix_belongs_to_the_feature_of_parts():
    message = _chat(_said(content="a", prefix=True))
    wire_checks.features(message, frozenset({"parts"}))
    with pytest.raises(InvalidRequest, match="feature parts") as caught:
        wire_checks.features(message, frozenset({"masks"}))
    assert caught.value.field == "messages[1].prefix"


def test_more_output_tokens_than_the_model_has_room_for_are_not_looked_at(model_info, monkeypatch):
    monkeypatch.setattr(validate, "token_ids", lambda *_: pytest.fail("looked at"))
    with pytest.raises(InvalidRequest) as caught:
        validate.fields(replace(PLAIN, output_token_ids=[1] * 4097), CONFIG, model_info)
    assert (caught.value.field, caught.value.value) == ("output_token_ids", "4097")
    with pytest.raises(InvalidRequest, match="no room"):
        validate.request(PLAIN, [1] * 4096, 0, None, model_info)
