"""Log-probabilities of the prompt: echo as evaluation harnesses ask for it, and vLLM's prompt_logprobs."""

from __future__ import annotations

import json

import openai
import pytest
from http_house import CHAT, events_of

from cierzo.engine.testing.fake_core import made_up_entry

PROMPT = [*b"abcd"]
ECHO = {"model": "fake", "prompt": "abcd", "echo": True, "logprobs": 2, "max_tokens": 1}


def _made_up():
    return [made_up_entry(place, token, 2).logprob for place, token in enumerate(PROMPT[1:])]


def test_echo_has_an_entry_for_each_token_and_one_more(either):
    with either("xyz").openai() as client:
        (choice,) = client.completions.create(**ECHO).choices
    told = choice.logprobs
    assert choice.text == "abcdx"
    assert told.tokens == ["a", "b", "c", "d", "x"]
    assert told.token_logprobs == [None, *_made_up(), -1.0]
    assert told.top_logprobs[0] is None
    assert told.text_offset == [0, 1, 2, 3, 4]
    for token, logprob, top in list(zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True))[1:]:
        assert top[token] == logprob
        assert len(top) >= 2


def test_echo_of_token_ids_and_of_several_prompts(either):
    with either("xyz").openai() as client:
        choices = client.completions.create(**ECHO | {"prompt": [PROMPT, [7, 8]], "n": 2}).choices
    assert [choice.text for choice in choices] == ["abcdx"] * 2 + ["\x07\x08x"] * 2
    assert [len(choice.logprobs.tokens) for choice in choices] == [5, 5, 3, 3]


def test_echo_without_an_answer(either):
    with either("xyz").openai() as client:
        (choice,) = client.completions.create(**ECHO | {"max_tokens": 0}).choices
    assert choice.text == "abcd"
    assert choice.logprobs.token_logprobs == [None, *_made_up()]


def test_echo_of_nothing_is_refused(either):
    with either("xyz").openai() as client, pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**ECHO | {"prompt": ""})
    assert refused.value.param == "prompt"


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_in_a_stream(either, max_tokens):
    with either("xyz").openai() as client:
        (whole,) = client.completions.create(**ECHO | {"max_tokens": max_tokens}).choices
        chunks = [*client.completions.create(**ECHO | {"max_tokens": max_tokens}, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [entry for each in told for entry in getattr(each, name)] == getattr(whole.logprobs, name)


def test_tokens_that_are_told_by_their_ids(either):
    with either("xyz").openai() as client:
        body = ECHO | {"extra_body": {"return_tokens_as_token_ids": True}}
        (choice,) = client.completions.create(**body).choices
    assert choice.logprobs.tokens == [f"token_id:{token}" for token in b"abcdx"]


def test_prompt_logprobs_beside_the_answer(either):
    house = either("xyz")
    (choice,) = house.post("/v1/completions", {"prompt": "abcd", "prompt_logprobs": 1, "max_tokens": 2}).json()[
        "choices"
    ]
    assert choice["prompt_logprobs"][0] is None
    assert len(choice["prompt_logprobs"]) == 4
    assert choice["prompt_logprobs"][1]["98"]["decoded_token"] == "b"
    assert choice["prompt_logprobs"][1]["98"]["logprob"] == _made_up()[0]
    chat = house.post("/v1/chat/completions", CHAT | {"prompt_logprobs": 0}).json()
    assert len(chat["prompt_logprobs"]) == len("[user]Hi")


def test_prompt_logprobs_in_a_stream_come_with_echo_alone(either):
    refused = either("x").post("/v1/completions", {"prompt": "abcd", "prompt_logprobs": 1, "stream": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")


def test_a_long_prompt_with_all_its_log_probabilities(opening):
    house = opening("x", max_model_len=400_000)
    prompt = "y" * 50_000
    told = house.post("/v1/completions", ECHO | {"prompt": prompt}, timeout=100).json()["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(prompt) + 1
    events = events_of(house.post("/v1/completions", ECHO | {"prompt": prompt, "stream": True}, timeout=100).text)
    found = [json.loads(event)["choices"][0].get("logprobs") for event in events[:-1]]
    assert sum(len(each["tokens"]) for each in found if each) == len(prompt) + 1


def test_more_than_an_answer_may_hold(opening):
    house = opening("x", max_model_len=400_000, http={"max_whole_bytes": 100_000})
    refused = house.post("/v1/completions", ECHO | {"prompt": "y" * 5000}, timeout=100)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_whole_bytes")
