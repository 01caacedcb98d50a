"""The parts of answers against parsers that were written elsewhere. Of Mistral's formats, the decoders of whole
answers of mistral-common, on tokens that its encoders made; of tags, the streaming parser of transformers."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.experimental.think import _split_content_and_think_chunks
from mistral_common.experimental.tools import _decode_tool_calls, _split_content_and_tool_calls
from mistral_common.protocol.instruct.chunk import TextChunk, ThinkChunk
from mistral_common.protocol.instruct.messages import AssistantMessage
from mistral_common.protocol.instruct.tool_calls import FunctionCall, ToolCall
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from support.part_answers import SYNTAXES, Pieces, joined, read
from support.tekken_folders import write_tekken
from transformers.utils.chat_parsing import ResponseParser

from cierzo.engine.text.parts import PartsReader
from cierzo.engine.text.syntax import Syntax, syntax_of

VERSIONS = ("v3", "v7", "v11", "v13", "v15")
LENGTHS = st.lists(st.integers(1, 6), max_size=30)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)
WORDS = st.text("abcXYZ019_-", min_size=1, max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda j: st.lists(j, max_size=3) | st.dictionaries(TEXTS, j, max_size=3),
)
CALLS = st.lists(
    st.tuples(WORDS, st.dictionaries(TEXTS, JSON, max_size=3), st.text("abcABC019", min_size=9, max_size=9)),
    max_size=3,
    unique_by=lambda call: call[2],
)


class _Words:
    """A Mistral vocabulary, as far as a reader needs it."""

    strip_leading_space = False

    def __init__(self, version: str) -> None:
        with TemporaryDirectory() as folder:
            path = write_tekken(Path(folder), version)
            self.instruct = MistralTokenizer.from_file(str(path / "tekken.json")).instruct_tokenizer
        self.inner = self.instruct.tokenizer
        self.special_ids = {self.inner.id_to_piece(rank): rank for rank in range(self.inner.num_special_tokens)}
        syntax = syntax_of(self, "", version)
        assert isinstance(syntax, Syntax)
        self.syntax = syntax

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id < self.inner.num_special_tokens else self.inner.id_to_byte_piece(token_id)

    def encode_piece(self, text: str) -> list[int]:
        return self.inner.encode(text, bos=False, eos=False)

    def text(self, token_ids: list[int]) -> str:
        return self.inner.decode(token_ids, special_token_policy=SpecialTokenPolicy.IGNORE)


@lru_cache
def _words(version: str) -> _Words:
    return _Words(version)


def _turn(version, thought, text, calls):
    content = text
    if thought is not None and version in ("v13", "v15"):
        content = [ThinkChunk(thinking=thought), *([TextChunk(text=text)] if text else [])]
    made = [
        ToolCall(id=call_id, function=FunctionCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False)))
        for name, arguments, call_id in calls
    ]
    if version in ("v3", "v7") and made:
        content = ""
    return AssistantMessage(content=content, tool_calls=made or None)


def _decoded(words, token_ids):
    """Thoughts, text and calls, as mistral-common reads them."""
    content, calls = _split_content_and_tool_calls(token_ids, words.special_ids["[TOOL_CALLS]"])
    chunks = [(content, False)]
    if "[THINK]" in words.special_ids:
        chunks = _split_content_and_think_chunks(
            content, words.special_ids["[THINK]"], words.special_ids["[/THINK]"]
        )
    said = [("thinking" if is_thought else "text", words.text(ids)) for ids, is_thought in chunks]
    return [pair for pair in said if pair[1]], [
        (call.function.name, json.loads(call.function.arguments), call.id)
        for call in _decode_tool_calls(calls, words.inner)
    ]


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=40, deadline=None)
@given(st.none() | TEXTS.filter(bool), TEXTS, CALLS, LENGTHS)
def test_mistral_answers_as_mistral_common_reads_them(version, thought, text, calls, lengths):
    words = _words(version)
    if not (text or calls or (thought and version in ("v13", "v15"))):
        return
    token_ids = words.instruct.encode_assistant_message(_turn(version, thought, text, calls), False)
    reader = PartsReader(words, words.syntax, call_id=str)
    _, pieces = read(reader, token_ids, lengths)
    parts = joined(pieces)
    said = [(part.kind, part.text) for part in parts if part.kind != "call" and part.text]
    made = [(part.name, json.loads(part.text), part.id) for part in parts if part.kind == "call"]
    expected, expected_calls = _decoded(words, token_ids)
    assert said == expected
    assert [call[:2] for call in made] == [call[:2] for call in expected_calls]
    if version in ("v3", "v7", "v11"):
        assert [call[2] for call in made] == [call[2] for call in expected_calls]
    assert (reader.broken_calls, reader.num_calls) == ([], len(calls))
    # What is written back is what was written: the prompt of the next turn has the tokens of this answer.
    arguments = [part.text for part in parts if part.kind == "call"]
    assert arguments == [json.dumps(arguments, ensure_ascii=False) for _, arguments, _ in calls]


TAGS = {
    "start_anchor": "<start>",
    "fields": {
        "content": {"content_args": {"strip": False}, "repeats": True, "join": "", "optional": True},
        "thinking": {
            "open": "<think>",
            "close": "</think>",
            "content_args": {"strip": False},
            "repeats": True,
            "join": "",
            "optional": True,
        },
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "optional": True,
        },
    },
}
SAID = st.text("ab <>/\n€", max_size=10).filter(lambda text: "<think" not in text)
TURNS = st.lists(
    st.one_of(
        st.tuples(st.just("thinking"), SAID),
        st.tuples(st.just("text"), SAID),
        st.tuples(st.just("call"), st.tuples(WORDS, st.dictionaries(TEXTS, JSON, max_size=3), st.booleans())),
    ),
    max_size=5,
)


@pytest.mark.parametrize("in_thinking", [False, True])
@settings(deadline=None)
@given(TURNS, LENGTHS, LENGTHS)
def test_answers_with_tags_as_transformers_streams_them(in_thinking, turns, cuts, lengths):
    text, is_open = "", in_thinking
    for kind, said in turns:
        if is_open:
            text, is_open = text + "hm</think>", False
        if kind == "call":
            name, arguments, is_first = said
            call = {"arguments": arguments, "name": name} if is_first else {"name": name, "arguments": arguments}
            text += f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
        else:
            text += f"<think>{said}</think>" if kind == "thinking" else said
    vocabulary, data, token_ids = Pieces(), text.encode(), []
    while data:
        length = cuts.pop() if cuts else 3
        token_ids.append(vocabulary.add(data[:length]))
        data = data[length:]
    reader = PartsReader(vocabulary, SYNTAXES["tags"], in_thinking=in_thinking)
    _, pieces = read(reader, token_ids, lengths)
    parts = joined(pieces)
    other = ResponseParser(TAGS, prefix="<start>" + ("<think>" if in_thinking else ""))
    other.feed(text)
    expected, _ = other.finalize()
    calls = [{"name": part.name, "arguments": json.loads(part.text)} for part in parts if part.kind == "call"]
    assert calls == expected.get("tool_calls", [])
    assert "".join(part.text for part in parts if part.kind == "thinking") == expected.get("thinking", "")
    # Spaces behind a call belong to no part here; to transformers they are text.
    said = "".join(part.text for part in parts if part.kind == "text")
    assert _bare(said) == _bare(expected.get("content", ""))
    assert reader.broken_calls == []


def _bare(text: str) -> str:
    return "".join(text.split())
