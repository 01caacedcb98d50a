"""Checks that both ends of a connection make, of features and types: the client imports no others."""

from __future__ import annotations

import re
from operator import attrgetter

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.absent import absent
from cierzo.engine.messages import Generate, SamplingParams

# Fields of `generate`, and of its `sampling`, that belong to a feature.
FEATURE_OF_FIELD = {
    "attached": "attach",
    "idempotency_key": "resume",
    **dict.fromkeys(("tools", "tool_choice", "parallel_tool_calls", "suffix"), "parts"),
}
FEATURE_OF_PARAMETER = {
    **dict.fromkeys(("allowed_token_ids", "bad_words"), "masks"),
    "max_thinking_tokens": "parts",
}
_fields, _parameters = attrgetter(*FEATURE_OF_FIELD), attrgetter(*FEATURE_OF_PARAMETER)
_PLAIN, _PLAIN_PARAMETERS = _fields(Generate(stream=0)), _parameters(SamplingParams())
ATTACHABLE = ("text", "messages", "token_ids")


def features(message: Generate, granted: frozenset[str]) -> None:
    """Raise InvalidRequest for a field whose feature the connection does not have."""
    if (values := _fields(message)) != _PLAIN:
        for (field, feature), value, plain in zip(FEATURE_OF_FIELD.items(), values, _PLAIN, strict=True):
            if value != plain:
                require_feature(granted, feature, field, field)
    if message.messages and message.messages[-1].prefix:
        require_feature(granted, "parts", "prefix", f"messages[{len(message.messages) - 1}].prefix")
    if (values := _parameters(message.sampling)) != _PLAIN_PARAMETERS:
        rows = zip(FEATURE_OF_PARAMETER.items(), values, _PLAIN_PARAMETERS, strict=True)
        for (field, feature), value, plain in rows:
            if value != plain:
                require_feature(granted, feature, field, f"sampling.{field}")


def require_feature(granted: frozenset[str], feature: str, what: str, field: str) -> None:
    """Raise InvalidRequest if `feature`, which `what` needs, is not among those granted."""
    if feature not in granted:
        raise InvalidRequest(
            f"{what} needs the feature {feature}, which hello did not ask for or welcome did not grant",
            field=field,
            limit=f"with the feature {feature}",
        )


def undecodable(error: Exception) -> InvalidRequest:
    """The error for a message whose bytes msgspec refused."""
    not_utf8 = isinstance(error, UnicodeDecodeError)  # which does not say in which field
    return mistyped(f"a text must be UTF-8: {error}" if not_utf8 else str(error))


def mistyped(text: str) -> InvalidRequest:
    """The error for a field that msgspec refuses, as in "Expected `int`, got `str` - at `$.sampling.top_k`"."""
    reason, _, place = text.partition(" - at ")
    path = re.search(r"`\$\.?([^`]*)`", place)
    expected = re.match(r"Expected `([^`]*)`", reason)
    unknown = re.search(r"unknown field `([^`]*)`", reason)
    where = path.group(1) if path else ""
    field = ".".join(filter(None, (where, unknown.group(1) if unknown else "")))
    words = reason.removeprefix("Object contains ").replace("`", "")
    message = f"{where}: {words[:1].lower()}{words[1:]}" if where else words
    if unknown and (reason := absent(unknown.group(1))):
        return InvalidRequest(reason, field=field, limit="left out")
    return InvalidRequest(message, field=field or None, limit=expected.group(1) if expected else None)
