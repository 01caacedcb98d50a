"""Bodies of /v1/chat/completions, and what they ask of the engine."""

from __future__ import annotations

import json

import mistralai.client.models as mistral
import msgspec
import pytest
from gateway_rules import RULES, refusal
from openai.types.chat import ChatCompletionMessage

from cierzo.engine.errors import InvalidRequest, NotFound
from cierzo.engine.frontend.arguments import generate_message
from cierzo.engine.gateway.asked import in_body, read_chat
from cierzo.engine.messages import ChatMessage, SamplingParams, TextChunk, ThinkingChunk, Tool, ToolCall

HI = [{"role": "user", "content": "Hi"}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "3"}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture
def rules():
    return RULES


def read(rules, **body):
    return read_chat(json.dumps({"messages": HI, **body}).encode(), rules)


def text(words):
    return {"type": "text", "text": words}


def message(rules, **body):
    return generate_message(**read(rules, **body).arguments)


def test_a_plain_body(rules):
    asked = read(rules)
    assert asked.arguments == {"messages": HI, "max_tokens": 4096, "deltas": False}
    assert (asked.endpoint, asked.stream, asked.logprobs) == ("chat", False, None)
    assert asked.model == "mistral-small-latest"  # the first of its names
    assert asked.passed_over == ()
    assert asked.given == {"messages": HI}


def test_all_that_is_an_argument(rules):
    sampling = SamplingParams(
        max_tokens=9, min_tokens=2, temperature=0.5, top_k=4, top_p=0.5, min_p=0.1, repetition_penalty=1.5,
        presence_penalty=1.0, frequency_penalty=-1.0, logit_bias={5: 1.0, 17: -100.0}, seed=3, n=2, stop=("a", "b"),
        stop_token_ids=(7,), ignore_eos=True, allowed_token_ids=(5, 6), bad_words=("c",), max_thinking_tokens=8,
    )  # fmt: skip
    body = msgspec.structs.asdict(sampling) | {"logprobs": False}
    body["logit_bias"] = {"5": 1, "17": -100}
    more = {"priority": -1, "deadline_s": 5, "reasoning_effort": "high", "parallel_tool_calls": False}
    asked = message(rules, **body, **more, tool_choice="none", stream=True)
    assert asked.sampling == sampling
    assert (asked.priority, asked.deadline_s, asked.reasoning_effort) == (-1, 5.0, "high")
    assert (asked.parallel_tool_calls, asked.tool_choice, asked.deltas) == (False, "none", True)


@pytest.mark.parametrize(
    ("body", "name", "value"),
    [
        ({"max_completion_tokens": 7}, "max_tokens", 7),
        ({"max_completion_tokens": 7, "max_tokens": 7}, "max_tokens", 7),
        ({"random_seed": 7}, "seed", 7),
        ({"stop": "x"}, "stop", ("x",)),
        ({"top_k": -1}, "top_k", 0),
        ({"logprobs": True}, "logprobs", 0),
        ({"logprobs": True, "top_logprobs": 3}, "logprobs", 3),
        ({"logprobs": False, "top_logprobs": 0}, "logprobs", None),
        ({"temperature": None, "stop": None, "seed": None, "n": None, "logit_bias": None}, "temperature", 0.7),
    ],
)
def test_other_names_and_nulls(rules, body, name, value):
    assert getattr(message(rules, **body).sampling, name) == value


@pytest.mark.parametrize(
    ("body", "number"),
    [
        ({"prompt_logprobs": True}, 0),
        ({"prompt_logprobs": True, "top_prompt_logprobs": 2}, 2),
        ({"prompt_logprobs": 3}, 3),
        ({"prompt_logprobs": 0}, 0),
        ({"prompt_logprobs": False}, None),
        ({}, None),
    ],
)
def test_log_probabilities_of_the_prompt(rules, body, number):
    assert read(rules, **body).prompt_logprobs == number


def test_what_the_answer_is_to_be(rules):
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    body = {"stream_options": options, "return_tokens_as_token_ids": True, "model": "mistral-small-latest"}
    asked = read(rules, stream=True, **body)
    assert (asked.stream, asked.include_usage, asked.continuous_usage, asked.as_token_ids) == (True,) * 4
    assert asked.model == "mistral-small-latest"
    assert not asked.echo
    plain = read(rules, stream=True, model=None)
    assert (plain.include_usage, plain.continuous_usage, plain.as_token_ids) == (False,) * 3


def test_the_harmless_is_passed_over_and_named(rules):
    body = {"user": "u", "metadata": {"a": 1}, "store": False, "prompt_cache_key": "k", "service_tier": "auto"}
    asked = read(rules, **body, response_format={"type": "text"}, modalities=["text"], functions=[])
    assert set(asked.passed_over) == {"user", "metadata", "prompt_cache_key"}
    assert asked.arguments == {"messages": HI, "max_tokens": 4096, "deltas": False}


def test_a_lenient_server_passes_over_the_unknown_and_names_it(rules):
    lenient = msgspec.structs.replace(rules, lenient=True)
    asked = read(lenient, mirostat=2, messages=[HI[0] | {"mood": "good"}])
    assert sorted(asked.passed_over) == ["messages.mood", "mirostat"]
    assert asked.arguments["messages"] == HI
    with pytest.raises(InvalidRequest, match="structured_outputs has taken its place"):
        read(lenient, guided_regex="a+")


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": "Hi"}, "messages", "must be a list"),
        ({"messages": []}, "messages", "messages is empty"),
        ({"messages": ["Hi"]}, "messages[0]", "must be an object"),
        ({"messages": HI * 5000}, "messages", "allowed: 4096"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "developer"}]}, "messages[0].content", "missing"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'robot', allowed: system, user"),
        ({"messages": [{"role": 3, "content": "x"}]}, "messages[0].role", "expected str, got int"),
        ({"messages": [{"role": "user", "content": "x", "text": "y"}]}, "messages[0].text", "unknown field"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages[0].name", "role tool"),
        ({"messages": [*HI, {"role": "assistant", "refusal": "no"}]}, "messages[1].refusal", "judges no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "expected str"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "must be an object"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type", "is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "lang": "en"}]}]},
            "messages[0].content[0].lang",
            "unknown field",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages[0].content[0].image_url.url",
            "'http://x', allowed: data:image/...;base64,...; no address is fetched, no file opened",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
            "messages[0].content[0]",
            "a thought belongs to a turn of the role assistant or system",
        ),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages[0].content", "lone surrogate"),
        (
            {"messages": [*HI, {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]}]},
            "messages[1].tool_calls[0].function.arguments",
            "is missing",
        ),
        (
            {"messages": [*HI, {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}]},
            "messages[1].tool_calls[0].type",
            "'custom', allowed: function",
        ),
        (
            {"messages": [*HI, {"role": "assistant", "tool_calls": [CALL]}, *HI]},
            "messages[2]",
            "must be the result of a call",
        ),
        ({"messages": [*HI, RESULT | {"content": None}, {"role": "tool"}]}, "messages[2].content", "missing"),
        ({"tools": {}}, "tools", "must be a list"),
        ({"tools": [{"type": "function"}]}, "tools[0].function.name", "missing"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "1 to 64"),
        ({"tools": [{"type": "function", "function": FUNCTION}] * 2}, "tools[1].function.name", "there twice: f"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search', allowed: function"),
        ({"tools": [{"type": "connector"}]}, "tools[0].type", "no tools of its own"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
            "tools[0].function.parameters.type is 'array', allowed: object",
        ),
        ({"reasoning_effort": "medium"}, "reasoning_effort", "allowed: none, high"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0, allowed: at least 1"),
        ({"max_completion_tokens": "7"}, "max_completion_tokens", "max_completion_tokens: expected int, got str"),
        ({"max_tokens": 7, "max_completion_tokens": 8}, "max_completion_tokens", "say different things"),
        ({"max_tokens": 7.5}, "max_tokens", "max_tokens: expected int"),
        ({"random_seed": -1}, "random_seed", "random_seed is -1"),
        ({"seed": 1, "random_seed": 2}, "random_seed", "random_seed and seed say different things"),
        ({"seed": 10**30}, "seed", "allowed: -2"),
        ({"temperature": 101}, "temperature", "temperature is 101"),
        ({"temperature": "hot"}, "temperature", "temperature: expected float, got str"),
        ({"n": 17}, "n", "n is 17, allowed: 1 to 16"),
        ({"n": True}, "n", "expected int, got bool"),
        ({"stop": ["x", 3]}, "stop[1]", "expected str, got int"),
        ({"logit_bias": [5]}, "logit_bias", "expected object, got array"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "has the name 'x', allowed: token ids"),
        ({"logit_bias": {"5": 1, "05": 1}}, "logit_bias", "has the name '05'"),
        ({"logit_bias": {"\u0665": 1}}, "logit_bias", "allowed: token ids"),
        ({"logit_bias": {"1000": 1}}, "logit_bias", "token id 1000, outside the vocabulary"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]", "logit_bias[5] is 101"),
        ({"logprobs": 1}, "logprobs", "must be true or false"),
        ({"top_logprobs": 3}, "top_logprobs", "left out, unless logprobs is true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs is 21, allowed: 0 to 20"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs", "must be an integer"),
        ({"top_prompt_logprobs": 3}, "top_prompt_logprobs", "unless prompt_logprobs is true"),
        ({"prompt_logprobs": 3, "top_prompt_logprobs": 3}, "prompt_logprobs", "must be true or false"),
        ({"stream": 1}, "stream", "must be true or false"),
        ({"stream": True, "stream_options": 1}, "stream_options", "must be an object"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "left out, unless stream is true"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or false"),
        ({"stream": True, "stream_options": {"chunk": 1}}, "stream_options.chunk", "unknown field"),
        ({"model": 3}, "model", "must be a name"),
        ({"store": True}, "store", "stores no answers"),
        ({"service_tier": "priority"}, "service_tier", "one tier"),
        ({"verbosity": "low"}, "verbosity", 'it must be left out or "medium"'),
        ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm", "by requests alone"),
        ({"temprature": 1}, "temprature", "did you mean temperature"),
        ({"add_generation_prompt": False}, "add_generation_prompt", "opposite of continue_final_message"),
    ],
)  # fmt: skip
def test_what_is_refused(body, field, words):
    error = refusal(read, **body)
    assert error.field == field
    assert words in error.message
    assert "sampling." not in error.message


def test_another_model_is_not_found(rules):
    with pytest.raises(NotFound, match="there is no model 'gpt-5'; served: mistral-small-latest, small4") as caught:
        read(rules, model="gpt-5")
    assert (caught.value.field, caught.value.http_status) == ("model", 404)


# --- turns -----------------------------------------------------------------------------------------------------


def test_turns_of_every_role(rules):
    turns = [
        {"role": "system", "content": [text("Be brief.")]},
        *HI,
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL], "annotations": []},
        RESULT,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Aha."}, text("3")]},
        {"role": "user", "content": [text("a") | {"prompt_cache_breakpoint": {"mode": "explicit"}}]},
    ]
    asked = read(rules, messages=turns)
    assert generate_message(**asked.arguments).messages == [
        ChatMessage(role="system", content=[TextChunk(text="Be brief.")]),
        ChatMessage(role="user", content="Hi"),
        ChatMessage(
            role="assistant", reasoning="Hm.", tool_calls=[ToolCall(id="abcdefghi", name="f", arguments="{}")]
        ),
        ChatMessage(role="tool", tool_call_id="abcdefghi", content="3"),
        ChatMessage(role="assistant", content=[ThinkingChunk(thinking="Aha."), TextChunk(text="3")]),
        ChatMessage(role="user", content=[TextChunk(text="a")]),
    ]
    assert asked.passed_over == ("messages.annotations", "messages.content.prompt_cache_breakpoint")


def test_turns_are_counted_before_they_are_read(rules):
    few = msgspec.structs.replace(rules, max_turns=2)
    assert read(few, messages=HI * 2)
    with pytest.raises(InvalidRequest, match="messages has 3 entries, allowed: 2"):
        read(few, messages=["no turn"] * 3)


def test_a_developer_is_the_system(rules):
    turns = [{"role": "developer", "content": "Be brief."}, *HI]
    assert message(rules, messages=turns).messages[0] == ChatMessage(role="system", content="Be brief.")


def test_an_answer_of_openai_s_client_is_taken_back(rules):
    answer = ChatCompletionMessage.model_validate(
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [CALL]}
    )
    turns = [*HI, answer.model_dump(), RESULT]
    assert message(rules, messages=turns).messages[1].tool_calls == [
        ToolCall(id="abcdefghi", name="f", arguments="{}")
    ]


def test_a_body_of_mistral_s_client(rules):
    body = mistral.ChatCompletionRequest(
        model="small4",
        messages=[
            mistral.SystemMessage(content="Be brief."),
            mistral.UserMessage(content=[mistral.TextChunk(text="Hi")]),
            mistral.AssistantMessage(
                content=[mistral.ThinkChunk(thinking=[mistral.TextChunk(text="Hm")], closed=True)],
                tool_calls=[mistral.ToolCall(id="abcdefghi", function={"name": "f", "arguments": {"a": 1}})],
            ),
            mistral.ToolMessage(content="3", tool_call_id="abcdefghi", name="f"),
            mistral.AssistantMessage(content="So", prefix=True),
        ],
        tools=[mistral.Tool(function=mistral.Function(name="f", parameters={}))],
        random_seed=4,
        reasoning_effort="high",
        safe_prompt=False,
        tool_choice="auto",
    ).model_dump(by_alias=True)
    asked = generate_message(**read_chat(json.dumps(body).encode(), rules).arguments)
    assert asked.messages == [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content=[TextChunk(text="Hi")]),
        ChatMessage(
            role="assistant",
            content=[ThinkingChunk(thinking="Hm")],
            tool_calls=[ToolCall(id="abcdefghi", name="f", arguments='{"a": 1}')],
        ),
        ChatMessage(role="tool", content="3", tool_call_id="abcdefghi", name="f"),
        ChatMessage(role="assistant", content="So", prefix=True),
    ]
    assert (asked.tools, asked.sampling.seed, asked.reasoning_effort) == ([Tool(name="f")], 4, "high")


@pytest.mark.parametrize(
    "body",
    [
        {  # of a load generator that measures token by token
            "messages": [{"role": "user", "content": [text("Hi")]}],
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "max_completion_tokens": 9,
            "stop": None,
            "ignore_eos": True,
        },
        {  # of an evaluation harness, whose turns have a type
            "messages": [{"role": "user", "content": "Hi", "type": "text"}],
            "model": "small4",
            "max_tokens": 9,
            "temperature": 0,
            "stop": ["\n\n"],
            "seed": 1234,
        },
    ],
)
def test_bodies_of_tools_that_people_have(rules, body):
    asked = read(rules, **body)
    assert asked.passed_over == ()
    assert generate_message(**asked.arguments).sampling.max_tokens == 9


def test_tools(rules):
    tools = [{"type": "function", "function": FUNCTION | {"strict": False}}, {"function": {"name": "g"}}]
    assert message(rules, tools=tools).tools == [Tool(**FUNCTION), Tool(name="g")]


def test_the_last_turn_is_gone_on_with(rules):
    turns = [*HI, {"role": "assistant", "content": "So"}]
    asked = message(rules, messages=turns, continue_final_message=True, add_generation_prompt=False)
    assert asked.messages[-1] == ChatMessage(role="assistant", content="So", prefix=True)
    assert refusal(read, continue_final_message=True).field == "messages[0].prefix"
    assert refusal(read, continue_final_message=True, messages=[]).field == "messages"
    error = refusal(read, messages=turns, continue_final_message=True, add_generation_prompt=True)
    assert error.field == "add_generation_prompt"


def test_the_messages_of_an_error_are_the_callers_words(rules):
    """Names of the engine's fields are replaced where they stand alone, and not within words."""
    asked = read(rules, max_completion_tokens=5)
    error = InvalidRequest("max_tokens: no max_tokens_left in sampling.max_tokens", field="max_tokens")
    told = in_body(error, asked)
    assert told.message == "max_completion_tokens: no max_tokens_left in sampling.max_tokens"
    assert str(told) == told.message
    assert error.field == "max_tokens"
    unknown = InvalidRequest("nowhere", field="nowhere[3].x")
    assert in_body(unknown, asked) is unknown
    bare = InvalidRequest("bare")
    assert in_body(bare, asked) is bare
