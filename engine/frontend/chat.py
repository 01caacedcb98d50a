"""A checkpoint's chat template: messages to the text of a prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cierzo.engine.errors import CheckpointError, InvalidRequest
from cierzo.engine.frontend.tokenizer import read_tokenizer_config
from cierzo.engine.messages import ChatMessage


class ChatTemplate:
    """A Jinja template with the helpers that templates on Hugging Face expect, in a sandbox."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        """Raises CheckpointError if `source` is not a template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(
                f"the chat template cannot be compiled: {error}", field="chat_template"
            ) from error
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def render(self, messages: Sequence[ChatMessage], reasoning_effort: str | None = None) -> str:
        """The prompt's text, up to where the assistant begins to speak.

        Raises InvalidRequest with what the template says against the messages.
        """
        effort = {} if reasoning_effort is None else {"reasoning_effort": reasoning_effort}
        try:
            return self._template.render(
                messages=[_for_template(message) for message in messages],
                add_generation_prompt=True,
                **self._tokens,
                **effort,
            )
        except Exception as error:  # a template can raise whatever its expressions raise
            raise InvalidRequest(f"the chat template refuses the messages: {error}", field="messages") from error


def load_chat_template(checkpoint_dir: Path) -> ChatTemplate | None:
    """chat_template.jinja, else the one in tokenizer_config.json, else None; raises CheckpointError."""
    config = read_tokenizer_config(checkpoint_dir)
    path = checkpoint_dir / "chat_template.jinja"
    if path.exists():
        source = _read(path)
    elif isinstance(config.chat_template, str):
        source = config.chat_template
    elif config.chat_template:
        named = {entry.name: entry.template for entry in config.chat_template}
        if "default" not in named:
            raise CheckpointError(
                "tokenizer_config.json names no default chat template",
                field="chat_template",
                value=", ".join(named),
            )
        source = named["default"]
    else:
        return None
    return ChatTemplate(source, config.spelling("bos_token"), config.spelling("eos_token"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", field="chat_template") from error


def _for_template(message: ChatMessage) -> dict[str, Any]:
    """Only what is there: templates ask for the presence of a key."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        turn["reasoning"] = turn["reasoning_content"] = message.reasoning
    if message.tool_calls:
        # `arguments` stays the text that was generated: writing the JSON anew would change the prompt's tokens
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: unlike Jinja's own filter, it escapes neither HTML nor non-ASCII text."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
