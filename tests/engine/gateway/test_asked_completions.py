"""Bodies of /v1/completions and /v1/fim/completions."""

from __future__ import annotations

import json

import mistralai.client.models as mistral
import msgspec
import pytest
from gateway_rules import RULES

from cierzo.engine.errors import InvalidRequest, NotFound
from cierzo.engine.frontend.arguments import generate_message
from cierzo.engine.gateway.asked import in_body, read_completions, read_fim


@pytest.fixture
def rules():
    return RULES


def read(rules, prompt="Hi", **body):
    return read_completions(json.dumps({"prompt": prompt, **body}).encode(), rules)


def fim(rules, **body):
    return read_fim(json.dumps(body).encode(), rules)


def test_a_text(rules):
    (asked,) = read(rules)
    assert asked.arguments == {"text": "Hi", "max_tokens": 16, "deltas": False}
    assert (asked.endpoint, asked.echo, asked.drops_output) == ("completions", False, False)
    assert asked.model == "mistral-small-latest"  # the first of its names


@pytest.mark.parametrize(
    ("prompt", "argument", "prompts", "places"),
    [
        ("", "text", [""], ["prompt"]),
        ([1, 2], "token_ids", [[1, 2]], ["prompt"]),
        (["a"], "text", ["a"], ["prompt[0]"]),
        (["a", "b"], "text", ["a", "b"], ["prompt[0]", "prompt[1]"]),
        ([[1], [2, 3]], "token_ids", [[1], [2, 3]], ["prompt[0]", "prompt[1]"]),
    ],
)
def test_prompts_of_every_kind(rules, prompt, argument, prompts, places):
    asked = read(rules, prompt, temperature=0)
    assert [one.arguments[argument] for one in asked] == prompts
    assert [one.arguments["temperature"] for one in asked] == [0] * len(prompts)
    for one, place in zip(asked, places, strict=True):
        error = InvalidRequest(f"{argument} is too long for a context of {argument}s", field=argument)
        assert in_body(error, one).field == place
        assert in_body(error, one).message == f"{place} is too long for a context of {argument}s"


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (None, "prompt"),
        ([], "prompt"),
        (3, "prompt"),
        ({"a": 1}, "prompt"),
        ([True], "prompt"),
        ([1.0], "prompt"),
        ([None], "prompt"),
        (["a", [1]], "prompt"),
        (["a", 1], "prompt"),
        ([[1], []], "prompt[1]"),
        ([[1], ["a"]], "prompt[1]"),
        ([[1], [[2]]], "prompt[1]"),
        ([[True]], "prompt[0]"),
    ],
)
def test_what_is_no_prompt(rules, prompt, field):
    with pytest.raises(InvalidRequest, match="prompt") as caught:
        read(rules, prompt)
    assert caught.value.field == field


def test_prompts_are_counted(rules):
    few = msgspec.structs.replace(rules, max_prompts=2)
    assert len(read(few, ["a", "b"])) == 2
    assert len(read(few, list(range(3)))) == 1
    for prompt in (["a"] * 3, [[1]] * 3):
        with pytest.raises(InvalidRequest, match="prompt has 3 entries, allowed: 2"):
            read(few, prompt)


def test_log_probabilities_and_echo(rules):
    """As lm-eval asks for them: those of the prompt, and of one more token."""
    (asked,) = read(rules, [5, 6, 7], echo=True, logprobs=1, max_tokens=1, temperature=0.0)
    assert (asked.echo, asked.logprobs, asked.prompt_logprobs, asked.drops_output) == (True, 1, 1, False)
    (asked,) = read(rules, echo=True, logprobs=0, max_tokens=0)
    assert (asked.logprobs, asked.prompt_logprobs, asked.drops_output) == (0, 0, True)
    assert asked.arguments["max_tokens"] == 1
    (asked,) = read(rules, echo=True)
    assert (asked.echo, asked.logprobs, asked.prompt_logprobs) == (True, None, None)
    wrong = InvalidRequest("sampling.prompt_logprobs is 99", field="sampling.prompt_logprobs")
    (asked,) = read(rules, echo=True, logprobs=99)
    assert in_body(wrong, asked).message == "logprobs is 99"
    (asked,) = read(rules, echo=True, logprobs=1, prompt_logprobs=99)
    assert asked.prompt_logprobs == 99
    assert in_body(wrong, asked).message == "prompt_logprobs is 99"
    (asked,) = read(rules, logprobs=5, prompt_logprobs=2)
    assert (asked.echo, asked.logprobs, asked.prompt_logprobs) == (False, 5, 2)


def test_a_suffix(rules):
    (asked,) = read(rules, suffix="b")
    assert generate_message(**asked.arguments).suffix == "b"


def test_the_answers_share_what_is_passed_over(rules):
    for asked in read(rules, ["a", "b"], user="u", stream=True, stream_options={"include_usage": True}):
        assert asked.passed_over == ("user",)
        assert asked.stream
        assert asked.include_usage
        assert asked.arguments["deltas"] is True


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"echo": 1}, "echo", "must be true or false"),
        ({"echo": True, "suffix": "b"}, "echo", "false, with suffix"),
        ({"best_of": 2}, "best_of", "answers are not ranked"),
        ({"add_special_tokens": False}, "add_special_tokens", "taken as they are"),
        ({"messages": []}, "messages", "unknown field messages"),
    ],
)
def test_what_is_refused(rules, body, field, words):
    with pytest.raises(InvalidRequest, match=words) as caught:
        read(rules, **body)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"max_tokens": "x"}, "max_tokens", "max_tokens: expected int, got str"),
        ({"max_tokens": False, "echo": True}, "max_tokens", "expected int, got bool"),
        ({"logprobs": True}, "logprobs", "expected int"),
        ({"suffix": 3}, "suffix", "expected str"),
        ({"prompt": [1, 2**70]}, "prompt", "allowed: -2"),
    ],
)
def test_what_a_generation_refuses_has_the_body_s_names(rules, body, field, words):
    (asked,) = read(rules, **body)
    with pytest.raises(InvalidRequest) as caught:
        generate_message(**asked.arguments)
    told = in_body(caught.value, asked)
    assert told.field == field
    assert words in told.message


def test_a_body_of_mistral_s_fim(rules):
    body = mistral.FIMCompletionRequest(
        model="small4", prompt="def f(", suffix="return 1", random_seed=3, min_tokens=2, stop=["\n"], metadata={}
    ).model_dump(by_alias=True)
    asked = fim(rules, **body)
    message = generate_message(**asked.arguments)
    assert (message.text, message.suffix) == ("def f(", "return 1")
    assert (message.sampling.seed, message.sampling.min_tokens, message.sampling.stop) == (3, 2, ("\n",))
    assert message.sampling.max_tokens == 4096
    assert (asked.endpoint, asked.passed_over) == ("fim", ("metadata",))
    assert "suffix" not in fim(rules, prompt="a").arguments


def test_what_is_no_fim(rules):
    wrong = [({}, "prompt is missing"), ({"prompt": ["a"]}, "must be a text"), ({"logprobs": 1}, "unknown")]
    for body, words in wrong:
        with pytest.raises(InvalidRequest, match=words):
            fim(rules, **body)
    with pytest.raises(NotFound):
        fim(rules, prompt="a", model="codestral")
    asked = fim(rules, prompt="a", random_seed="x")
    with pytest.raises(InvalidRequest) as caught:
        generate_message(**asked.arguments)
    assert in_body(caught.value, asked).field == "random_seed"
