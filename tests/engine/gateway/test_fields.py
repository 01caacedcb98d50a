"""The table of fields: it has all that the clients' own types have, and bodies are held against it."""

from __future__ import annotations

import typing
from collections.abc import Iterable
from typing import Any, Literal, Required, get_args, get_origin

import mistralai.client.models as mistral
import openai.types.chat as chat
import openai.types.responses as responses
import pytest
import typing_extensions
from http_fields import PAGE, SECTIONS, page
from openai.types import completion_create_params, shared_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params, response_input_item_param

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.absent import lacking
from cierzo.engine.frontend.client_options import GenerateArguments
from cierzo.engine.gateway import field_rows as rows
from cierzo.engine.gateway.fields import MAX_TOLD, Sieve, over, refused, served, table
from cierzo.engine.messages import SamplingParams


def names(*kinds: Any) -> set[str]:
    """The fields of TypedDicts and of pydantic's models, by their names in JSON."""
    found: set[str] = set()
    for kind in kinds:
        if hasattr(kind, "model_fields"):
            found |= {field.alias or name for name, field in kind.model_fields.items()}
        else:
            found |= set(typing.get_type_hints(kind))
    return found


def alternatives(kind: Any) -> Iterable[Any]:
    """The members of a union, of unions within it, and of names for one."""
    if isinstance(kind, typing_extensions.TypeAliasType):
        kind = kind.__value__
    if get_origin(kind) is typing.Annotated:
        kind = get_args(kind)[0]
    if not get_args(kind):
        return [kind]
    return [inner for one in get_args(kind) for inner in alternatives(one)]


def kinds(*members: Any) -> set[str]:
    """What the field `type` of each of these may say."""
    found: set[str] = set()
    for member in members:
        hint = typing.get_type_hints(member, include_extras=True)["type"]
        found |= set(_literals(hint))
    return found


def objects(union: Any) -> list[Any]:
    """The members of a union that are no words."""
    return [member for member in get_args(union) if get_origin(member) is not Literal]


def _literals(hint: Any) -> Iterable[str]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Required, typing_extensions.Required, typing.Annotated):
        return _literals(get_args(hint)[0])
    return [text for inner in get_args(hint) for text in _literals(inner)]


MISTRAL_MESSAGES = (mistral.SystemMessage, mistral.UserMessage, mistral.AssistantMessage, mistral.ToolMessage)
MISTRAL_CHAT = (mistral.ChatCompletionRequest, mistral.ChatCompletionStreamRequest)
GUIDED = {row.name for row in rows.GUIDED}
VLLM = {row.name for row in rows.EXTRAS} | GUIDED
OURS = {row.name for row in rows.SAMPLING}
# Table, types that it stands for, and what it has beside theirs.
WALKED = [
    (
        "chat",
        rows.CHAT,
        names(*get_args(chat_params.CompletionCreateParams), *MISTRAL_CHAT),
        VLLM
        | OURS
        | {"continue_final_message", "add_generation_prompt", "echo", "add_special_tokens"}
        | {"chat_template", "chat_template_kwargs", "documents", "include_reasoning"},
    ),
    (
        "completions",
        rows.COMPLETIONS,
        names(*get_args(completion_create_params.CompletionCreateParams)),
        VLLM | OURS | {"add_special_tokens", "response_format"},
    ),
    (
        "fim",
        rows.FIM,
        names(mistral.FIMCompletionRequest, mistral.FIMCompletionStreamRequest),
        OURS | {"stream_options", "response_format"} | GUIDED,
    ),
    (
        "responses",
        rows.RESPONSES,
        names(*get_args(response_create_params.ResponseCreateParams), mistral.CreateResponseRequest),
        OURS | GUIDED | {"response_format"},
    ),
    (
        "stream_options",
        rows.STREAM_OPTIONS,
        names(chat.ChatCompletionStreamOptionsParam),
        {"continuous_usage_stats"},
    ),
    (
        "prompt_cache_options",
        rows.PROMPT_CACHE,
        names(chat_params.PromptCacheOptions, response_create_params.PromptCacheOptions),
        set(),
    ),
    (
        "message",
        rows.MESSAGE,
        names(*get_args(chat.ChatCompletionMessageParam), chat.ChatCompletionMessage, *MISTRAL_MESSAGES),
        {"reasoning_content", "reasoning", "type"},
    ),
    ("text part", rows.TEXT_PART, names(chat.ChatCompletionContentPartTextParam, mistral.TextChunk), set()),
    ("thinking part", rows.THOUGHT_PART, names(mistral.ThinkChunk), set()),
    ("image part", rows.IMAGE_PART, names(chat.ChatCompletionContentPartImageParam, mistral.ImageURLChunk), set()),
    ("call", rows.CALL, names(chat.ChatCompletionMessageFunctionToolCallParam, mistral.ToolCall), set()),
    (
        "called",
        rows.CALLED,
        names(chat.chat_completion_message_function_tool_call_param.Function, mistral.FunctionCall),
        set(),
    ),
    ("tool", rows.TOOL, names(chat.ChatCompletionFunctionToolParam, mistral.Tool), set()),
    ("function", rows.FUNCTION, names(shared_params.FunctionDefinition, mistral.Function), set()),
    (
        "chosen",
        rows.CHOSEN,
        names(chat.chat_completion_named_tool_choice_param.Function, mistral.FunctionName),
        set(),
    ),
    ("choice", rows.CHOICE, names(chat.ChatCompletionNamedToolChoiceParam, mistral.ToolChoice), set()),
    ("types of choices", rows.CHOICES, kinds(*objects(chat.ChatCompletionToolChoiceOptionParam)), set()),
    ("response choice", rows.RESPONSE_CHOICE, names(responses.ToolChoiceFunctionParam), set()),
    ("types of response choices", rows.RESPONSE_CHOICES, kinds(*objects(response_create_params.ToolChoice)), set()),
    ("format", rows.FORMAT, names(shared_params.ResponseFormatJSONSchema, mistral.ResponseFormat), set()),
    (
        "schema of a format",
        rows.SCHEMA_FORMAT,
        names(shared_params.response_format_json_schema.JSONSchema, mistral.JSONSchema),
        set(),
    ),
    (
        "types of formats",
        rows.FORMATS,
        kinds(*get_args(chat_params.ResponseFormat), *get_args(responses.ResponseFormatTextConfigParam)),
        {"structural_tag"},
    ),
    (
        "text's format",
        rows.RESPONSE_TEXT_FORMAT,
        names(*get_args(responses.ResponseFormatTextConfigParam)),
        set(),
    ),
    (
        "reasoning",
        rows.REASONING,
        names(shared_params.Reasoning, mistral.CreateResponseRequestResponsesSupportedReasoning),
        set(),
    ),
    ("response stream", rows.RESPONSE_STREAM, names(response_create_params.StreamOptions), {"include_usage"}),
    (
        "text",
        rows.TEXT_FORMAT,
        names(responses.ResponseTextConfigParam, mistral.CreateResponseRequestResponsesTextConfig),
        set(),
    ),
    (
        "response tool",
        rows.RESPONSE_TOOL,
        names(responses.FunctionToolParam, mistral.ResponsesFunctionTool),
        set(),
    ),
    ("input text", rows.INPUT_TEXT, names(responses.ResponseInputTextParam), set()),
    ("input image", rows.INPUT_IMAGE, names(responses.ResponseInputImageParam), set()),
    ("output text", rows.OUTPUT_TEXT, names(responses.ResponseOutputTextParam), set()),
    (
        "message item",
        rows.ITEM_MESSAGE,
        names(
            responses.EasyInputMessageParam,
            response_input_item_param.Message,
            responses.ResponseOutputMessageParam,
        ),
        set(),
    ),
    ("call item", rows.ITEM_CALL, names(responses.ResponseFunctionToolCallParam), set()),
    ("result item", rows.ITEM_RESULT, names(response_input_item_param.FunctionCallOutput), set()),
    ("reasoning item", rows.ITEM_REASONING, names(responses.ResponseReasoningItemParam), set()),
    ("reasoning part", rows.REASONING_PART, names(responses.response_reasoning_item_param.Content), set()),
    (
        "types of parts",
        rows.PARTS,
        kinds(
            *get_args(chat.ChatCompletionContentPartParam),
            *get_args(chat.chat_completion_assistant_message_param.ContentArrayOfContentPart),
        )
        | (set(mistral.contentchunk._CONTENT_CHUNK_VARIANTS)),
        set(),
    ),
    ("types of calls", rows.CALLS, kinds(*get_args(chat.ChatCompletionMessageToolCallUnionParam)), set()),
    (
        "types of tools",
        rows.TOOLS,
        kinds(*get_args(chat.ChatCompletionToolUnionParam))
        | kinds(*alternatives(mistral.ChatCompletionRequestTool)),
        set(),
    ),
    ("types of response tools", rows.RESPONSE_TOOLS, kinds(*get_args(responses.ToolParam)), set()),
    (
        "types of response parts",
        rows.RESPONSE_PARTS,
        kinds(
            *get_args(responses.ResponseInputContentParam),
            *get_args(responses.response_output_message_param.Content),
        ),
        {"input_audio"},
    ),
    ("types of items", rows.ITEMS, kinds(*get_args(responses.ResponseInputItemParam)), set()),
    (
        "types of reasoning parts",
        rows.REASONING_PARTS,
        kinds(responses.response_reasoning_item_param.Content),
        set(),
    ),
]


@pytest.mark.parametrize(("rows", "theirs", "others"), [row[1:] for row in WALKED], ids=[row[0] for row in WALKED])
def test_every_field_of_the_clients_types_has_its_row(rows, theirs, others):
    assert theirs, "nothing was walked"
    missing, stale = theirs - set(rows), set(rows) - theirs - others
    assert not missing, f"say of these whether they are served, passed over or refused: {sorted(missing)}"
    assert not stale, f"no client has these any more: {sorted(stale)}"


def test_every_table_is_walked():
    untyped = [rows.TOKENIZE, rows.DETOKENIZE, rows.STRUCTURED]  # no client here has types of these
    walked = [*untyped, *(table for _, table, _, _ in WALKED)]
    tables = {name: value for name, value in vars(rows).items() if name.isupper() and isinstance(value, dict)}
    tables = {name: value for name, value in tables.items() if not name.endswith("_ROWS")}
    assert len(tables) > 20
    assert not [name for name, value in tables.items() if value not in walked]


@pytest.mark.parametrize("table", [rows.CHAT, rows.COMPLETIONS, rows.FIM, rows.RESPONSES])
def test_arguments_are_those_of_a_generation(table):
    known = set(GenerateArguments.__annotations__) | set(SamplingParams.__struct_fields__)
    named = {row.argument for row in table.values() if row.argument}
    assert named <= known
    assert all(row.treatment == "served" for row in table.values() if row.argument)


@pytest.mark.parametrize("table", [table for _, _, table in SECTIONS])
def test_whoever_is_refused_is_told_why(table):
    assert all(row.note for row in table.values() if row.treatment == "refused")


def test_the_page_is_made_of_the_tables():
    """If it differs: python tests/support/http_fields.py"""
    assert PAGE.read_text(encoding="utf-8") == page()


# --- the sieve -------------------------------------------------------------------------------------------------

INNER = table(served("on"), *over("colour"), refused("off", "it is never off", False))
ROWS = table(
    served("served", "argument"),
    *over("over"),
    refused("refused", "there is none", None, 1, "no"),
    served("inner", inner=INNER),
)


def test_what_is_served_and_what_is_passed_over():
    sieve = Sieve()
    body = {"served": 0, "over": [], "refused": "no", "inner": {"on": "x", "colour": "red", "off": False}}
    assert sieve.served(body, ROWS) == {"served": 0, "inner": {"on": "x"}}
    assert sieve.passed_over == ("over", "inner.colour")


def test_a_null_is_as_if_it_were_left_out():
    sieve = Sieve()
    body = dict.fromkeys(("served", "over", "refused", "inner", "unknown"))
    assert sieve.served(body, ROWS) == {}
    assert sieve.passed_over == ()


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"refused": 2}, "refused", 'refused: there is none; it must be left out or null or 1 or "no"'),
        ({"refused": True}, "refused", "there is none"),  # true is not 1
        ({"refused": 1.0}, "refused", "there is none"),
        ({"inner": {"off": True}}, "inner.off", "inner.off: it is never off"),
        ({"inner": []}, "inner", "must be an object"),
        ({"serve": 1}, "serve", "unknown field serve; did you mean served?"),
        ({"refuse": 1}, "refuse", "unknown field refuse$"),  # nobody is sent to what is refused
        ({"inner": {"hue": 1}}, "inner.hue", "unknown field inner.hue"),
        ({"x" * 1000: 1}, None, "unknown field xxx"),
        ({"lora_name": "x"}, "lora_name", "no adapters"),
    ],
)
@pytest.mark.parametrize("lenient", [False, True])
def test_what_is_refused(body, field, words, lenient):
    if lenient and words.startswith("unknown"):
        sieve = Sieve(lenient=True)
        sieve.served(body, ROWS)
        assert sieve.passed_over[0].startswith(field or "xxx")
        return
    with pytest.raises(InvalidRequest, match=words.replace("?", r"\?")) as caught:
        Sieve(lenient).served(body, ROWS)
    assert field in (caught.value.field, None)
    assert len(caught.value.message) < 400


def test_names_that_are_passed_over_are_fit_for_a_header():
    sieve = Sieve(lenient=True)
    hostile = {"a\r\nSet-Cookie: x": 1, "ñ": 1, "b, c": 1, "long" * 100: 1}
    sieve.served(hostile, ROWS)
    sieve.served({f"field{number}": 1 for number in range(100)}, ROWS, "messages[17]")
    told = sieve.passed_over
    assert len(told) == MAX_TOLD + 1
    assert told[-1] == "..."
    assert told[4] == "messages.field0"
    assert all(name.isascii() and name.isprintable() and len(name) <= 64 for name in told)
    assert not [name for name in told if set(name) & set(" ,:;\r\n")]


def test_a_type_is_named_with_those_that_are_served():
    kinds = table(served("one"), served("two"), refused("three", "there are two"))
    sieve = Sieve()
    assert sieve.kind({"type": "two"}, kinds, "x") == "two"
    assert sieve.kind({}, kinds, "x", default="one") == "one"
    assert sieve.kind({"type": None}, kinds, "x", default="one") == "one"
    for value, words in [
        ({"type": "three"}, "x.type is 'three', allowed: one, two; there are two"),
        ({"type": "four"}, "x.type is 'four', allowed: one, two"),
        ({"type": ["one"]}, r"x.type is .*, allowed: one, two"),
        ({}, "x.type is missing, allowed: one, two"),
        ("one", "x must be an object"),
    ]:
        with pytest.raises(InvalidRequest, match=words):
            sieve.kind(value, kinds, "x")


@pytest.mark.parametrize("table", [rows.CHAT, rows.COMPLETIONS, rows.FIM, rows.RESPONSES])
def test_what_the_engine_says_that_it_lacks_is_not_served(table):
    found = {row.name for row in table.values() if row.treatment == "served" and lacking(row.name)}
    assert found <= {"prompt_logprobs", "echo"}
