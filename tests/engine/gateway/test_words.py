"""Bodies and answers of /tokenize, /detokenize and /tokenizer_info, against the real front end of a fake server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import pytest

from cierzo.engine.errors import InvalidRequest, NotFound
from cierzo.engine.frontend.client import Client
from cierzo.engine.gateway.reading import Rules
from cierzo.engine.gateway.token_words import TokenWords
from cierzo.engine.gateway.words import Told, detokenize, tokenize, tokenizer_info
from cierzo.engine.testing.words import EOS, ID_OF
from cierzo.testing import FakeServer

USER = [{"role": "user", "content": "hi"}]
CALLED = [
    *USER,
    {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "1"},
]


@pytest.fixture
def ask():
    """Have a body answered; it may be an object, or its bytes."""

    def asked(function: Any, body: Any = None, **rules: Any) -> Told:
        async def within(server: FakeServer) -> Told:
            async with await Client.connect(server.address) as client:
                if function is tokenizer_info:
                    return await function(client)
                held = Rules(model=await client.model_info(), **rules)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                more = [TokenWords()] if function is tokenize else []
                answer: Coroutine[Any, Any, Told] = function(data, held, client, *more)
                return await answer

        with FakeServer("") as server:
            return asyncio.run(within(server))

    return asked


def test_a_prompt_as_lm_eval_asks_for_it(ask) -> None:
    """It learns the id of a control token by asking for the tokens of its spelling."""
    assert ask(tokenize, {"prompt": "hi"}).answer == {
        "count": 2,
        "max_model_len": 4096,
        "tokens": [*b"hi"],
        "token_strs": None,
    }
    assert ask(tokenize, {"prompt": "</s>", "add_special_tokens": False}).answer["tokens"] == [EOS]
    as_text = {"prompt": "</s>", "parse_special": False}
    assert ask(tokenize, as_text).answer["tokens"] == [*b"</s>"]


def test_texts_of_the_tokens(ask) -> None:
    told = ask(tokenize, {"prompt": "[THINK]é", "return_token_strs": True}).answer
    assert told["tokens"] == [ID_OF["[THINK]"], 0xC3, 0xA9]
    assert told["token_strs"] == ["[THINK]", "bytes:\\xc3", "bytes:\\xa9"]


def test_a_conversation_has_the_tokens_of_its_prompt(ask) -> None:
    plain = ask(tokenize, {"messages": USER, "add_special_tokens": False}).answer["tokens"]
    assert bytes(plain) == b"[user]hi"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    called = ask(tokenize, {"messages": CALLED, "tools": tools}).answer["tokens"]
    assert ID_OF["[TOOL_CALLS]"] in called
    turns = [*USER, {"role": "assistant", "content": "he"}]
    goes_on = {"messages": turns, "continue_final_message": True, "add_generation_prompt": False}
    assert bytes(ask(tokenize, goes_on).answer["tokens"]) == b"[user]hi[assistant]he"


def test_text_of_tokens(ask) -> None:
    tokens = [*"né".encode(), ID_OF["[THINK]"], EOS]
    assert ask(detokenize, {"tokens": tokens, "model": "fake"}).answer == {"prompt": "né[THINK]</s>"}
    assert ask(detokenize, {"tokens": []}).answer == {"prompt": ""}


def test_the_tokenizer(ask) -> None:
    told = ask(tokenizer_info).answer
    assert (told["tokenizer_class"], told["eos_token"], told["model_max_length"]) == ("tokenizers", "</s>", 4096)
    assert told["bos_token"] is None
    assert "messages" in told["chat_template"]


@pytest.mark.parametrize(
    ("function", "body", "field"),
    [
        (tokenize, b"{", "body"),
        (tokenize, {}, "prompt"),
        (tokenize, {"prompt": 3}, "prompt"),
        (tokenize, {"prompt": ["a"]}, "prompt"),
        (tokenize, {"prompt": "a", "messages": USER}, "prompt"),
        (tokenize, {"prompt": "a", "tools": []}, "tools"),
        (tokenize, {"prompt": "a", "continue_final_message": False}, "continue_final_message"),
        (tokenize, {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        (tokenize, {"prompt": "a" * 20_000}, "prompt"),
        (tokenize, {"prompt": "a" * 4097}, "prompt"),
        (tokenize, {"prompt": "a", "chat_template": "{{ messages }}"}, "chat_template"),
        (tokenize, {"prompt": "a", "temperature": 1}, "temperature"),
        (tokenize, {"messages": USER, "parse_special": False}, "parse_special"),
        (tokenize, {"messages": USER, "add_special_tokens": True}, "add_special_tokens"),
        (tokenize, {"messages": USER, "add_generation_prompt": False}, "add_generation_prompt"),
        (
            tokenize,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].image_url",
        ),
        (tokenize, {"messages": [{"role": "nobody", "content": "a"}]}, "messages[0].role"),
        (detokenize, {}, "tokens"),
        (detokenize, {"tokens": "a"}, "tokens"),
        (detokenize, {"tokens": [1, False]}, "tokens[1]"),
        (detokenize, {"tokens": [300]}, "tokens"),
        (detokenize, {"tokens": [1] * 4097}, "tokens"),
        (detokenize, b'{"tokens": [1], "tokens": [2]}', "tokens"),
    ],
    ids=lambda value: str(value)[:40] if not callable(value) else value.__name__,
)
def test_what_is_refused_is_refused_by_the_name_in_the_body(ask, function, body, field) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(function, body)
    assert caught.value.field == field
    if field != "body":
        assert field.partition("[")[0] in caught.value.message


def test_another_model_is_not_found_and_unknown_fields_are_named(ask) -> None:
    for function, body in ((tokenize, {"prompt": "a"}), (detokenize, {"tokens": [1]})):
        with pytest.raises(NotFound):
            ask(function, {**body, "model": "other"})
        assert ask(function, {**body, "model": "mine", "x": 1}, names=("mine",), lenient=True).passed_over == ("x",)
    turns = [{**USER[0], "odd": 1}]
    told = ask(tokenize, {"messages": turns, "y": 1}, lenient=True)
    assert sorted(told.passed_over) == ["messages.odd", "y"]
