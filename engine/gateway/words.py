"""Answers of /tokenize, /detokenize and /tokenizer_info, as vLLM's clients ask for them and lm-eval reads them.

A text that is asked about is not a prompt: control tokens that it spells are those tokens, unless parse_special is
false. So a client finds the id of one, and can send token ids; in a prompt of text they stay text.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cierzo.engine.errors import CierzoError, InvalidRequest
from cierzo.engine.frontend.arguments import tokenize_arguments
from cierzo.engine.frontend.bounds import must_be
from cierzo.engine.gateway.asked_chat import read_chat
from cierzo.engine.gateway.backend import Backend
from cierzo.engine.gateway.field_rows import DETOKENIZE, TOKENIZE
from cierzo.engine.gateway.reading import Asked, Body, Rules, in_body, sequence, text
from cierzo.engine.gateway.token_words import TokenWords

_OF_CHAT = ("model", "messages", "tools", "reasoning_effort", "add_generation_prompt", "continue_final_message")


class Told(msgspec.Struct, frozen=True):
    """An answer. passed_over: names of fields of the body that were not looked at."""

    answer: dict[str, Any]
    passed_over: tuple[str, ...] = ()


async def tokenize(body: bytes, rules: Rules, backend: Backend, words: TokenWords) -> Told:
    """Give the tokens of a prompt. Raises InvalidRequest, NotFound for another model, and the server's refusals."""
    read = Body("completions", body, TOKENIZE, rules)
    wants_texts = read.flag("return_token_strs")
    asked = _conversation(read, rules) if "messages" in read.given else _text(read)
    try:
        token_ids = await backend.tokenize(**tokenize_arguments(asked.arguments))
    except CierzoError as error:
        raise in_body(error, asked) from error
    token_strs = None
    if wants_texts:
        await words.learn(backend, token_ids)
        token_strs = [*map(words.text, token_ids)]
    answer = {"count": len(token_ids), "max_model_len": rules.model.max_model_len, "tokens": token_ids}
    return Told({**answer, "token_strs": token_strs}, asked.passed_over)


async def detokenize(body: bytes, rules: Rules, backend: Backend) -> Told:
    """Give the text of tokens. Raises as `tokenize`."""
    read = Body("completions", body, DETOKENIZE, rules)
    tokens = sequence(read.need("tokens"), "tokens")
    for number, token in enumerate(tokens):
        if type(token) is not int:
            raise must_be(f"tokens[{number}]", "a token id", token)
    read.places["token_ids"] = "tokens"
    asked = read.asked()
    try:
        said = await backend.detokenize(tokens, control_tokens=True)
    except CierzoError as error:
        raise in_body(error, asked) from error
    return Told({"prompt": said}, asked.passed_over)


async def tokenizer_info(backend: Backend) -> Told:
    """Describe the tokenizer, by the names of a tokenizer_config.json. Raises Forbidden."""
    info, model = await backend.tokenizer_info(), await backend.model_info()
    roles = {name: getattr(info, name) or None for name in ("bos_token", "eos_token", "pad_token", "chat_template")}
    return Told({"tokenizer_class": info.kind, **roles, "model_max_length": model.max_model_len})


def _text(read: Body) -> Asked:
    """A text. Raises InvalidRequest for what belongs to a conversation."""
    if "prompt" not in read.given:
        limit = "exactly one of prompt, messages"
        raise InvalidRequest(f"{limit} is needed", field="prompt", limit=limit, value="none")
    for name in _OF_CHAT[1:]:
        _without(read, name, "messages")
    read.arguments["text"] = text("", read.given, "prompt")
    read.arguments["special_tokens"] = read.flag("add_special_tokens", default=True)
    read.arguments["control_tokens"] = read.flag("parse_special", default=True)
    read.places["text"] = "prompt"
    return read.asked()


def _conversation(read: Body, rules: Rules) -> Asked:
    """The conversation, as a chat completion would have it. Raises InvalidRequest for what belongs to a prompt."""
    for name in ("prompt", "parse_special"):
        _without(read, name, "a prompt" if name != "prompt" else "no messages")
    if read.flag("add_special_tokens"):  # vLLM's clients say false; the template alone adds some
        _without(read, "add_special_tokens", "a prompt")
    chat = {name: read.given[name] for name in _OF_CHAT if name in read.given}
    asked = read_chat(msgspec.json.encode(chat), msgspec.structs.replace(rules, image_hosts=()))
    return msgspec.structs.replace(asked, passed_over=(*read.sieve.passed_over, *asked.passed_over))


def _without(read: Body, name: str, beside: str) -> None:
    if name in read.given:
        raise must_be(name, f"left out, unless with {beside}", read.given[name])
