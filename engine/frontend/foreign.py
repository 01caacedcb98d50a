"""Turns and tools as clients of OpenAI's and Mistral's interfaces write them, made into the fields of our messages.

They work on plain values, and change only what they know: all else is for the message's own types to refuse.
"""

from __future__ import annotations

from typing import Any

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.bounds import json_text, shown
from cierzo.engine.frontend.wire_checks import CHUNKS

TOOL_WORDS = ("auto", "none", "required", "any")


def turn(value: Any, field: str) -> Any:
    """A turn of a conversation. A field that is None counts as left out, as OpenAI's clients mean it."""
    if not isinstance(value, dict):
        return value
    fields = _given(value)
    if "reasoning_content" in fields:
        thought = fields.pop("reasoning_content")
        fields["reasoning"] = fields.get("reasoning") or thought
    if isinstance(content := fields.get("content"), list):
        fields["content"] = [_chunk(each, f"{field}.content[{number}]") for number, each in enumerate(content)]
    if isinstance(calls := fields.get("tool_calls"), list):
        fields["tool_calls"] = [_call(each, f"{field}.tool_calls[{number}]") for number, each in enumerate(calls)]
    return fields


def tool(value: Any, field: str) -> Any:
    """A tool that an answer may call."""
    return _function(_given(value), field) if isinstance(value, dict) else value


def tool_choice(value: Any) -> Any:
    """A choice among tools: one of them by name as that name, "any" of Mistral's interface as "required". Raises
    InvalidRequest for a tool whose name is a choice of its own."""
    if not isinstance(value, dict):
        return "required" if value == "any" else value
    name = _function(_given(value), "tool_choice").get("name")
    if isinstance(name, str) and name in TOOL_WORDS:
        what = f"tool_choice names the tool {name!r}, and that word is a choice of its own: call the tool otherwise"
        raise InvalidRequest(what, field="tool_choice", limit=f"not {', '.join(TOOL_WORDS)}", value=name)
    return value if name is None else name


def grammar(value: Any) -> Any:
    """The grammar of an answer; its schema may be a map, as those interfaces have it."""
    if isinstance(value, dict) and value.get("kind") == "json_schema" and isinstance(value.get("value"), dict):
        return {**value, "value": json_text("grammar.value", value["value"])}
    return value


def _call(value: Any, field: str) -> Any:
    if not isinstance(value, dict):
        return value
    fields = _function(_given(value), field)
    fields.pop("index", None)  # its place in the list, as deltas of an answer number it
    if isinstance(arguments := fields.get("arguments"), dict):
        fields["arguments"] = json_text(f"{field}.arguments", arguments)
    return fields


def _function(fields: dict[Any, Any], field: str) -> dict[Any, Any]:
    """The fields of a function, out of the object that says that it is one."""
    kind = fields.pop("type", "function")
    if kind != "function":
        told = shown(kind)
        what = f"{field}.type is {told!r}, allowed: function"
        raise InvalidRequest(what, field=f"{field}.type", limit="function", value=told)
    inner = fields.pop("function", None)
    return {**fields, **_given(inner)} if isinstance(inner, dict) else fields


def _chunk(value: Any, field: str) -> Any:
    if not isinstance(value, dict):
        return value
    fields, kind = _given(value), value.get("type")
    if kind == "image_url":
        return _image(fields, field)
    if kind not in CHUNKS:
        raise InvalidRequest(
            f"{field} is of type {kind!r}, allowed: {', '.join(CHUNKS)}; sounds and documents are not taken",
            field=field,
            limit=", ".join(CHUNKS),
            value="left out" if kind is None else shown(kind),
        )
    if isinstance(thoughts := fields.get("thinking"), list):  # as Mistral's interface has them
        texts = [text for each in thoughts if isinstance(each, dict) and isinstance(text := each.get("text"), str)]
        fields["thinking"] = "".join(texts) if len(texts) == len(thoughts) else thoughts
    return fields


def _image(fields: dict[Any, Any], field: str) -> Any:
    """An image as OpenAI's interface has it, an object with a URL, or as Mistral's, the URL alone."""
    given = fields.pop("image_url", None)
    inner = _given(given) if isinstance(given, dict) else {"url": given}
    inner.pop("detail", None)  # images have the size that the model takes
    if not isinstance(inner.get("url"), str):
        told = shown(inner.get("url"))
        raise InvalidRequest(f"{field}.image_url has no url", field=f"{field}.image_url", limit="a URL", value=told)
    return {**fields, **inner, "type": "image"}


def _given(fields: dict[Any, Any]) -> dict[Any, Any]:
    return {name: value for name, value in fields.items() if value is not None}
