"""What bodies ask of an answer's form, as clients of OpenAI, Mistral and vLLM write it."""

from __future__ import annotations

import json

import mistralai.client.models as mistral
import pytest
from gateway_rules import RULES, refusal

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.arguments import generate_message
from cierzo.engine.gateway.asked import in_body, read_chat, read_completions, read_responses
from cierzo.engine.gateway.bodies import packed_requests_of
from cierzo.engine.messages import Generate, Grammar

HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"b": {"const": None}, "a": {"enum": ["ñ", 1.0, 1]}}, "required": ["a"]}
TEXT_OF_IT = (
    '{"type": "object", "properties": {"b": {"const": null}, "a": {"enum": ["ñ", 1.0, 1]}}, "required": ["a"]}'
)
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
NAMED = {"type": "function", "function": {"name": "f"}}


def read(rules=RULES, **body):
    return read_chat(json.dumps({"messages": HI, **body}).encode(), rules)


def respond(rules=RULES, **body):
    return read_responses(json.dumps({"input": "Hi", **body}).encode(), rules)


def complete(rules=RULES, **body):
    return read_completions(json.dumps({"prompt": "Hi", **body}).encode(), rules)


@pytest.mark.parametrize(
    ("body", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None}, None),
        ({"response_format": {"type": "json_object"}}, Grammar(kind="json_object")),
        ({"response_format": {"type": "json_object", "json_schema": None}}, Grammar(kind="json_object")),
        ({"response_format": FORMAT}, Grammar(kind="json_schema", value=TEXT_OF_IT)),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar(kind="json_schema", value=TEXT_OF_IT)),
        ({"structured_outputs": {"json": "true"}}, Grammar(kind="json_schema", value="true")),
        ({"structured_outputs": {"json_object": True}}, Grammar(kind="json_object")),
        ({"structured_outputs": {"regex": "a+", "json": None}}, Grammar(kind="regex", value="a+")),
        ({"structured_outputs": {"regex": "a+", "json_object": False}}, Grammar(kind="regex", value="a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Grammar(kind="choice", value=["a", "b"])),
        ({"structured_outputs": {"grammar": "start: /a/"}}, Grammar(kind="lark", value="start: /a/")),
        (
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": False, "whitespace_pattern": None}},
            Grammar(kind="regex", value="a"),
        ),
        (
            {"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}},
            Grammar(kind="regex", value="a"),
        ),
    ],
)
def test_what_the_answer_holds(body, grammar):
    asked = generate_message(**read(**body).arguments)
    assert asked.grammar == grammar
    (completion,) = complete(**body)
    assert generate_message(**completion.arguments).grammar == grammar


def test_properties_keep_their_order_and_values_their_kinds():
    """A model writes properties in the order of the schema, so the order says something; so does 1.0 beside 1."""
    asked = generate_message(**read(response_format=FORMAT).arguments)
    assert asked.grammar.value == TEXT_OF_IT
    assert [*json.loads(TEXT_OF_IT)["properties"]] == ["b", "a"]


def test_every_prompt_of_a_body_has_the_grammar():
    asked = complete(prompt=["a", "b", "c"], response_format=FORMAT)
    assert [generate_message(**each.arguments).grammar.value for each in asked] == [TEXT_OF_IT] * 3


@pytest.mark.parametrize(
    ("format_", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar(kind="json_object")),
        (
            {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": None},
            Grammar(kind="json_schema", value=TEXT_OF_IT),
        ),
    ],
)
def test_what_the_text_of_a_response_holds(format_, grammar):
    asked = respond(text={"format": format_, "verbosity": "medium"})
    assert generate_message(**asked.arguments).grammar == grammar
    assert asked.given["text"] == {"format": {name: value for name, value in format_.items() if value is not None}}


def test_a_long_schema_passes_through_the_process_for_long_bodies():
    schema = {"enum": [f"value {number}" for number in range(2_000)]}
    body = {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    (request,) = packed_requests_of("chat", json.dumps(body).encode(), RULES, {})
    import msgspec

    message = msgspec.msgpack.decode(request.packed, type=Generate)
    assert json.loads(message.grammar.value) == schema
    assert "grammar" not in request.arguments  # it is in the message, and nowhere twice


@pytest.mark.parametrize(
    ("choice", "asked"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        ("any", "required"),
        (NAMED, "f"),
        ({"function": {"name": "g"}}, "g"),  # as Mistral's clients may write it
        (mistral.ToolChoice(function=mistral.FunctionName(name="f")).model_dump(), "f"),
    ],
)
def test_choices_of_a_chat(choice, asked):
    assert generate_message(**read(tools=TOOLS, tool_choice=choice).arguments).tool_choice == asked


@pytest.mark.parametrize(
    ("choice", "asked"), [("required", "required"), ({"type": "function", "name": "f"}, "f"), ("none", "none")]
)
def test_choices_of_a_response(choice, asked):
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}]
    message = generate_message(**respond(tools=tools, tool_choice=choice).arguments)
    assert (message.tool_choice, message.tools[0].strict) == (asked, True)


def test_strict_tools():
    tools = [{"type": "function", "function": {"name": name, "strict": strict}} for name, strict in NAMES.items()]
    message = generate_message(**read(tools=tools).arguments)
    assert {tool.name: tool.strict for tool in message.tools} == {"f": True, "g": False, "h": False}


NAMES = {"f": True, "g": False, "h": None}
TAG = {"type": "structural_tag"}
DEEP: dict[str, object] = {}
for _ in range(40):
    DEEP = {"properties": {"a": DEEP}}


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"response_format": "json"}, "response_format", "must be an object"),
        ({"response_format": {}}, "response_format.type", "missing, allowed: text, json_object, json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml', allowed: text, json_object"),
        ({"response_format": TAG}, "response_format.type", "tools and tool_choice say"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema",
         "missing"),
        ({"response_format": FORMAT | {"type": "json_object"}}, "response_format.json_schema", "not json_object"),
        ({"response_format": FORMAT | {"schema": {}}}, "response_format.schema", "unknown field"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": "{}"}}},
         "response_format.json_schema.schema", "must be an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}}, None, "nested too deeply"),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "structured_outputs", "both say"),
        ({"structured_outputs": {}}, "structured_outputs", "has none, allowed: one of json, json_object, regex"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "has none"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "has regex, choice"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex", "must be a text"),
        ({"structured_outputs": {"grammar": ["a"]}}, "structured_outputs.grammar", "must be a text"),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice", "a list of texts"),
        ({"structured_outputs": {"choice": ["a", 3]}}, "structured_outputs.choice", "a list of texts"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json", "must be an object"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object", "true or false"),
        ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
         "structured_outputs.disable_any_whitespace", "the schema alone"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "tool_choice"),
        ({"guided_json": {}}, "guided_json", "structured_outputs has taken its place"),
        ({"tool_choice": 3}, "tool_choice", "'3', allowed: auto, none, required, any"),
        ({"tool_choice": "f", "tools": TOOLS}, "tool_choice", "'f', allowed: auto, none, required, any"),
        ({"tool_choice": {}, "tools": TOOLS}, "tool_choice.function", "missing"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name", "unknown field"),
        ({"tool_choice": NAMED | {"function": {}}}, "tool_choice.function.name", "missing"),
        ({"tool_choice": NAMED | {"function": "f"}}, "tool_choice.function", "must be an object"),
        ({"tool_choice": NAMED | {"function": {"name": "none"}}}, "tool_choice.function.name", "of their own"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "what is in tools may be called"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.type", "JSON alone"),
        # what the engine finds out, by the names of the body
        ({"tool_choice": NAMED}, "tool_choice.function.name", ""),
        ({"tool_choice": {"function": {"name": "x"}}, "tools": TOOLS}, "tool_choice.function.name", "one of tools"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"tools": [{"function": {"name": "f", "strict": 1}}]}, "tools[0].function.strict", "expected bool"),
    ],
)  # fmt: skip
def test_what_is_refused(body, field, words):
    error = refusal(lambda rules, **given: read(rules, **given), **body)
    assert field in (error.field, None)
    assert words in error.message, error.message
    assert len(error.message) < 400


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "missing"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema", "is json_schema, not text"),
        ({"text": {"format": FORMAT}}, "text.format.json_schema", "unknown field"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "'xml', allowed: text"),
        ({"tool_choice": NAMED}, "tool_choice.function", "unknown field"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name", "missing"),
        ({"tool_choice": {"name": "f"}}, "tool_choice.type", "missing"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type", "no tools of its own"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name", ""),
        ({"response_format": FORMAT}, "response_format", "text.format says it"),
        (
            {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "structured_outputs and text.format both",
        ),
    ],
)
def test_what_is_refused_of_a_response(body, field, words):
    error = refusal(lambda rules, **given: respond(rules, **given), **body)
    assert error.field == field
    assert words in error.message, error.message


@pytest.mark.parametrize(
    ("asked", "place"),
    [
        (lambda: read(response_format=FORMAT), "response_format.json_schema.schema"),
        (lambda: read(response_format={"type": "json_object"}), "response_format.type"),
        (lambda: read(structured_outputs={"regex": "["}), "structured_outputs.regex"),
        (lambda: respond(text={"format": {"type": "json_schema", "schema": SCHEMA}}), "text.format.schema"),
    ],
)
@pytest.mark.parametrize("field", ["grammar", "grammar.kind", "grammar.value"])
def test_errors_about_a_grammar_name_its_place_in_the_body(asked, place, field):
    told = in_body(InvalidRequest(f"{field} is too large", field=field), asked())
    assert (told.field, told.message) == (place, f"{place} is too large")
