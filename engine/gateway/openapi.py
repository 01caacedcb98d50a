"""The OpenAPI document of the door, made of its rows and of the fields' tables, so that it says what is so.

Types of fields are told where they are simple; the tables decide what is served, and docs/http-fields.md says it in
words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cierzo import __version__
from cierzo.engine.gateway import field_rows, words
from cierzo.engine.gateway.fields import Table

Schema = dict[str, Any]
TABLES: Mapping[str, Table] = {
    "/v1/chat/completions": field_rows.CHAT,
    "/v1/completions": field_rows.COMPLETIONS,
    "/v1/fim/completions": field_rows.FIM,
    "/v1/responses": field_rows.RESPONSES,
    "/tokenize": words.TOKENIZE,
    "/detokenize": words.DETOKENIZE,
}
NEEDED = {
    "/v1/chat/completions": ["messages"],
    "/v1/completions": ["prompt"],
    "/v1/fim/completions": ["prompt"],
    "/v1/responses": ["input"],
    "/detokenize": ["tokens"],
}
STREAMS = {"/v1/chat/completions", "/v1/completions", "/v1/fim/completions", "/v1/responses"}
TEXT = {"type": "string"}
TYPES = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "n"), "integer"),
    **dict.fromkeys(("seed", "random_seed", "top_k", "top_logprobs", "priority"), "integer"),
    **dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"), "number"),
    **dict.fromkeys(("repetition_penalty", "deadline_s"), "number"),
    **dict.fromkeys(("stream", "echo", "ignore_eos", "parallel_tool_calls", "return_token_strs"), "boolean"),
    **dict.fromkeys(("model", "suffix", "reasoning_effort", "instructions"), "string"),
    **dict.fromkeys(("messages", "tools", "tokens"), "array"),
    **dict.fromkeys(("prompt", "input", "stop"), "string or array"),
    "stream_options": "object",
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
            "schemas": {"Error": ERROR},
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
        told["responses"]["503"] = {"description": "it is not so", "content": {"application/json": {"schema": {}}}}
    if "{name}" in path:
        told["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": TEXT}]
    if path in TABLES:
        told["requestBody"] = {"required": True, "content": {"application/json": {"schema": _body(path, lenient)}}}
    return told


def _answer(path: str) -> Schema:
    kind = KINDS.get(path, "application/json")
    content: Schema = {kind: {"schema": {"type": "object"} if kind == "application/json" else TEXT}}
    if path in STREAMS:
        content["text/event-stream"] = {"schema": TEXT}
    return {"description": "the answer", "content": content}


def _body(path: str, lenient: bool) -> Schema:
    """The schema of a body: fields that are refused may say what asks for nothing."""
    fields: Schema = {}
    needed = NEEDED.get(path, [])
    for name, row in TABLES[path].items():
        types = [*TYPES[name].split(" or "), *([] if name in needed else ["null"])] if name in TYPES else []
        kind: Schema = {"type": types} if types else {}
        if row.treatment == "refused":
            kind = {"enum": [None, *row.harmless]}
        fields[name] = kind | ({"description": row.note} if row.note else {})
    told = {"type": "object", "properties": fields, "additionalProperties": lenient}
    return told | ({"required": needed} if needed else {})
