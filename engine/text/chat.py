"""A checkpoint's chat template: messages to the text of a prompt, as transformers 5.23 renders them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from jinja2 import meta, nodes

from cierzo.engine.errors import CheckpointError, InvalidRequest
from cierzo.engine.messages import ChatMessage, ImageChunk, TextChunk, ThinkingChunk, Tool, ToolCall
from cierzo.engine.text.spellings import each_text
from cierzo.engine.text.template_environment import template_environment
from cierzo.engine.text.tokenizer_config import IMAGE_TOKEN, read_chat_templates, read_tokenizer_config
from cierzo.engine.text.tool_arguments import Arguments

TOOLS_TEMPLATE = "tool_use"  # the name of one for conversations with tools, as transformers takes it
MAX_REASON_CHARS = 500  # of what a template says against the messages
USUAL_EFFORTS = ("none", "low", "medium", "high")
OTHER_EFFORTS = ("minimal", "xhigh", "max")  # known to few templates, which spell them
THOUGHT_SWITCHES = ("enable_thinking", "thinking")  # variables by which a template thinks or does not
REASONING_FIELDS = ("thinking", "reasoning", "reasoning_content")  # each name that a template may read
SAMPLE_CALL = ToolCall(name="sample_function", arguments='{"a": "b"}', id="abcdefghi")
SAMPLE_TOOL = Tool(name=SAMPLE_CALL.name, parameters={"type": "object", "properties": {"a": {"type": "string"}}})
SAMPLE_TURNS = (ChatMessage(role="user", content="Hi"), ChatMessage(role="assistant", tool_calls=[SAMPLE_CALL]))
_GAPS = re.compile(r"%[^a-zA-Z%]*[a-zA-Z]|\{[^{}]*\}")  # in a string, where formatting puts another one
Shape = Callable[[Arguments], Any]  # from a call's arguments to what a template sees of them


class ChatTemplate:
    """A Jinja template with the helpers that templates on Hugging Face expect, in a sandbox.

    literals: the strings that it writes itself, or may. reads_tools: tools that it is given come into its text, or
    may. writes_calls: so do the calls of a turn.
    """

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
            environment = template_environment()
            tree = environment.parse(source)
            self._variables = meta.find_undeclared_variables(tree)
            self._template = environment.from_string(source)
        except Exception as error:  # not only of Jinja: what it compiles to may be too deep for Python
            raise CheckpointError(
                f"the chat template cannot be compiled: {error}", field="chat_template"
            ) from error
        self.source = source
        written = [node.data for node in tree.find_all(nodes.TemplateData)]
        constants = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        self.literals = {*written, *constants, *(piece for text in constants for piece in _GAPS.split(text))}
        self.reads_tools = "tools" in self._variables
        given = {"bos_token": bos_token, "eos_token": eos_token}
        self._tokens = {role: text for role, text in given.items() if text is not None} | dict(special_tokens)

    def render(
        self,
        messages: Sequence[ChatMessage],
        reasoning_effort: str | None = None,
        *,
        tools: Sequence[Tool] = (),
        change: Callable[[str], str] = str,
        tag: str = "",
    ) -> str:
        """The prompt's text, up to where the assistant begins to speak.

        change: what is made of each string of messages and tools on its way into the template. tag: a character
        that none of them holds, and a space: the answer goes on with the words of the last turn, and the text ends
        there.

        Raises InvalidRequest with what the template says against the messages.
        """
        turns = _Turns(messages, change, tag)
        context = {**self._tokens, "documents": None, "add_generation_prompt": not tag}
        if reasoning_effort is not None:
            switches = dict.fromkeys(self._variables.intersection(THOUGHT_SWITCHES), reasoning_effort != "none")
            context |= {"reasoning_effort": reasoning_effort, **switches}

        def text(shape: Shape) -> str:
            shown = [_tool_for_template(tool, change) for tool in tools] or None
            return self._template.render({**context, "tools": shown, "messages": turns.seen(shape)})

        try:
            rendered = text(_shape(text) if turns.has_mapping else _as_text)
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
            raise InvalidRequest(
                f"the chat template refuses the messages: {said}",
                field="messages",
                limit="what the chat template takes",
                value=f"turns of {', '.join(turn.role for turn in messages)}",
            ) from error
        return _cut(rendered, tag, f"messages[{len(messages) - 1}].prefix") if tag else rendered

    @cached_property
    def writes_calls(self) -> bool:
        """Whether the calls of a turn come into its text, or may."""
        without = (SAMPLE_TURNS[0], ChatMessage(role="assistant"))
        try:
            return any(
                self.render(SAMPLE_TURNS, tools=tools) != self.render(without, tools=tools)
                for tools in ((), (SAMPLE_TOOL,))
            )
        except InvalidRequest:
            return True  # in some other conversation, it may

    @cached_property
    def writes_images(self) -> bool:
        """Whether it writes the token of an image where a user's turn has one."""
        turn = ChatMessage(role="user", content=[TextChunk(text="Hi"), ImageChunk()])
        try:
            return self.render([turn]).count(IMAGE_TOKEN) == 1
        except InvalidRequest:
            return False

    @cached_property
    def takes_one_call(self) -> bool:
        """Whether it refuses a turn with two calls, and not one with one."""
        user, turn = SAMPLE_TURNS
        calls = [SAMPLE_CALL, msgspec.structs.replace(SAMPLE_CALL, id="123456789")]
        try:
            self.render(SAMPLE_TURNS, tools=(SAMPLE_TOOL,))
        except InvalidRequest:
            return False
        try:
            self.render((user, msgspec.structs.replace(turn, tool_calls=calls)), tools=(SAMPLE_TOOL,))
        except InvalidRequest:
            return True
        return False

    def efforts(self) -> tuple[str, ...]:
        """Words that `reasoning_effort` may say: each that the template does not refuse, and that makes a
        difference to what it writes, or that it names."""
        if not self._variables.intersection(("reasoning_effort", *THOUGHT_SWITCHES)):
            return ()
        other = self._with_effort("no such effort")
        usual = [word for word in USUAL_EFFORTS if self._knows(word, other)]
        return (*usual, *(word for word in OTHER_EFFORTS if self._names(word) and self._knows(word, other)))

    def differs_unasked(self, effort: str) -> bool:
        """Whether a prompt of this effort is another one than where none is said."""
        return self._with_effort(effort) != self._with_effort(None)

    def _knows(self, effort: str, other: str | None) -> bool:
        text = self._with_effort(effort)
        is_switch = not self._variables.isdisjoint(THOUGHT_SWITCHES)
        return text is not None and (text != other or is_switch or self._names(effort))

    def _names(self, effort: str) -> bool:
        return f"'{effort}'" in self.source or f'"{effort}"' in self.source

    def _with_effort(self, effort: str | None) -> str | None:
        try:
            return self.render([ChatMessage(role="user", content="Hi")], effort)
        except InvalidRequest:
            return None


def _cut(rendered: str, tag: str, field: str) -> str:
    """The text up to the tag; as in transformers, without the spaces before it where the template cut off the tag's
    own."""
    place = rendered.rfind(tag.rstrip())
    if place < 0:
        raise InvalidRequest(
            "the chat template does not write the words of the last turn, so that no answer can go on with them",
            field=field,
            limit="left out",
            value=True,
        )
    return rendered[:place] if rendered.startswith(tag, place) else rendered[:place].rstrip()


class _Words:
    """The words of a turn as a template has them: a text, and before it a thought. `is_open`: the answer goes on
    with the thought."""

    def __init__(self, turn: ChatMessage, field: str) -> None:
        """A thought after text is left out: no template can write that. Raises InvalidRequest where an answer is to
        go on with it, and for one that is not of the assistant."""
        chunks = [TextChunk(turn.content)] if isinstance(turn.content, str) else turn.content
        self.text, self.thought, self.is_open = "", turn.reasoning, False
        self.parts: list[str | None] = []  # texts, and None for an image; nothing where there is none
        if any(isinstance(chunk, ImageChunk) for chunk in chunks):
            shown = [chunk for chunk in chunks if not isinstance(chunk, ThinkingChunk)]
            self.parts = [chunk.text if isinstance(chunk, TextChunk) else None for chunk in shown]
        for chunk in chunks:
            if isinstance(chunk, ImageChunk):
                continue
            if isinstance(chunk, TextChunk):
                self.text, self.is_open = self.text + chunk.text, False
            elif self.text and turn.role == "assistant" and chunk.closed and not turn.prefix:
                continue  # a model may think so, but no template writes it
            elif self.text or turn.role != "assistant":
                limit = "before the text of an assistant's turn"
                what = f"a thought where the chat template writes none; it does {limit}"
                raise InvalidRequest(f"{field} has {what}", field=field, limit=limit, value=turn.role)
            else:
                self.thought += chunk.thinking
                self.is_open = not chunk.closed


class _Turns:
    """The messages of a chat on their way into a template. `no_mapping`: the first call whose arguments are no JSON
    object, as the name of the field and its text."""

    def __init__(self, messages: Sequence[ChatMessage], change: Callable[[str], str], tag: str) -> None:
        self._messages, self._change, self._tag = messages, change, tag
        self._words = [_Words(turn, f"messages[{number}].content") for number, turn in enumerate(messages)]
        self._arguments = [
            [Arguments.parse(call.arguments, change) for call in turn.tool_calls] for turn in messages
        ]
        self.has_mapping = any(arguments.value is not None for calls in self._arguments for arguments in calls)
        self.no_mapping = next(
            (
                (f"messages[{turn}].tool_calls[{call}].arguments", messages[turn].tool_calls[call].arguments)
                for turn, calls in enumerate(self._arguments)
                for call, arguments in enumerate(calls)
                if arguments.value is None
            ),
            None,
        )

    def seen(self, shape: Shape) -> list[dict[str, Any]]:
        """The messages as the template is given them, with each call's arguments in this shape."""
        last = len(self._messages) - 1
        return [
            self._for_template(number, self._tag if number == last else "", [shape(each) for each in calls])
            for number, calls in enumerate(self._arguments)
        ]

    def _for_template(self, number: int, tag: str, arguments: list[Any]) -> dict[str, Any]:
        """Only what is there: templates ask for the presence of a key."""
        message, words, change = self._messages[number], self._words[number], self._change
        thought = change(words.thought) + (tag if words.is_open else "")
        content: Any = change(words.text) + ("" if words.is_open else tag)
        if words.parts:
            content = [_part_for_template(part, change) for part in words.parts]
        turn: dict[str, Any] = {"role": message.role, "content": content}
        if thought:
            first, *others = REASONING_FIELDS
            turn = {first: thought, **turn, **dict.fromkeys(others, thought)}
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": change(call.id),
                    "type": "function",
                    "function": {"name": change(call.name), "arguments": shaped},
                }
                for call, shaped in zip(message.tool_calls, arguments, strict=True)
            ]
        if message.tool_call_id:
            turn["tool_call_id"] = change(message.tool_call_id)
        if message.name:
            turn["name"] = change(message.name)
        return turn


def _part_for_template(part: str | None, change: Callable[[str], str]) -> dict[str, str]:
    """A part of a content as transformers' processors write it."""
    return {"type": "image"} if part is None else {"type": "text", "text": change(part)}


def _tool_for_template(tool: Tool, change: Callable[[str], str]) -> dict[str, Any]:
    function = {
        "name": change(tool.name),
        "description": change(tool.description),
        "parameters": each_text(tool.parameters, change),
    }
    return {"type": "function", "function": function}


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


def load_chat_template(checkpoint_dir: Path, name: str = "default") -> ChatTemplate | None:
    """A chat template of a checkpoint, None where it has none of this name; raises CheckpointError."""
    source = read_chat_templates(checkpoint_dir).get(name)
    if source is None:
        return None
    return ChatTemplate(source, special_tokens=read_tokenizer_config(checkpoint_dir).spellings)
