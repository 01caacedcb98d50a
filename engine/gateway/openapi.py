"""The OpenAPI document of the door, made of its rows and of the fields' tables, so that it says what is so.

Types of fields are told where they are simple; the tables decide what is served, and docs/http-fields.md says it in
words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cierzo import __version__
from cierzo.engine.gateway import field_rows
from cierzo.engine.gateway.answer_schemas import ANSWERS, COMPONENTS, TEXT, Schema
from cierzo.engine.gateway.fields import Table

TABLES: Mapping[str, Table] = {
    "/v1/chat/completions": field_rows.CHAT,
    "/v1/completions": field_rows.COMPLETIONS,
    "/v1/fim/completions": field_rows.FIM,
    "/v1/responses": field_rows.RESPONSES,
    "/tokenize": field_rows.TOKENIZE,
    "/detokenize": field_rows.DETOKENIZE,
}
NEEDED = {
    "/v1/chat/completions": ["messages"],
    "/v1/completions": ["prompt"],
    "/v1/fim/completions": ["prompt"],
    "/v1/responses": ["input"],
    "/detokenize": ["tokens"],
}
TYPES = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "n"), "integer"),
    **dict.fromkeys(("seed", "random_seed", "top_k", "top_logprobs", "priority", "max_thinking_tokens"), "integer"),
    **dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"), "number"),
    **dict.fromkeys(("repetition_penalty", "deadline_s"), "number"),
    **dict.fromkeys(("stream", "echo", "ignore_eos", "parallel_tool_calls", "return_token_strs"), "boolean"),
    **dict.fromkeys(("return_tokens_as_token_ids", "continue_final_message", "add_generation_prompt"), "boolean"),
    **dict.fromkeys(("add_special_tokens", "parse_special"), "boolean"),
    **dict.fromkeys(("model", "suffix", "reasoning_effort", "instructions"), "string"),
    **dict.fromkeys(("messages", "tools", "tokens", "include"), "array"),
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids"), "integer or array"),
    **dict.fromkeys(("stream_options", "logit_bias", "reasoning", "text", "prompt_cache_options"), "object"),
    **dict.fromkeys(("response_format", "structured_outputs"), "object"),
    **dict.fromkeys(("prompt", "input", "stop", "bad_words"), "string or array"),
    **dict.fromkeys(("logprobs", "prompt_logprobs", "top_prompt_logprobs"), "integer"),
    "tool_choice": "string or object",
}
OWN_TYPES = {  # of fields that are called as another one elsewhere
    ("/v1/fim/completions", "prompt"): "string",
    ("/tokenize", "prompt"): "string",
    ("/v1/chat/completions", "logprobs"): "boolean",
    ("/v1/chat/completions", "prompt_logprobs"): "boolean or integer",
}
IN_LISTS = {  # what is in the lists among them
    **dict.fromkeys(("messages", "tools"), "object"),
    **dict.fromkeys(("tokens", "stop_token_ids", "allowed_token_ids"), "integer"),
    **dict.fromkeys(("include", "bad_words", "stop"), "string"),
}
_TURNS = [{"role": "user", "content": "Why is the sky blue?"}]
_SCHEMA = {"type": "object", "properties": {"at": TEXT}}
_WIND = {"name": "wind", "parameters": _SCHEMA}
_FORM = {"name": "wind", "schema": _SCHEMA}
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": _TURNS, "max_tokens": 8},
        {"messages": _TURNS, "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}},
        {"messages": _TURNS, "max_tokens": 8, "n": 2, "logprobs": True, "top_logprobs": 2},
        {"messages": _TURNS, "max_tokens": 8, "tools": [{"type": "function", "function": _WIND}]},
        {"messages": _TURNS, "response_format": {"type": "json_schema", "json_schema": _FORM}},
        {"messages": _TURNS, "tools": [{"type": "function", "function": _WIND}], "tool_choice": "required"},
    ],
    "/v1/completions": [
        {"prompt": "The sky is", "max_tokens": 8},
        {"prompt": ["The sky is", "The sea is"], "max_tokens": 8, "stream": True},
        {"prompt": "The sky is", "structured_outputs": {"choice": [" blue", " grey"]}},
        {"prompt": [1, 2, 3], "max_tokens": 1, "echo": True, "logprobs": 1},
    ],
    "/v1/fim/completions": [{"prompt": "def odd(n):", "max_tokens": 8}],
    "/v1/responses": [
        {"input": "Why is the sky blue?", "max_output_tokens": 8},
        {"input": "Why is the sky blue?", "text": {"format": {"type": "json_schema", **_FORM}}},
        {"input": _TURNS, "max_output_tokens": 8, "tools": [{"type": "function", **_WIND}], "stream": True},
    ],
    "/tokenize": [{"prompt": "The sky is", "return_token_strs": True}, {"messages": _TURNS}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
}
ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": TEXT,
                "type": TEXT,
                "param": {"type": ["string", "null"]},
                "code": TEXT,
                "limit": TEXT,
                "value": TEXT,
            },
        }
    },
}
KINDS = {"/metrics": "text/plain", "/": "text/html"}  # of answers that are no JSON


def document(rows: Iterable[Any], *, lenient: bool) -> Schema:
    """The document. rows: of the application, each with method, path, handler and is_open."""
    paths: dict[str, Schema] = {}
    for row in rows:
        if row.path.startswith("/page/") and row.path != "/page/state":
            continue  # files
        path = row.path.replace("{name:path}", "{name}")
        paths.setdefault(path, {})[row.method.lower()] = _operation(row, path, lenient)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "cierzo",
            "version": __version__,
            "description": "Fields that are not listed are "
            + ("passed over, and named in the header x-passed-over." if lenient else "refused by name."),
        },
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR, **COMPONENTS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(row: Any, path: str, lenient: bool) -> Schema:
    """The description of an endpoint."""
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    text = " ".join((row.handler.__doc__ or "").split())
    told: Schema = {
        "summary": text.partition(". ")[0].rstrip(".") or f"{row.method} {path}",
        "responses": {"200": _answer(path), "default": {"description": "an error", "content": error}},
    }
    if not row.is_open:
        told["security"] = [{"key": []}, {}]
    if path.startswith("/health"):
        told["responses"]["503"] = {"description": "it is not so", "content": told["responses"]["200"]["content"]}
    if "{name}" in path:
        told["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": TEXT}]
    if path in TABLES:
        examples = {str(number): {"value": body} for number, body in enumerate(EXAMPLES[path], 1)}
        body = {"schema": _body(path, lenient), "examples": examples}
        told["requestBody"] = {"required": True, "content": {"application/json": body}}
    return told


def _answer(path: str) -> Schema:
    kind = KINDS.get(path, "application/json")
    content: Schema = {kind: {"schema": ANSWERS.get(path, TEXT)}}
    if "stream" in TABLES.get(path, ()):
        content["text/event-stream"] = {}
    return {"description": "the answer", "content": content}


def _body(path: str, lenient: bool) -> Schema:
    """The schema of a body: fields that are refused may say what asks for nothing."""
    fields: Schema = {}
    needed = NEEDED.get(path, [])
    for name, row in TABLES[path].items():
        told_type = OWN_TYPES.get((path, name), TYPES.get(name))
        kind: Schema = {}
        if told_type is not None:
            kind = {"type": [*told_type.split(" or "), *([] if name in needed else ["null"])]}
        if name in IN_LISTS:
            kind["items"] = {"type": IN_LISTS[name]}
        if name in ("messages", "prompt") and name in needed:
            kind |= {"minItems": 1, "minLength": 1}
        if row.treatment == "refused":
            kind = {"enum": [None, *row.harmless]}
        fields[name] = kind | ({"description": row.note} if row.note else {})
    told = {"type": "object", "properties": fields, "additionalProperties": lenient}
    return told | ({"required": needed} if needed else {})
