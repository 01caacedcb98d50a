"""Prompts of conversations by a checkpoint's chat template and its tokenizer, in which only the template writes
control tokens."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import msgspec

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import ChatMessage, Generate, TextChunk, ThinkingChunk, Tool, ToolCall
from cierzo.engine.text.chat import ChatTemplate
from cierzo.engine.text.image_tokens import Images
from cierzo.engine.text.spellings import Breaker, free_marks, without
from cierzo.engine.text.tokenizer import Tokenizer
from cierzo.engine.text.vocabulary import open_text, refuse_marker_at_end, refuse_unfit

THOUGHTS = {"<think>": "</think>", "[THINK]": "[/THINK]"}
MAX_SHOWN_CHARS = 200
MOST_TRIED = 8  # control tokens, each in several ways
HARMLESS = "Hi!"  # ends in no letter, beside which some tokens are none


class TemplateChat:
    """A `Chat`. Strings of clients go into the template with their spellings of control tokens broken.

    tools_template: the one that writes conversations with tools, where that is another. takes_calls: a turn may
    have calls even where the template writes none, because answers have some. takes_one_call: but not two.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        tools_template: ChatTemplate | None = None,
        *,
        takes_calls: bool = True,
    ) -> None:
        self.template = template
        self._tools_template = tools_template or template
        self._takes_calls = takes_calls
        self.takes_one_call = self._tools_template.takes_one_call
        self.writes_images = template.writes_images
        self.efforts = template.efforts()
        self.thinks_unasked = "none" not in self.efforts or template.differs_unasked("none")
        self._tokenizer = tokenizer
        self._breaker = Breaker(tokenizer.control_ids, template.literals | self._tools_template.literals)

    def encode(
        self, message: Generate, max_tokens: int | None, images: Images | None = None
    ) -> tuple[list[int], bool]:
        """Token ids of the prompt of `message.messages`, up to where the assistant begins to speak, or goes on in
        its last turn; and whether that is within a thought. Raises InvalidRequest, with the field that is wrong."""
        template = self._tools_template if message.tools else self.template
        if message.tools and not template.reads_tools:
            raise _unread(message.tools)
        turns = message.messages or []
        _check_calls(turns, template.writes_calls, self._takes_calls)
        mark, end = self._free_marks(turns, message.tools)
        goes_on = bool(turns) and turns[-1].prefix
        if goes_on:
            refuse_marker_at_end(f"messages[{len(turns) - 1}]", turns[-1], tuple(self._tokenizer.control_ids))
        breaker, may_spell = self._breaker, False

        def broken(text: str) -> str:
            nonlocal may_spell
            may_spell = may_spell or breaker.may_spell(text)
            return breaker.broken(text, mark)

        rest = (message.reasoning_effort, message.tools, f"{end} " if goes_on else "")
        try:
            rendered = self._render(turns, broken, *rest)
        except InvalidRequest:
            said = [_with_text(turn, mark) if _lacks_text(turn) else turn for turn in turns]
            if said == turns:
                raise
            turns, rendered = said, self._render(said, broken, *rest)  # the mark is no text, but not nothing
        refuse_unfit(self._tokenizer, "messages", without(mark, rendered), max_tokens)
        written = rendered
        if may_spell:
            written = self._without_heads(turns, mark, *rest)
            self._refuse_made(rendered, written)
        in_thinking = written.rstrip().endswith(tuple(THOUGHTS)) or (goes_on and self._is_within_thought(turns[-1]))
        token_ids = self._tokenizer.encode_rendered(rendered, mark)
        return token_ids if images is None else images.expand(token_ids), in_thinking

    def unsafe_places(self) -> list[str]:
        """The fields in which this template would make a control token of a client's text, because it changes what
        it is given: found by conversations that spell them in ways that templates undo."""
        controls = list(self._tokenizer.control_ids)
        sources = self.template.source + self._tools_template.source
        written = [text for text in controls if text in sources][:MOST_TRIED] or controls[:MOST_TRIED]
        together = " ".join(form for text in controls for form in (text, text.upper(), text.lower(), text[1:]))
        expected = [self._calls(*conversation) for _, conversation in _places(HARMLESS)]
        found: dict[str, None] = {}
        for spelled in (together, *(form for text in written for form in _disguises(text))):
            for right, (place, conversation) in zip(expected, _places(spelled), strict=True):
                if right is not None and place not in found and self._calls(*conversation) not in (None, right):
                    found[place] = None
        return list(found)

    def _is_within_thought(self, turn: ChatMessage) -> bool:
        """Whether the words of a turn end within a thought: one of its own, or one that they spell."""
        if is_within_thought(turn):
            return True
        text, controls = open_text(turn.content), self._tokenizer.control_ids
        spelled = {begin: end for begin, end in THOUGHTS.items() if begin not in controls}
        return any(text.rfind(begin) > text.rfind(end) for begin, end in spelled.items())

    def _without_heads(self, turns: list[ChatMessage], mark: str, *rest: Any) -> str:
        """The conversation without the characters with which a client could begin a control token; nothing where
        the template does not take that."""
        breaker = self._breaker
        try:
            return self._render(turns, lambda text: breaker.disguised(breaker.broken(text, mark)), *rest)
        except InvalidRequest:
            return ""

    def _refuse_made(self, rendered: str, without_heads: str) -> None:
        """Refuse a prompt unless its control tokens are those that are there without a client's `<` or `[`: the
        others would be a client's, put together by a template that changes texts."""
        own, found = self._tokenizer.spelled_controls(without_heads), self._tokenizer.spelled_controls(rendered)
        if own == found:
            return
        made = next(ours or theirs for ours, theirs in zip_longest(found, own) if ours != theirs)
        raise InvalidRequest(
            f"the chat template changes what it is given, and would make the control token {made} of it",
            field="messages",
            limit="texts of which the chat template makes no control token",
            value=made,
        )

    def _calls(self, turns: list[ChatMessage], tools: list[Tool]) -> list[str] | None:
        """The control tokens of a prompt; None if the template refuses it."""
        mark, _ = self._free_marks(turns, tools)
        try:
            rendered = self._render(turns, lambda text: self._breaker.broken(text, mark), None, tools, "")
        except InvalidRequest:
            return None
        return self._tokenizer.spelled_controls(rendered)

    def _free_marks(self, turns: list[ChatMessage], tools: list[Tool]) -> list[str]:
        try:
            taken = msgspec.json.encode([self.template.source, self._tools_template.source, turns, tools])
        except (RecursionError, TypeError, UnicodeEncodeError) as error:
            what = f"the messages or tools are no JSON: {error}"
            raise InvalidRequest(what, field="messages", limit="JSON", value=type(error).__name__) from error
        return free_marks(taken, 2)

    def _render(
        self,
        turns: list[ChatMessage],
        change: Callable[[str], str],
        effort: str | None,
        tools: list[Tool],
        tag: str,
    ) -> str:
        template = self._tools_template if tools else self.template
        return template.render(turns, effort, tools=tools, change=change, tag=tag)


def _check_calls(turns: list[ChatMessage], writes_calls: bool, takes_calls: bool) -> None:
    """Refuse calls and results that a template would leave out, or write without what they refer to."""
    ids: set[str] = set()
    has_calls = False
    for index, turn in enumerate(turns):
        field = f"messages[{index}]"
        has_calls = has_calls or bool(turn.tool_calls)
        if turn.tool_calls and not (writes_calls or takes_calls):
            what = f"{field} has calls, which the chat template does not write"
            raise _refused(f"{field}.tool_calls", what, "left out", len(turn.tool_calls))
        own: set[str] = set()
        for number, call in enumerate(turn.tool_calls):
            place = f"{field}.tool_calls[{number}]"
            if not call.name:
                raise _refused(f"{place}.name", f"{place} calls a tool without a name", "a name", "")
            if call.id and call.id in own:
                what = f"{place}.id is that of another call of this turn"
                raise _refused(f"{place}.id", what, "unique", call.id)
            own.add(call.id)
        ids |= own - {""}
        if turn.role != "tool" or not writes_calls:
            continue
        if not has_calls:
            what = f"{field} is a tool's result, and no turn before it calls a tool"
            raise _refused(f"{field}.role", what, "behind a turn with tool_calls", turn.role)
        if turn.tool_call_id and ids and turn.tool_call_id not in ids:
            what = f"{field} is the result of the call {turn.tool_call_id[:50]!r}, which is not before it"
            raise _refused(f"{field}.tool_call_id", what, ", ".join(sorted(ids)), turn.tool_call_id)


def _refused(field: str, what: str, limit: str, value: object) -> InvalidRequest:
    return InvalidRequest(what, field=field, limit=limit[:MAX_SHOWN_CHARS], value=str(value)[:MAX_SHOWN_CHARS])


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


def _disguises(spelling: str) -> list[str]:
    """Texts of which a template that changes letters, brackets or HTML may make the spelling."""
    inner = spelling.strip("<>[]|")
    return [
        *(spelling.upper(), inner.upper(), f"{inner}/x", html.escape(spelling)),
        *(spelling.translate(str.maketrans("<>[]", "{}()")), "{" + spelling[1:]),
    ]


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
    yield "a tool's name", ([user], [Tool(name=text, parameters={"type": "object"})])
    yield "a name in a tool's parameters", ([user], [Tool(name="f", parameters={"properties": {text: {}}})])
    calls = ChatMessage(role="assistant", tool_calls=[msgspec.structs.replace(call, name=text, id=text)])
    yield "the name or id of a call", ([user, calls, msgspec.structs.replace(answered, tool_call_id=text)], [])
    with_key = msgspec.json.encode({text: "b"}).decode()
    calls = ChatMessage(role="assistant", tool_calls=[msgspec.structs.replace(call, arguments=with_key)])
    yield "a name in the arguments of a call", ([user, calls, answered], [])
