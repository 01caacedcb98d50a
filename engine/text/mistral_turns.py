"""Turns of a conversation as mistral-common's messages.

It refuses what its models were not trained on, and does not say where that stands. All of it is looked for here
first, so that an error names the field, the limit and the value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import count

import msgspec
from mistral_common.protocol.instruct import chunk as theirs
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.tool_calls import FunctionCall
from mistral_common.protocol.instruct.tool_calls import ToolCall as TheirCall

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import ChatMessage, ImageChunk, TextChunk, ThinkingChunk, ToolCall
from cierzo.engine.text.tool_arguments import Arguments
from cierzo.engine.text.tool_names import TOOL_NAME, is_tool_name
from cierzo.engine.text.vocabulary import refuse_marker_at_end, words_of

Message = SystemMessage | UserMessage | AssistantMessage | ToolMessage
FOLLOWERS = {
    "system": ("system", "user", "assistant"),
    "user": ("user", "assistant", "system"),
    "assistant": ("assistant", "user", "tool"),
    "tool": ("tool", "assistant", "user"),
}
_OLD_ID = re.compile(r"[a-zA-Z0-9]{9}")
_NO_ID = "null"  # mistral-common's word for a call that has none
MAX_VALUE_CHARS = 200


class Rules(msgspec.Struct, frozen=True):
    """Limits of a version of the tokenizer. `thinkers`: roles whose content may hold thoughts. `markers`: how its
    control tokens are spelled. `think_tags`: what stands around a thought, where that is text. `seers`: roles whose
    content may hold images."""

    version: int
    thinkers: tuple[str, ...]
    markers: tuple[str, ...]
    think_tags: tuple[str, ...] = ()
    seers: tuple[str, ...] = ()


def their_messages(turns: Sequence[ChatMessage], rules: Rules) -> list[Message]:
    """The conversation for mistral-common, in which an image is called by its number. Raises InvalidRequest, with
    the field that is wrong."""
    if not turns:
        raise _refused("messages", "messages is empty", "at least 1", 0)
    _check_order(turns, rules)
    numbers = count()
    messages = [_message(f"messages[{index}]", turn, rules, numbers) for index, turn in enumerate(turns)]
    _check_results(turns)
    refuse_marker_at_end(f"messages[{len(turns) - 1}]", turns[-1], rules.markers)
    return messages


def is_within_thought(turns: Sequence[ChatMessage]) -> bool:
    """Whether the answer goes on within a thought."""
    last = turns[-1]
    chunk = last.content[-1] if isinstance(last.content, list) and last.content else None
    return last.prefix and isinstance(chunk, ThinkingChunk) and not chunk.closed


def texts(turns: Sequence[ChatMessage]) -> Iterator[str]:
    """Whatever of the turns comes into the prompt as it is: a result is written anew by old versions."""
    for turn in turns:
        if turn.role != "tool":
            yield turn.reasoning
            chunks = [TextChunk(text=turn.content)] if isinstance(turn.content, str) else turn.content
            yield from map(words_of, chunks)


# --- the order of turns ------------------------------------------------------------------------------------


def _check_order(turns: Sequence[ChatMessage], rules: Rules) -> None:
    last = len(turns) - 1
    for index, turn in enumerate(turns):
        before = turns[index - 1].role if index else None
        allowed = tuple(FOLLOWERS) if before is None else FOLLOWERS[before]
        if turn.role not in allowed:
            what = f"messages[{index}] is of the role {turn.role[:50]!r}, which cannot follow {before!r}"
            raise _refused(f"messages[{index}].role", what, ", ".join(allowed), turn.role)
        if turn.prefix and (turn.role != "assistant" or index != last):
            what = f"messages[{index}] cannot be continued: it is not the last turn, or not the assistant's"
            raise _refused(f"messages[{index}].prefix", what, "the last turn, if it is the assistant's", True)
    if turns[last].role == "assistant" and not turns[last].prefix:
        what = "the last turn is the assistant's already; to have it continued, set its prefix"
        raise _refused(f"messages[{last}].role", what, "user, tool, or assistant with prefix", "assistant")
    if last == 0 and turns[0].role not in ("user", "system"):
        what = "messages[0] is the assistant's, and nobody has spoken before it"
        if turns[0].role == "tool":
            what = "messages[0] is a tool's result, and no turn before it calls a tool"
        raise _refused("messages[0].role", what, "user, system", turns[0].role)


def _check_results(turns: Sequence[ChatMessage]) -> None:
    """Each call has one result before the assistant speaks again, or is to speak."""
    calls: dict[str, str] = {}  # id -> field, of those without a result
    seen: set[str] = set()
    for index, turn in enumerate(turns):
        field = f"messages[{index}]"
        if turn.role == "tool":
            if turn.tool_call_id not in calls:
                why = "has a result already" if turn.tool_call_id in seen else "is not of the calls before it"
                what = f"{field} is the result of the call {turn.tool_call_id[:50]!r}, which {why}"
                raise _refused(f"{field}.tool_call_id", what, ", ".join(calls) or "no call", turn.tool_call_id)
            seen.add(turn.tool_call_id)
            del calls[turn.tool_call_id]
        elif turn.role == "assistant":
            _check_answered(calls)
            seen.clear()
            for number, call in enumerate(turn.tool_calls):
                place = f"{field}.tool_calls[{number}].id"
                if call.id in calls:
                    raise _refused(place, f"{place} is that of another call of this turn", "unique", call.id)
                calls[call.id] = place
    _check_answered(calls)


def _check_answered(calls: dict[str, str]) -> None:
    for call_id, place in calls.items():
        field = place.removesuffix(".id")
        raise _refused(
            field, f"the call {call_id!r} has no result", "a turn of the role tool for each call", call_id
        )


# --- one turn ----------------------------------------------------------------------------------------------


def _message(field: str, turn: ChatMessage, rules: Rules, numbers: Iterator[int]) -> Message:
    if turn.role != "assistant":
        if turn.tool_calls:
            what = f"{field} has calls and is of the role {turn.role}"
            raise _refused(f"{field}.tool_calls", what, "of the assistant alone", len(turn.tool_calls))
        if turn.reasoning:
            what = f"{field} has reasoning and is of the role {turn.role}"
            raise _refused(f"{field}.reasoning", what, "of the assistant alone", turn.reasoning)
    content = _content(field, turn, rules, numbers)
    match turn.role:
        case "system":
            return SystemMessage(content=content)
        case "user":
            return UserMessage(content=content)
        case "tool":
            return _result(field, turn, content, rules)
        case _:
            return _answer(field, turn, _spelled(content, rules.think_tags), rules)


def _content(
    field: str, turn: ChatMessage, rules: Rules, numbers: Iterator[int]
) -> str | list[theirs.ContentChunk]:
    """The content, with `reasoning` as a thought before it. numbers: of the images that come next."""
    if isinstance(turn.content, str) and not turn.reasoning:
        return turn.content
    chunks: list[theirs.ContentChunk] = []
    if turn.reasoning:
        _check_thinks(f"{field}.reasoning", turn, rules)
        chunks.append(theirs.ThinkChunk(thinking=turn.reasoning))
    if isinstance(turn.content, str):
        return [*chunks, theirs.TextChunk(text=turn.content)] if turn.content else chunks
    for index, chunk in enumerate(turn.content):
        place = f"{field}.content[{index}]"
        if isinstance(chunk, TextChunk):
            chunks.append(theirs.TextChunk(text=chunk.text))
            continue
        if isinstance(chunk, ImageChunk):
            _check_sees(place, turn, rules)
            chunks.append(theirs.ImageURLChunk(image_url=str(next(numbers))))
            continue
        _check_thinks(place, turn, rules)
        if turn.reasoning:
            what = f"{field} has a thought in its content and another one in reasoning"
            raise _refused(f"{field}.reasoning", what, "one of both", turn.reasoning)
        if not chunk.closed and not (turn.prefix and index == len(turn.content) - 1):
            what = f"{place} is a thought that is not closed, and the answer does not go on with it"
            raise _refused(f"{place}.closed", what, "true, but at the end of a turn with prefix", False)
        chunks.append(theirs.ThinkChunk(thinking=chunk.thinking, closed=chunk.closed))
    return chunks


def _spelled(content: str | list[theirs.ContentChunk], tags: tuple[str, ...]) -> str | list[theirs.ContentChunk]:
    """The content as the model wrote it, where it spells its thoughts."""
    if not tags or isinstance(content, str) or not any(isinstance(chunk, theirs.ThinkChunk) for chunk in content):
        return content
    begin, end = tags
    texts = []
    for chunk in content:
        if isinstance(chunk, theirs.ThinkChunk):
            texts.append(f"{begin}{chunk.thinking}{end if chunk.closed else ''}")
        elif isinstance(chunk, theirs.TextChunk):
            texts.append(chunk.text)
    return "".join(texts)


def _check_thinks(field: str, turn: ChatMessage, rules: Rules) -> None:
    if turn.role not in rules.thinkers:
        known = ", ".join(rules.thinkers)
        what = f"{field} is a thought, which a turn of the role {turn.role} cannot have with this model's tokenizer"
        raise _refused(field, f"{what} (v{rules.version})", f"in turns of: {known}" if known else "none", turn.role)


def _check_sees(field: str, turn: ChatMessage, rules: Rules) -> None:
    if turn.role not in rules.seers:
        known = ", ".join(rules.seers)
        what = f"{field} is an image, which a turn of the role {turn.role} cannot have with this model's tokenizer"
        raise _refused(field, f"{what} (v{rules.version})", f"in turns of: {known}" if known else "none", turn.role)


def _result(field: str, turn: ChatMessage, content: str | list[theirs.ContentChunk], rules: Rules) -> Message:
    _check_id(f"{field}.tool_call_id", turn.tool_call_id, rules)
    if turn.name:
        check_name(f"{field}.name", turn.name)
    return ToolMessage(content=content, tool_call_id=turn.tool_call_id, name=turn.name or None)


def _answer(field: str, turn: ChatMessage, content: str | list[theirs.ContentChunk], rules: Rules) -> Message:
    is_empty = not content or (isinstance(content, list) and not any(map(_says_something, content)))
    if is_empty and turn.prefix and not turn.tool_calls:
        what = f"{field} has nothing for the answer to go on with"
        raise _refused(f"{field}.content", what, "at least 1 character", "")
    calls = [_call(f"{field}.tool_calls[{number}]", call, rules) for number, call in enumerate(turn.tool_calls)]
    return AssistantMessage(content=content, tool_calls=calls or None, prefix=turn.prefix)


def _says_something(chunk: theirs.ContentChunk) -> bool:
    return not isinstance(chunk, theirs.TextChunk) or chunk.text != ""


def _call(field: str, call: ToolCall, rules: Rules) -> TheirCall:
    check_name(f"{field}.name", call.name)
    _check_id(f"{field}.id", call.id, rules)
    if Arguments.parse(call.arguments).value is None:
        what = f"{field}.arguments is no JSON object"
        raise _refused(f"{field}.arguments", what, "a JSON object", call.arguments)
    arguments = call.arguments if call.arguments.strip() else "{}"
    return TheirCall(id=call.id, function=FunctionCall(name=call.name, arguments=arguments))


def check_name(field: str, name: str) -> None:
    """Raise InvalidRequest for what cannot be the name of a tool."""
    if not is_tool_name(name):
        raise _refused(field, f"{field} is {name[:80]!r}, allowed: {TOOL_NAME}", TOOL_NAME, name)


def _check_id(field: str, call_id: str, rules: Rules) -> None:
    """Old tokenizers write the id of a call into the prompt, and know those of 9 characters."""
    is_old = rules.version < 13
    if call_id == _NO_ID or not (_OLD_ID.fullmatch(call_id) if is_old else call_id):
        limit = "9 of a-z, A-Z, 0-9" if is_old else f"not empty, and not {_NO_ID!r}"
        raise _refused(field, f"{field} is {call_id[:50]!r}, allowed: {limit}", limit, call_id)


def _refused(field: str, what: str, limit: str, value: object) -> InvalidRequest:
    return InvalidRequest(what, field=field, limit=limit, value=str(value)[:MAX_VALUE_CHARS])
