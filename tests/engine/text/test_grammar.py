"""Grammars of whole answers: what they let a model write, token by token, and what they do not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher
from mistral_speakers import speaker
from msgspec.structs import replace

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import ChatMessage, Generate, Grammar, Tool
from cierzo.engine.testing.words import EOS, ID_OF, VOCAB, fake_model, marked_prompts
from cierzo.engine.text.grammar import GrammarWriter, grammar_of, vocabulary_of, writer_of
from cierzo.engine.text.grammar_check import GrammarCompiler
from cierzo.engine.text.grammar_limits import MAX_GRAMMAR_BYTES, parser_limits
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.text.syntax import CALL_TAGS, LLAMA_CALL, THINK_TAGS, Syntax
from cierzo.engine.text.token_table import grammar_tokenizer, token_table

THINK, END_THINK, CALL, ARGS = ID_OF.values()
CALL_ID = 290  # of no text; it stands for a token that this vocabulary lacks
PROMPTS = marked_prompts()
MODEL = fake_model()
TABLE = token_table(PROMPTS.tokenizer, VOCAB, (EOS,))  # type: ignore[arg-type]
TOKENIZER = grammar_tokenizer(TABLE)
COMPILER = GrammarCompiler(TABLE)
SMALL4 = PROMPTS.syntax
assert SMALL4 is not None
V3 = Syntax(tokens={CALL: "call"}, call_marker="[TOOL_CALLS]", named_calls=True)
V11 = Syntax({CALL: "call", ARGS: "args", THINK: "id"}, THINK_TAGS, "[TOOL_CALLS]", named_calls=True, call_ids=True)
TAGS = Syntax(spelled=THINK_TAGS | CALL_TAGS, call_marker="<tool_call>")
LLAMA = Syntax(tokens={CALL: "call"}, call_marker=LLAMA_CALL, bare_calls=True)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [Tool(name="now"), Tool(name="wind", parameters=CITY | {"additionalProperties": False}, strict=True)]
Piece = int | str


def ask(grammar: Grammar | None = None, **fields: Any) -> Generate:
    return Generate(stream=0, messages=[ChatMessage(role="user", content="a")], grammar=grammar, **fields)


def written(message: Generate, syntax: Syntax | None = SMALL4, **told: Any) -> str:
    how = {"in_thinking": False, "one_call": False, "apart": True, **told}
    return GrammarWriter(TABLE, syntax).write(message, **how)


def held(pieces: Sequence[Piece], message: Generate, syntax: Syntax | None = SMALL4, **told: Any) -> str:
    """How an answer fares: "ends" if it may end behind these tokens and texts, "open" if it may go on only, or the
    first byte or token that it may not have."""
    grammar = written(message, syntax, **told)
    COMPILER.check(grammar)
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0, limits=parser_limits())
    for piece in pieces:
        for token_id in [piece] if isinstance(piece, int) else piece.encode():
            if token_id not in allowed(matcher):
                return f"no {token_id if token_id > 255 else chr(token_id)}"
            assert matcher.consume_token(token_id)
    return "ends" if EOS in allowed(matcher) else "open"


def allowed(matcher: LLMatcher) -> set[int]:
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    assert not matcher.is_error(), matcher.get_error()
    return {*np.flatnonzero(bits).tolist()}


JSON = Grammar(kind="json_object")


@pytest.mark.parametrize(
    ("grammar", "text", "end"),
    [
        (JSON, '{"a": [1, null]}', "ends"),
        (JSON, '{\n  "a": 1\n}', "ends"),
        (JSON, '{"a":  1', "no  "),
        (JSON, "[", "no ["),
        (Grammar(kind="json_schema", value='{"type": "array"}'), "[1, {}]", "ends"),
        (Grammar(kind="json_schema", value=" true "), "17", "ends"),
        (Grammar(kind="json_schema", value="{ }"), '"a"', "ends"),
        (Grammar(kind="json_schema", value='{\r\n\t"const":\n"a\u2028b\x85"\n}\n'), '"a\u2028b\x85"', "ends"),
        (Grammar(kind="json_schema", value='{"const": "é\\u2028\\"</s>"}'), '"é\u2028\\"</s>"', "ends"),
        (Grammar(kind="regex", value=r"(ab)+/\d{2}"), "abab/07", "ends"),
        (Grammar(kind="regex", value=r"(ab)+/\d{2}"), "abab/x", "no x"),
        (Grammar(kind="regex", value="a\nb"), "a\nb", "ends"),
        (Grammar(kind="regex", value="a/\nX: <259>"), "a/\nX: <259>", "ends"),
        (Grammar(kind="choice", value=["yes", "no", "nobody"]), "no", "ends"),
        (Grammar(kind="choice", value=["yes", "no", "nobody"]), "nob", "open"),
        (Grammar(kind="choice", value=['"\\\n\x00\x7f\x9f\U0001f600/']), '"\\\n\x00\x7f\x9f\U0001f600/', "ends"),
        (Grammar(kind="lark", value='start: n "+" n\nn: /[0-9]/'), "1+2", "ends"),
        (Grammar(kind="lark", value='start: "<[3]> @x %llguidance" // <[3]>\n'), "<[3]> @x %llguidance", "ends"),
        (Grammar(kind="lark", value="start: body\nbody: /a/\ntext_token: /b/"), "a", "ends"),
    ],
)
def test_texts(grammar, text, end):
    assert held([text], ask(grammar)) == end
    assert held([text], Generate(stream=0, text="a", grammar=grammar), None) == end
    if end == "ends":
        assert held([text, "x"], ask(grammar)) == "no x"
        assert held([END_THINK], ask(grammar)) == f"no {END_THINK}"
        assert held([CALL], ask(grammar)) == f"no {CALL}"


def test_a_thought_comes_first_where_the_effort_lets_the_model_think():
    thought = [THINK, "a }{ \xff", 0xE2, END_THINK]  # bytes that are no character, too: a budget may cut there
    for answer in ([*thought, "{}"], ["{}"]):
        assert held(answer, ask(JSON, reasoning_effort="high")) == "ends"
        assert held(answer, ask(JSON)) == "ends"
    assert held([THINK, "a", EOS], ask(JSON)) == f"no {EOS}"
    assert held([THINK, "a", THINK], ask(JSON)) == f"no {THINK}"
    assert held([*thought, THINK], ask(JSON)) == f"no {THINK}"
    assert held([THINK], ask(JSON, reasoning_effort="none")) == f"no {THINK}"
    assert held([THINK], Generate(stream=0, text="a", grammar=JSON)) == f"no {THINK}"
    assert held([THINK], ask(JSON), apart=False) == f"no {THINK}"
    assert held([*thought, "{}"], ask(JSON, reasoning_effort="high"), apart=False) == "ends"
    assert held(["a", END_THINK, "{}"], ask(JSON), in_thinking=True) == "ends"
    assert held(["{}"], ask(JSON), in_thinking=True) == "open"
    assert held([THINK], ask(JSON), None) == f"no {THINK}"


def test_a_model_that_does_not_think_unasked_has_no_thought_unless_an_effort_is_said():
    """Mistral's tokenizer of v15 says so, and of a chat template what it writes."""
    writer = GrammarWriter(TABLE, SMALL4, thinks_unasked=False)
    how = {"in_thinking": False, "one_call": False, "apart": True}
    assert "thought_rest" not in writer.write(ask(JSON), **how)
    assert "thought_rest" in writer.write(ask(JSON, reasoning_effort="high"), **how)
    assert "thought_rest" in writer.write(ask(JSON), **how | {"in_thinking": True})
    assert [speaker(version).chat.thinks_unasked for version in ("v15", "v13")] == [False, True]
    says = "{% if reasoning_effort is defined and reasoning_effort != 'none' %}[{{ reasoning_effort }}]{% endif %}"
    for template, thinks in ((says, False), (f"{says}{{{{ reasoning_effort }}}}", True), ("a", True)):
        assert marked_prompts(template).template.thinks_unasked == thinks  # type: ignore[union-attr]


def test_no_control_token_is_part_of_a_thought_even_if_it_has_a_text():
    table = replace(TABLE, tokens=[*TABLE.tokens[:-1], b"<call>"], control_ids=[*TABLE.control_ids, VOCAB - 1])
    tokenizer = grammar_tokenizer(table)
    grammar = GrammarWriter(table, SMALL4).write(ask(JSON), in_thinking=True, one_call=False, apart=True)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
    assert allowed(matcher) == {*range(256), END_THINK}


def test_tags_of_a_thought_are_spelled_and_behind_them_json_may_have_spaces():
    assert held(["<think>a {}</think>\n\n{}"], ask(JSON), TAGS) == "ends"
    assert held(["a</think>{}"], ask(JSON), TAGS, in_thinking=True) == "ends"
    choice = ask(Grammar(kind="choice", value=["a"]))
    assert held(["<think></think>a"], choice, TAGS) == "ends"
    assert held(["<think></think>\n"], choice, TAGS) == "no \n"


def call(name: str, arguments: str) -> list[Piece]:
    return [CALL, name, ARGS, arguments]


@pytest.mark.parametrize(
    ("choice", "pieces", "end"),
    [
        ("required", [*call("now", '{"a": [1]}')], "ends"),
        ("required", [*call("now", "{}"), *call("wind", '{"city": "Z"}')], "ends"),
        ("required", [THINK, "a", END_THINK, *call("now", "{}")], "ends"),
        ("required", [*call("wind", "{}")], "no }"),
        ("required", [*call("win", "")], f"no {ARGS}"),
        ("required", [*call("evil", "")], "no e"),
        ("required", ["a"], "no a"),
        ("required", [EOS], f"no {EOS}"),
        ("required", [*call("now", "[]")], "no ["),
        ("now", [*call("now", "{}")], "ends"),
        ("now", [*call("wind", "")], "no w"),
        ("now", [*call("now", "{}"), CALL], f"no {CALL}"),
        ("auto", ["a", *call("now", "{}"), *call("now", "{}")], "ends"),
        ("auto", ["a {"], "ends"),
        ("auto", ["a", *call("wind", '{"city": 1')], "no 1"),
        ("auto", [THINK, "a", END_THINK, "b"], "ends"),
    ],
)
def test_calls_of_listed_tools(choice, pieces, end):
    assert held(pieces, ask(tools=TOOLS, tool_choice=choice)) == end


def test_one_call_is_all_where_the_client_wants_one():
    for choice in ("auto", "required"):
        message = ask(tools=TOOLS, tool_choice=choice)
        assert held([*call("now", "{}"), CALL], message) == "open"
        assert held([*call("now", "{}"), CALL], message, one_call=True) == f"no {CALL}"


def test_text_that_is_held_or_calls():
    message = ask(JSON, tools=TOOLS)
    assert held(["{}"], message) == "ends"
    assert held(call("now", "{}"), message) == "ends"
    assert held(["{}", CALL], message) == f"no {CALL}"
    assert held([CALL], ask(JSON, tools=TOOLS, tool_choice="none")) == f"no {CALL}"
    assert held(["{"], ask(JSON, tools=TOOLS, tool_choice="required")) == "no {"
    assert held(["{}"], ask(JSON, tools=TOOLS), None) == "ends"


def test_other_syntaxes():
    message = ask(tools=TOOLS, tool_choice="required")
    both = '[{"name": "now", "arguments": {}}, {"name": "wind", "arguments": {"city": "a"}, "id": "abcdefgh9"}]'
    assert held([CALL, both], message, V3) == "ends"
    assert held([CALL, both], message, V3, one_call=True) == "no ,"
    assert held([CALL, '[{"name": "wind", "arguments": {}'], message, V3) == "no }"
    assert held([CALL, "now", THINK, "abcdefgh9", ARGS, "{}"], message, V11) == "ends"
    assert held([CALL, "now", ARGS, "{}"], message, V11) == "ends"
    tagged = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert held([f"<think>a</think>\n{tagged}\n{tagged}"], message, TAGS) == "ends"
    assert held(["a"], message, TAGS) == "no a"
    assert held(['{"name": "now", "parameters": {}}'], message, LLAMA) == "ends"
    assert held([CALL, '{"name": "wind", "parameters": {}'], message, LLAMA) == "no }"


def test_other_syntaxes_with_text():
    message = ask(tools=TOOLS)
    assert held(["a <b> <tool_call"], message, TAGS) == "ends"
    assert held(['a <tool_call>\n{"name": "now", "arguments": {}}\n</tool_call> b'], message, TAGS) == "ends"
    assert held(['a <tool_call>{"name": "e'], message, TAGS) == "no e"
    assert held(["a", CALL, '[{"name": "now", "arguments": {}}]'], message, V3) == "ends"
    assert held(["a {"], message, LLAMA) == "ends"
    assert held(['{"name": "e'], message, LLAMA) == "no e"


@pytest.mark.parametrize(
    ("grammar", "field", "words"),
    [
        (Grammar(kind="json_schema", value="{"), "grammar.value", "no JSON"),
        (Grammar(kind="json_schema", value='{"const": "a\n"}'), "grammar.value", "no JSON"),
        (Grammar(kind="json_schema", value="[" * 10_000), "grammar.value", "100 brackets"),
        (Grammar(kind="json_schema", value='{"a":' * 10_000 + "1" + "}" * 10_000), "grammar.value", "100 brackets"),
        (Grammar(kind="json_schema", value="false"), "grammar.value", "no schema"),
        (Grammar(kind="json_schema", value="3"), "grammar.value", "no schema"),
        (Grammar(kind="json_schema", value='{"x-guidance": {"lenient": true}}'), "grammar.value", "x-guidance"),
        (Grammar(kind="json_schema", value='{"x-guid\\u0061nce": {}}'), "grammar.value", "x-guidance"),
        (Grammar(kind="json_schema", value=["a"]), "grammar.value", "one text"),
        (Grammar(kind="json_object", value="{}"), "grammar.value", "json_schema"),
        (Grammar(kind="choice", value="a"), "grammar.value", "list of texts"),
        (Grammar(kind="choice", value=[]), "grammar.value", "list of texts"),
        (Grammar(kind="choice", value=["a", ""]), "grammar.value", "list of texts"),
        (Grammar(kind="choice", value=["a" * 1000] * 300), "grammar.value", "bytes, allowed"),
        (Grammar(kind="regex", value="a" * (MAX_GRAMMAR_BYTES + 1)), "grammar.value", "bytes, allowed"),
        (Grammar(kind="regex", value=""), "grammar.value", "empty"),
        (Grammar(kind="regex", value="a\\"), "grammar.value", "backslash"),
        (Grammar(kind="lark", value="start: <[3]>"), "grammar.value", "< outside"),
        (Grammar(kind="lark", value="start: <think>"), "grammar.value", "< outside"),
        (Grammar(kind="lark", value='start: "a" @of_client'), "grammar.value", "@ outside"),
        (
            Grammar(kind="lark", value='start: /a/ /b\\//\n%llguidance {"no_forcing": false}'),
            "grammar.value",
            "%llg",
        ),
        (Grammar(kind="lark", value="start: " + "(" * 101), "grammar.value", "100 brackets"),
    ],
)
def test_what_no_grammar_is_made_of(grammar, field, words):
    with pytest.raises(InvalidRequest, match=words) as caught:
        written(ask(grammar))
    assert (caught.value.field, bool(caught.value.limit)) == (field, True)
    assert caught.value.value is not None


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar(kind="json_schema", value='{"type": "x"}'), "Invalid type: x"),
        (Grammar(kind="json_schema", value='{"not": {}}'), "Unimplemented keys"),
        (Grammar(kind="json_schema", value='{"type": "string", "format": "x"}'), "Unknown format"),
        (Grammar(kind="json_schema", value='{"$ref": "http://127.0.0.1:9/a"}'), "does not fetch"),
        (Grammar(kind="json_schema", value='{"$ref": "file:///etc/passwd"}'), "does not fetch"),
        (
            Grammar(kind="json_schema", value='{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}'),
            "no answer",
        ),
        (Grammar(kind="json_schema", value='{"type": "integer", "minimum": 5, "maximum": 3}'), "Unsatisfiable"),
        (
            Grammar(kind="json_schema", value=json.dumps({"properties": {f"p{i}": {} for i in range(9000)}})),
            "too big",
        ),
        (Grammar(kind="regex", value="(a"), "unclosed group"),
        (Grammar(kind="regex", value="a(?=b)"), "look-around"),
        (Grammar(kind="lark", value="a: /b/"), "no start rule"),
        (Grammar(kind="lark", value="start: a b c"), "[uU]nknown"),
        (Grammar(kind="lark", value="start: start"), "no answer"),
        (
            Grammar(kind="lark", value="start: " + " | ".join(f'"{i}" a' for i in range(18000)) + "\na: /b/"),
            "too big",
        ),
    ],
)
def test_what_no_answer_is_held_to(grammar, words):
    with pytest.raises(InvalidRequest, match=words) as caught:
        COMPILER.check(written(ask(grammar)))
    assert caught.value.field in (None, "grammar.value")
    assert caught.value.limit


@pytest.mark.parametrize(
    ("grammar", "limit"),
    [
        (Grammar(kind="json_schema", value='{"type": "array", "uniqueItems": true}'), "what llguidance takes"),
        (Grammar(kind="json_schema", value='{"properties": {"fuel": {"not": {}}}}'), "what llguidance takes"),
        (Grammar(kind="json_schema", value='{"items": {"not": {}}}'), "what llguidance takes"),
        (Grammar(kind="lark", value="start: items"), "what llguidance takes"),
        (Grammar(kind="lark", value='start: "z" ' + '"fuel"? ' * 6000), "10000 symbols"),
    ],
)
def test_a_limit_is_told_by_what_the_compiler_says_and_not_by_words_of_the_grammar(grammar, limit):
    with pytest.raises(InvalidRequest) as caught:
        COMPILER.check(written(ask(grammar)))
    assert caught.value.limit == limit


def test_who_asks_for_branches_that_overlap_is_told_of_no_option_that_a_request_cannot_set():
    overlapping = Grammar(kind="json_schema", value='{"oneOf": [{"type": "integer"}, {"type": "number"}]}')
    with pytest.raises(InvalidRequest, match="no value fits two branches") as caught:
        COMPILER.check(written(ask(overlapping)))
    assert "coerce" not in caught.value.message


def test_a_tool_with_a_schema_that_is_none_is_named():
    tools = [TOOLS[0], TOOLS[1], Tool(name="f", parameters={"properties": {"a": {"type": "x"}}}, strict=True)]
    for choice in ("required", "f"):
        with pytest.raises(InvalidRequest, match="Invalid type") as caught:
            COMPILER.check(written(ask(tools=tools, tool_choice=choice)))
        assert caught.value.field == "tools[2].parameters"
    with pytest.raises(InvalidRequest) as caught:
        written(ask(tools=[Tool(name="f", parameters={"x-guidance": {}}, strict=True)]))
    assert caught.value.field == "tools[0].parameters"
    tool = Tool(name="f", parameters={"description": "a" * 2 * MAX_GRAMMAR_BYTES}, strict=True)
    with pytest.raises(InvalidRequest, match="bytes, allowed") as caught:
        written(ask(tools=[tool]))
    assert caught.value.field == "tools"


def test_what_the_served_model_lacks_is_named():
    for syntax in (None, Syntax(spelled=THINK_TAGS)):
        required = {"tool_choice": "required"}
        for fields, field in (
            (required, "tool_choice"),
            (required | {"grammar": JSON}, "tool_choice"),
            ({}, "tools"),
        ):
            with pytest.raises(InvalidRequest, match="marks no calls") as caught:
                written(ask(tools=TOOLS, **fields), syntax)
            assert caught.value.field.startswith(field)
    how = {"in_thinking": False, "one_call": False, "apart": True}
    for writer in (writer_of(PromptEncoder(), MODEL), writer_of(PROMPTS, fake_model(eos_token_ids=[]))):
        assert grammar_of(writer, ask(), **how) == ""
        with pytest.raises(InvalidRequest, match="need a tokenizer") as caught:
            grammar_of(writer, ask(JSON), **how)
        assert caught.value.field == "grammar"


def test_nothing_is_held_where_nothing_is_asked_for():
    how = {"in_thinking": False, "one_call": False, "apart": True}
    writer = writer_of(PROMPTS, MODEL)
    for message in (ask(), ask(tools=TOOLS[:1]), ask(tools=TOOLS, tool_choice="none")):
        assert grammar_of(writer, message, **how) == ""
    for message in (ask(JSON), ask(tools=TOOLS), ask(tools=TOOLS[:1], tool_choice="now")):
        assert grammar_of(writer, message, **how)


def test_a_vocabulary_has_its_bytes_and_its_controls():
    assert vocabulary_of(PROMPTS, MODEL) == TABLE
    assert [len(token) for token in TABLE.tokens] == [1] * 256 + [0] * (VOCAB - 256)
    assert (TABLE.control_ids, TABLE.eos_token_ids) == ([*range(256, 262)], [EOS])
    with pytest.raises(ValueError, match="ends an answer"):
        grammar_tokenizer(token_table(PROMPTS.tokenizer, VOCAB, ()))  # type: ignore[arg-type]
