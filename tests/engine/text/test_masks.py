"""From a client's words to what the core is told that a token may be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace as replace_fields
from tekken_folders import write_tekken
from word_folders import TOKENIZERS, folder

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import Generate, ModelInfo, SamplingParams, Submit, ThinkingBudget
from cierzo.engine.text.masks import masked
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.syntax import Syntax, syntax_of

VOCAB = 300
ALLOWED = "sampling.allowed_token_ids"
MODEL = ModelInfo(
    stream=0, name="", architecture="", dtype="", device="", vocab_size=VOCAB, max_model_len=64, block_tokens=4,
    num_blocks=16, eos_token_ids=[2], has_tokenizer=True, has_chat_template=False,
)  # fmt: skip


class Bytes:
    """A tokenizer whose tokens are bytes, but for " a", which has a token of its own, and "?", which has none."""

    def encode_piece(self, text: str) -> list[int]:
        joined = text.replace(" a", chr(200)).replace("?", "").replace("!", chr(VOCAB))
        return [*map(ord, joined)]


MARKS = Syntax(tokens={20: "think", 21: "/think", 22: "call"})


def marks(*ids: int) -> Syntax:
    """Some of the markers."""
    return Syntax(tokens={token_id: mark for token_id, mark in MARKS.tokens.items() if token_id in ids})


def submit_of(
    syntax: Syntax | None = MARKS,
    *,
    tool_choice: str = "auto",
    in_thinking: bool = False,
    vocabulary: Any = Bytes(),  # noqa: B008
    output: tuple[int, ...] = (),
    **params: Any,
) -> Submit:
    sampling = SamplingParams(**params)
    message = Generate(
        stream=1, token_ids=[1], sampling=sampling, tool_choice=tool_choice, output_token_ids=[*output]
    )
    submit = Submit(request_id=1, prompt_token_ids=[1], sampling=sampling, output_token_ids=[*output])
    return masked(submit, message, vocabulary, syntax, MODEL, in_thinking=in_thinking)


@pytest.mark.parametrize(
    ("words", "banned"),
    [
        (["b"], [[98], [32, 98]]),
        ([" b"], [[98], [32, 98]]),
        (["   b"], [[98], [32, 98]]),
        (["a"], [[97], [200]]),
        (["ab", "a", "ab"], [[97, 98], [200, 98], [97], [200]]),
        (["b "], [[98, 32], [32, 98, 32]]),
        (["  "], [[32, 32]]),
        (["b!"], []),  # the model has no such token
    ],
)
def test_a_word_is_banned_alone_and_behind_a_space(words: list[str], banned: list[list[int]]) -> None:
    submit = submit_of(bad_words=words)
    assert submit.banned_token_ids == banned
    assert submit.sampling.bad_words == ()  # no text of a client goes to the core


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_word_is_banned_behind_a_line_break(kind: str) -> None:
    """Pieces with a mark for spaces have other tokens there."""
    words = PromptEncoder.load(folder(kind, "ChatML")).tokenizer
    assert words is not None
    banned = submit_of(vocabulary=words, bad_words=["ab"]).banned_token_ids
    for before in ("", "x ", "\n", "x\n", "x(", "\n\n"):
        ids = words.encode_piece(f"{before}ab")
        assert any(ids[-len(word) :] == word for word in banned), before


@pytest.mark.parametrize(("syntax", "banned"), [(MARKS, [[22]]), (marks(20, 21), []), (None, [])])
def test_without_a_choice_of_tools_the_marker_of_calls_is_banned(
    syntax: Syntax | None, banned: list[list[int]]
) -> None:
    assert submit_of(syntax, tool_choice="none").banned_token_ids == banned
    assert submit_of(syntax, tool_choice="auto").banned_token_ids == []


@pytest.mark.parametrize("in_thinking", [False, True])
@pytest.mark.parametrize("tokens", [0, 7])
def test_a_budget_knows_where_thoughts_begin_and_end(in_thinking: bool, tokens: int) -> None:
    submit = submit_of(max_thinking_tokens=tokens, in_thinking=in_thinking)
    assert submit.thinking == ThinkingBudget(tokens, 20, 21, in_thinking)
    assert submit_of(in_thinking=in_thinking).thinking is None


@pytest.mark.parametrize(
    ("settings", "field", "said"),
    [
        ({"bad_words": ["x"], "vocabulary": None}, "sampling.bad_words[0]", "need a tokenizer"),
        ({"bad_words": ["x", "?"]}, "sampling.bad_words[1]", "has no tokens"),
        ({"max_thinking_tokens": 5, "syntax": None}, "sampling.max_thinking_tokens", "single tokens"),
        ({"max_thinking_tokens": 5, "syntax": marks(21, 22)}, "sampling.max_thinking_tokens", "single tokens"),
        ({"max_thinking_tokens": 5, "syntax": marks(20, 22)}, "sampling.max_thinking_tokens", "single tokens"),
        ({"max_thinking_tokens": 5, "allowed_token_ids": [20, 30]}, ALLOWED, "must hold token 21"),
        ({"allowed_token_ids": [98, 22], "bad_words": ["b"], "tool_choice": "none"}, ALLOWED, "no token"),
        ({"allowed_token_ids": [2, 9], "min_tokens": 2, "stop_token_ids": [9]}, ALLOWED, "no token"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        submit_of(**settings)
    assert caught.value.field == field
    assert None not in (caught.value.limit, caught.value.value)


def test_what_leaves_a_token_is_taken() -> None:
    """Whatever ends the answer then: without an end token it goes on to max_tokens, as asked."""
    for settings in (
        {"allowed_token_ids": [30]},
        {"allowed_token_ids": [98, 2], "bad_words": ["b"]},
        {"allowed_token_ids": [2], "min_tokens": 1},
        {"allowed_token_ids": [2], "min_tokens": 2, "ignore_eos": True},
        {"allowed_token_ids": [2], "min_tokens": 2, "output": (5,)},
        {"allowed_token_ids": [20, 21], "max_thinking_tokens": 0},
    ):
        assert [*submit_of(**settings).sampling.allowed_token_ids] == settings["allowed_token_ids"]


def test_a_request_without_masks_is_left_as_it_is() -> None:
    submit = Submit(request_id=1, prompt_token_ids=[1], sampling=SamplingParams())
    assert masked(submit, Generate(stream=1), None, None, MODEL, in_thinking=True) is submit


def test_mistral_s_own_tokens(tmp_path: Path) -> None:
    prompts = PromptEncoder.load(write_tekken(tmp_path, "v15"), "mistral")
    tokens = prompts.tokenizer
    assert tokens is not None
    prompts = replace(prompts, syntax=syntax_of(tokens, None, "v15"))
    params = SamplingParams(bad_words=("the cat", "[TOOL_CALLS]"), max_thinking_tokens=9)
    message = Generate(stream=1, token_ids=[1], sampling=params, tool_choice="none")
    submit = Submit(request_id=1, prompt_token_ids=[1], sampling=params)
    model = replace_fields(MODEL, vocab_size=1 << 20)
    submit = prompts.masked(submit, message, model, in_thinking=True)
    *words, marker = submit.banned_token_ids
    spelled = [b"".join(map(tokens.token_bytes, word)).decode() for word in words]
    assert spelled == ["the cat", " the cat", "[TOOL_CALLS]", " [TOOL_CALLS]"]  # text, never the control token
    special = tokens.special_ids
    assert marker == [special["[TOOL_CALLS]"]]
    assert submit.thinking == ThinkingBudget(9, special["[THINK]"], special["[/THINK]"], True)
