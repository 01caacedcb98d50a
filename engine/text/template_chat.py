"""Prompts of conversations by a checkpoint's chat template and its tokenizer, in which only the template writes
control tokens."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import ChatMessage, Generate, TextChunk, ThinkingChunk, Tool, ToolCall
from cierzo.engine.text.chat import ChatTemplate
from cierzo.engine.text.spellings import Breaker, free_marks, without
from cierzo.engine.text.tokenizer import Tokenizer
from cierzo.engine.text.vocabulary import refuse_marker_at_end, refuse_unfit

THOUGHT_OPENINGS = ("<think>", "[THINK]")
HARMLESS = "Hi!"  # ends in no letter, beside which some tokens are none


class TemplateChat:
    """A `Chat`. Strings of clients go into the template with their spellings of control tokens broken."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.template = template
        self.efforts = template.efforts()
        self._tokenizer = tokenizer
        self._breaker = Breaker(tokenizer.control_ids, template.literals)

    def encode(self, message: Generate, max_tokens: int | None) -> tuple[list[int], bool]:
        """Token ids of the prompt of `message.messages`, up to where the assistant begins to speak, or goes on in
        its last turn; and whether that is within a thought. Raises InvalidRequest, with the field that is wrong."""
        if message.tools and not self.template.reads_tools:
            raise _unread(message.tools)
        turns = message.messages or []
        mark, end = self._free_marks(turns, message.tools)
        goes_on = bool(turns) and turns[-1].prefix
        if goes_on:
            refuse_marker_at_end(f"messages[{len(turns) - 1}]", turns[-1], tuple(self._tokenizer.control_ids))
        rest = (message.tools, message.reasoning_effort, mark, f"{end} " if goes_on else "")
        try:
            rendered = self._render(turns, *rest)
        except InvalidRequest:
            said = [_with_text(turn, mark) if _lacks_text(turn) else turn for turn in turns]
            if said == turns:
                raise
            rendered = self._render(said, *rest)  # the mark is no text, but some templates refuse to write none
        refuse_unfit(self._tokenizer, "messages", without(mark, rendered), max_tokens)
        in_thinking = rendered.rstrip().endswith(THOUGHT_OPENINGS) or (goes_on and is_within_thought(turns[-1]))
        return self._tokenizer.encode_rendered(rendered, mark), in_thinking

    def unsafe_places(self) -> list[str]:
        """The fields in which this template would let a client's text become a control token, because it changes
        what it is given: found by a conversation that spells them all."""
        spelled = " ".join(
            form for text in self._tokenizer.control_ids for form in (text, text.upper(), text.lower(), text[1:])
        )
        return [
            place
            for (place, harmless), (_, spelling) in zip(_places(HARMLESS), _places(spelled), strict=True)
            if (expected := self._calls(*harmless)) is not None and self._calls(*spelling) not in (None, expected)
        ]

    def _calls(self, turns: list[ChatMessage], tools: list[Tool]) -> list[int] | None:
        """The control tokens of a prompt; None if the template refuses it."""
        mark, _ = self._free_marks(turns, tools)
        try:
            ids = self._tokenizer.encode_rendered(self._render(turns, tools, None, mark, ""), mark)
        except InvalidRequest:
            return None
        controls = set(self._tokenizer.control_ids.values())
        return [token_id for token_id in ids if token_id in controls]

    def _free_marks(self, turns: list[ChatMessage], tools: list[Tool]) -> list[str]:
        try:
            taken = msgspec.json.encode([self.template.source, turns, tools])
        except (RecursionError, TypeError, UnicodeEncodeError) as error:
            what = f"the messages or tools are no JSON: {error}"
            raise InvalidRequest(what, field="messages", limit="JSON", value=type(error).__name__) from error
        return free_marks(taken, 2)

    def _render(self, turns: list[ChatMessage], tools: list[Tool], effort: str | None, mark: str, tag: str) -> str:
        breaker = self._breaker
        return self.template.render(
            turns, effort, tools=tools, change=lambda text: breaker.broken(text, mark), tag=tag
        )


def _lacks_text(turn: ChatMessage) -> bool:
    """Whether a turn of the assistant has neither text nor calls: the answer was cut, or a broken call."""
    chunks = [TextChunk(text=turn.content)] if isinstance(turn.content, str) else turn.content
    has_text = any(isinstance(chunk, TextChunk) and chunk.text for chunk in chunks)
    return turn.role == "assistant" and not (turn.tool_calls or turn.prefix or has_text)


def _with_text(turn: ChatMessage, text: str) -> ChatMessage:
    content = text if isinstance(turn.content, str) else [*turn.content, TextChunk(text=text)]
    return msgspec.structs.replace(turn, content=content)


def _unread(tools: list[Tool]) -> InvalidRequest:
    return InvalidRequest(
        "the chat template reads no tools, so the served model would not hear of them",
        field="tools",
        limit="left out",
        value=", ".join(tool.name for tool in tools),
    )


def is_within_thought(turn: ChatMessage) -> bool:
    """Whether the words of a turn end within a thought."""
    chunks = [] if isinstance(turn.content, str) else turn.content
    return any(isinstance(chunk, ThinkingChunk) and not chunk.closed for chunk in chunks[-1:])


def _places(text: str) -> Iterator[tuple[str, tuple[list[ChatMessage], list[Tool]]]]:
    """Fields of clients' strings, each with a conversation and tools where `text` stands in it."""
    user, answer = ChatMessage(role="user", content=HARMLESS), ChatMessage(role="assistant", content=HARMLESS)
    call = ToolCall(name="f", arguments='{"a": "b"}', id="abcdefghi")
    with_text = msgspec.json.encode({"a": text}).decode()
    answered = ChatMessage(role="tool", content=HARMLESS, tool_call_id=call.id, name="f")
    yield "the content of a system turn", ([ChatMessage(role="system", content=text), user], [])
    yield "the content of a user's turn", ([ChatMessage(role="user", content=text)], [])
    yield "the content of an assistant's turn", ([user, ChatMessage(role="assistant", content=text), user], [])
    yield "a thought", ([user, ChatMessage(role="assistant", content=HARMLESS, reasoning=text)], [])
    calls = ChatMessage(role="assistant", tool_calls=[msgspec.structs.replace(call, arguments=with_text)])
    yield "the arguments of a call", ([user, calls, answered], [])
    calls = ChatMessage(role="assistant", tool_calls=[call])
    yield "the result of a call", ([user, calls, msgspec.structs.replace(answered, content=text), answer, user], [])
    yield "a tool's description", ([user], [Tool(name="f", description=text, parameters={"type": "object"})])
    yield "a tool's parameters", ([user], [Tool(name="f", parameters={"properties": {"a": {"description": text}}})])
