"""A checkpoint's chat template: messages to the text of a prompt, as transformers 5.23 renders them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from cierzo.engine.errors import CheckpointError, InvalidRequest
from cierzo.engine.messages import ChatMessage
from cierzo.engine.text.template_environment import template_environment
from cierzo.engine.text.tokenizer_config import read_object, read_tokenizer_config, templates_by_name
from cierzo.engine.text.tool_arguments import Arguments

MAX_REASON_CHARS = 500  # of what a template says against the messages
Shape = Callable[[Arguments], Any]  # from a call's arguments to what a template sees of them


class ChatTemplate:
    """A Jinja template with the helpers that templates on Hugging Face expect, in a sandbox."""

    def __init__(
        self,
        source: str,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Mapping[str, str] = {},
    ) -> None:
        """Compile `source`. A special token is a variable of the template, named by its role; undefined if None.

        Raises CheckpointError if `source` is not a template.
        """
        try:
            self._template = template_environment().from_string(source)
        except Exception as error:  # not only of Jinja: what it compiles to may be too deep for Python
            raise CheckpointError(
                f"the chat template cannot be compiled: {error}", field="chat_template"
            ) from error
        given = {"bos_token": bos_token, "eos_token": eos_token}
        self._tokens = {role: text for role, text in given.items() if text is not None} | dict(special_tokens)

    def render(self, messages: Sequence[ChatMessage], reasoning_effort: str | None = None) -> str:
        """The prompt's text, up to where the assistant begins to speak.

        Raises InvalidRequest with what the template says against the messages.
        """
        turns = _Turns(messages)
        context = {**self._tokens, "tools": None, "documents": None, "add_generation_prompt": True}
        if reasoning_effort is not None:
            context["reasoning_effort"] = reasoning_effort

        def text(shape: Shape) -> str:
            return self._template.render({**context, "messages": turns.seen(shape)})

        try:
            return text(_shape(text) if turns.has_mapping else _as_text)
        except Exception as error:  # a template can raise whatever its expressions raise
            said = str(error)[:MAX_REASON_CHARS]
            if turns.no_mapping is not None and isinstance(_try(text, _as_any_mapping), str):
                field, value = turns.no_mapping
                raise InvalidRequest(
                    f"{field} is no JSON object, and the chat template needs one: {said}",
                    field=field,
                    limit="a JSON object",
                    value=value,
                ) from error
            raise InvalidRequest(f"the chat template refuses the messages: {said}", field="messages") from error


class _Turns:
    """The messages of a chat on their way into a template. `no_mapping`: the first call whose arguments are no JSON
    object, as the name of the field and its text."""

    def __init__(self, messages: Sequence[ChatMessage]) -> None:
        self._messages = messages
        self._arguments = [[Arguments.parse(call.arguments) for call in turn.tool_calls] for turn in messages]
        self.has_mapping = any(arguments.value is not None for calls in self._arguments for arguments in calls)
        self.no_mapping = next(
            (
                (f"messages[{turn}].tool_calls[{call}].arguments", arguments.text)
                for turn, calls in enumerate(self._arguments)
                for call, arguments in enumerate(calls)
                if arguments.value is None
            ),
            None,
        )

    def seen(self, shape: Shape) -> list[dict[str, Any]]:
        """The messages as the template is given them, with each call's arguments in this shape."""
        return [
            _for_template(message, [shape(arguments) for arguments in calls])
            for message, calls in zip(self._messages, self._arguments, strict=True)
        ]


def _shape(text: Callable[[Shape], str]) -> Shape:
    """The shape that the template behind `text` writes, found by rendering both: text if it fails on a mapping, or
    prints both as the same JSON, because then the prompt has the tokens that were generated; else a mapping."""
    with_mapping = _try(text, lambda arguments: arguments.probe.as_mapping())
    with_text = _try(text, lambda arguments: arguments.probe.text)
    if isinstance(with_mapping, str):
        return _as_text if with_mapping == with_text else Arguments.as_mapping
    # Where both fail, the words of the template's own `raise_exception` say more than what failed in its code.
    refused = type(with_mapping) is jinja2.TemplateError and not isinstance(with_text, str)
    return Arguments.as_mapping if refused else _as_text


def _as_text(arguments: Arguments) -> str:
    return arguments.text


def _as_any_mapping(arguments: Arguments) -> Any:
    return {} if arguments.value is None else arguments.as_mapping()


def _try(text: Callable[[Shape], str], shape: Shape) -> str | Exception:
    """The text of a prompt with arguments of this shape, or the reason that there is none."""
    try:
        return text(shape)
    except Exception as error:
        return error


def load_chat_template(checkpoint_dir: Path) -> ChatTemplate | None:
    """The default chat template of a checkpoint, None where it has none; raises CheckpointError."""
    source = read_chat_templates(checkpoint_dir).get("default")
    if source is None:
        return None
    return ChatTemplate(source, special_tokens=read_tokenizer_config(checkpoint_dir).spellings)


def read_chat_templates(checkpoint_dir: Path) -> dict[str, str]:
    """The chat templates of a checkpoint by name, from the first of these places that has any: files of their own,
    tokenizer_config.json (the order of transformers' tokenizers), and what its processors alone read.

    Raises CheckpointError.
    """
    single, several = checkpoint_dir / "chat_template.jinja", checkpoint_dir / "additional_chat_templates"
    files = {"default": single} if single.exists() else {}
    files |= {path.name.removesuffix(".jinja"): path for path in several.glob("*.jinja")}
    if files:
        return {name: _read(path) for name, path in sorted(files.items())}
    templates = read_tokenizer_config(checkpoint_dir).chat_templates
    for name in ("processor_config.json", "chat_template.json"):
        if templates is None:
            path = checkpoint_dir / name
            templates = templates_by_name(path, read_object(path).get("chat_template"))
    return templates or {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", field="chat_template") from error


def _for_template(message: ChatMessage, arguments: list[Any]) -> dict[str, Any]:
    """Only what is there: templates ask for the presence of a key."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:  # under each name that a template may read
        thought = message.reasoning
        turn = {"thinking": thought, **turn, "reasoning": thought, "reasoning_content": thought}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": shaped}}
            for call, shaped in zip(message.tool_calls, arguments, strict=True)
        ]
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    return turn
