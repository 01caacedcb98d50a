"""Checks that both ends of a connection make, of features and types: the client imports no others."""

from __future__ import annotations

import re
from collections.abc import Collection
from operator import attrgetter
from typing import Any, get_args

import msgspec

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.absent import absent
from cierzo.engine.frontend.bounds import missing, shown, too_deep
from cierzo.engine.messages import ChatMessage, Generate, GrammarKind, ImageChunk, SamplingParams

# Fields of `generate`, and of its `sampling`, that belong to a feature.
FEATURE_OF_FIELD = {
    "attached": "attach",
    "grammar": "grammars",
    "idempotency_key": "resume",
    "images": "images",
    **dict.fromkeys(("tools", "tool_choice", "parallel_tool_calls", "suffix"), "parts"),
    **dict.fromkeys(("caller_id", "traceparent"), "trace"),
}
FEATURE_OF_PARAMETER = {
    **dict.fromkeys(("allowed_token_ids", "bad_words"), "masks"),
    "max_thinking_tokens": "parts",
    "prompt_logprobs": "prompt_logprobs",
}
_fields, _parameters = attrgetter(*FEATURE_OF_FIELD), attrgetter(*FEATURE_OF_PARAMETER)
_PLAIN, _PLAIN_PARAMETERS = _fields(Generate(stream=0)), _parameters(SamplingParams())
ATTACHABLE = ("text", "messages", "token_ids")
CHUNKS = ("text", "thinking", "image")
MAX_PIECES = 65_536  # tokens whose bytes are told at a time
MAX_READ_AGAIN_BYTES = 64 * 1024  # of a message that is refused, for the value that was wrong in it


def features(message: Generate, granted: Collection[str]) -> None:
    """Raise InvalidRequest for a field whose feature the connection does not have."""
    if (values := _fields(message)) != _PLAIN:
        for (field, feature), value, plain in zip(FEATURE_OF_FIELD.items(), values, _PLAIN, strict=True):
            if value != plain:
                is_private = field in ("idempotency_key", "images")  # a key is a secret, a file long
                told = "given" if is_private else shown(value)
                require_feature(granted, feature, field, field, told)
        _strict(message, granted)
    for index, turn in enumerate(message.messages or ()):
        if turn.prefix or turn.name or not isinstance(turn.content, str):
            field = "prefix" if turn.prefix else "name" if turn.name else "content"
            told = "a list" if field == "content" else getattr(turn, field)
            require_feature(granted, "parts", field, f"messages[{index}].{field}", told)
            _sees(turn, f"messages[{index}].content", granted)
    if (values := _parameters(message.sampling)) != _PLAIN_PARAMETERS:
        rows = zip(FEATURE_OF_PARAMETER.items(), values, _PLAIN_PARAMETERS, strict=True)
        for (field, feature), value, plain in rows:
            if value != plain:
                require_feature(granted, feature, field, f"sampling.{field}", shown(value))


def _sees(turn: ChatMessage, field: str, granted: Collection[str]) -> None:
    """Raise InvalidRequest for an image without the feature for that."""
    if "images" not in granted and not isinstance(turn.content, str):
        for index, chunk in enumerate(turn.content):
            if isinstance(chunk, ImageChunk):
                require_feature(granted, "images", "an image", f"{field}[{index}]")


def _strict(message: Generate, granted: Collection[str]) -> None:
    """Raise InvalidRequest for calls that must come, or must hold a schema, without the feature for that."""
    if message.tool_choice not in ("auto", "none"):
        require_feature(granted, "grammars", "tool_choice", "tool_choice", shown(message.tool_choice))
    for index, tool in enumerate(message.tools):
        if tool.strict:
            require_feature(granted, "grammars", "strict", f"tools[{index}].strict", True)


def require_feature(granted: Collection[str], feature: str, what: str, field: str, value: object = "given") -> None:
    """Raise InvalidRequest if `feature`, which `what` needs, is not among those granted."""
    if feature not in granted:
        raise InvalidRequest(
            f"{what} needs the feature {feature}, which hello did not ask for or welcome did not grant",
            field=field,
            limit=f"with the feature {feature}",
            value=value,
        )


def undecodable(error: Exception, body: bytes | bytearray | memoryview) -> InvalidRequest:
    """The error for a message whose bytes msgspec refused."""
    if isinstance(error, RecursionError):
        return too_deep("tools")  # no other field holds values of any kind
    if isinstance(error, UnicodeDecodeError):  # which does not say in which field
        return mistyped(f"a text must be UTF-8: {error}")
    return mistyped(str(error), _plain_message(body))


def mistyped(text: str, message: Any = None) -> InvalidRequest:
    """The error for a field that msgspec refuses, as in "Expected `int`, got `str` - at `$.sampling.top_k`".

    message: what it was said of, in plain values; None if that is not known.
    """
    reason, _, place = text.partition(" - at ")
    path = re.search(r"`\$\.?([^`]*)`", place)
    expected = re.match(r"Expected `([^`]*)`", reason)
    lacking = re.search(r"missing required field `([^`]*)`", reason)
    unknown = re.search(r"unknown field `([^`]*)`", reason)
    where, named = path.group(1) if path else "", lacking or unknown
    field = ".".join(filter(None, (where, named.group(1) if named else "")))
    if lacking:
        return missing(field)
    value = None if message is None else _at(field, message)
    if unknown:
        what = absent(unknown.group(1)) or f"{where}: unknown field {unknown.group(1)}".removeprefix(": ")
        return InvalidRequest(what, field=field, limit="left out", value=value)
    limit = expected.group(1) if expected else None
    if re.search(r"\.content\[\d+\]\.type$", field):
        limit = ", ".join(CHUNKS)
    words = reason.replace("`", "")
    if field == "grammar.kind" and limit is None:
        limit = ", ".join(get_args(GrammarKind))
        words = f"{words}, allowed: {limit}"
    what = f"{where}: {words[:1].lower()}{words[1:]}" if where else words
    return InvalidRequest(what, field=field or None, limit=limit, value=value)


def _plain_message(body: bytes | bytearray | memoryview) -> Any:
    """The values of a message, of whatever types; None where there are too many, or none can be made."""
    if len(body) > MAX_READ_AGAIN_BYTES:
        return None
    try:
        return msgspec.msgpack.decode(body)
    except (ValueError, TypeError, RecursionError):
        return None


def _at(field: str, message: Any) -> Any:
    """The part of a message at a path such as "messages[0].role", as errors tell it; of "logit_bias[...]", all of
    it. None if there is none, as where a key is said twice."""
    try:
        for name, number in re.findall(r"(\w+)|\[(\d+)\]", field):
            message = message[name] if name else message[int(number)]
        return shown(message)
    except (LookupError, TypeError, RecursionError):
        return None
