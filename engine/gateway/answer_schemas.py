"""JSON schemas of answers, endpoint by endpoint, for the OpenAPI document: what a client may rely on."""

from __future__ import annotations

from typing import Any

import msgspec

from cierzo.engine.gateway.state import PageState

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
FLAG: Schema = {"type": "boolean"}


def _or_null(*kinds: str) -> Schema:
    return {"type": [*kinds, "null"]}


def _object(**fields: Schema) -> Schema:
    """An object that has all of these fields, and may have others."""
    return {"type": "object", "required": [*fields], "properties": fields}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _completion(kind: str, **choice: Schema) -> Schema:
    """An object of OpenAI's with choices, each with an end and these fields."""
    finish: Schema = {"enum": ["stop", "length", "tool_calls"]}
    return _object(
        id=TEXT,
        object={"const": kind},
        created=INTEGER,
        model=TEXT,
        choices=_list(_object(index=INTEGER, finish_reason=finish, logprobs=_or_null("object"), **choice)),
        usage=_object(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER),
    )


_MESSAGE = _object(role={"const": "assistant"}, content=_or_null("string", "array"))
_CHAT = _completion("chat.completion", message=_MESSAGE)
_RESPONSE = _object(
    id=TEXT,
    object={"const": "response"},
    created_at=INTEGER,
    model=TEXT,
    status={"enum": ["completed", "incomplete"]},
    output=_list(_object(type={"enum": ["message", "reasoning", "function_call"]}, id=TEXT)),
    usage=_object(input_tokens=INTEGER, output_tokens=INTEGER, total_tokens=INTEGER),
)
_MODEL = _object(id=TEXT, object={"const": "model"}, created=INTEGER, owned_by=TEXT, max_model_len=INTEGER)
_TOKENS = _object(
    count=INTEGER, max_model_len=INTEGER, tokens=_list(INTEGER), token_strs=_or_null("array") | {"items": TEXT}
)
_NAMES = ("bos_token", "eos_token", "pad_token", "chat_template")
_TOKENIZER = _object(tokenizer_class=TEXT, model_max_length=INTEGER, **dict.fromkeys(_NAMES, _or_null("string")))


def _probe(name: str) -> Schema:
    return _object(**{name: FLAG}, state=TEXT, notes=_list(TEXT))


(_STATE,), COMPONENTS = msgspec.json.schema_components([PageState], ref_template="#/components/schemas/{name}")
ANSWERS: dict[str, Schema] = {
    "/v1/chat/completions": _CHAT,
    "/v1/completions": _completion("text_completion", text=TEXT),
    "/v1/fim/completions": _CHAT,
    "/v1/responses": _RESPONSE,
    "/v1/models": _object(object={"const": "list"}, data=_list(_MODEL)),
    "/v1/models/{name}": _MODEL,
    "/tokenize": _TOKENS,
    "/detokenize": _object(prompt=TEXT),
    "/tokenizer_info": _TOKENIZER,
    "/version": _object(version=TEXT),
    "/health": _probe("ready"),
    **{f"/health/{name}": _probe(name) for name in ("startup", "live", "ready")},
    "/page/state": _STATE,
}
