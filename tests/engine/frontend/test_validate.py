"""Every parameter's limits: the last good value passes, the first bad one is named with field, limit and value."""

from __future__ import annotations

import math

import pytest
from msgspec.structs import replace

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend import validate
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.messages import ChatMessage, Generate, SamplingParams, ToolCall

CONFIG = FrontendConfig(max_samples=4, max_logprobs=5, max_stop_strings=2, max_stop_chars=3, max_stop_token_ids=2)
PLAIN = Generate(stream=1, token_ids=[1, 2, 3])
NAN, INF = math.nan, math.inf

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
        ({"token_ids": None, "messages": USER, "reasoning_effort": "huge"}, "reasoning_effort"),
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
    with pytest.raises(InvalidRequest, match="tokenizer"):
        validate.fields(message, CONFIG, replace(model_info, has_tokenizer=False))


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
        ("Object contains unknown field `x`", "unknown field x", "x", None),
        (
            "Object contains unknown field `x` - at `$.messages[0]`",
            "messages[0]: unknown field x",
            "messages[0].x",
            None,
        ),
        ("Object missing required field `stream`", "Object missing required field stream", None, None),
    ],
)
def test_what_msgspec_refuses_is_named(text, message, field, limit):
    refusal = validate.mistyped(text)
    assert (refusal.message, refusal.field, refusal.limit) == (message, field, limit)


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


def test_more_output_tokens_than_the_model_has_room_for_are_not_looked_at(model_info, monkeypatch):
    monkeypatch.setattr(validate, "_token_ids", lambda *_: pytest.fail("looked at"))
    with pytest.raises(InvalidRequest) as caught:
        validate.fields(replace(PLAIN, output_token_ids=[1] * 4097), CONFIG, model_info)
    assert (caught.value.field, caught.value.value) == ("output_token_ids", "4097")
    with pytest.raises(InvalidRequest, match="no room"):
        validate.request(PLAIN, [1] * 4096, 0, None, model_info)
