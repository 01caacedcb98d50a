"""Checks of a conversation, of the tools that an answer may call, and of a text whose middle is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.bounds import MAX_SHOWN_CHARS, count, json_text, one_of, shown
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.messages import ChatMessage, Generate, ThinkingChunk, Tool
from cierzo.engine.text.tool_names import TOOL_NAME, is_tool_name

ROLES = ("system", "user", "assistant", "tool")
TOOL_CHOICES = ("auto", "none", "required")
MAX_TOOLS = 512
# Fields of a turn that belong to some roles.
ROLES_OF_FIELD = {
    **dict.fromkeys(("reasoning", "tool_calls", "prefix"), ("assistant",)),
    **dict.fromkeys(("tool_call_id", "name"), ("tool",)),
}
THINKERS = ("assistant", "system")  # whose content may have thoughts
_PLAIN = ChatMessage(role="")


def conversation(message: Generate, config: FrontendConfig, efforts: Sequence[str] | None) -> None:
    """Check what a message says of turns, tools and suffix; raises InvalidRequest.

    efforts: the words that `reasoning_effort` may say to the served model; None: not known here.
    """
    if message.messages is not None:
        _turns(message.messages, config)
    is_chat = message.messages is not None or message.attached == "messages"
    if message.reasoning_effort is not None:
        if not is_chat:
            raise _without("reasoning_effort", "messages", message.reasoning_effort)
        if efforts is not None:
            _effort(message.reasoning_effort, efforts)
    if message.tools:
        if not is_chat:
            raise _without("tools", "messages", ", ".join(tool.name for tool in message.tools))
        _tools(message.tools)
    if message.tool_choice not in ("auto", "none"):
        _choice(message)
    if message.suffix is not None and message.text is None and message.attached != "text":
        raise _without("suffix", "text", message.suffix)


def _without(field: str, prompt: str, value: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field} belongs to a prompt of {prompt}", field=field, limit=f"with {prompt}", value=shown(value)
    )


def _effort(effort: str, efforts: Sequence[str]) -> None:
    if efforts:
        one_of("reasoning_effort", effort, efforts)
        return
    raise InvalidRequest(
        "the served model has no reasoning_effort to choose",
        field="reasoning_effort",
        limit="left out",
        value=effort,
    )


def _turns(turns: list[ChatMessage], config: FrontendConfig) -> None:
    if not turns:
        raise InvalidRequest("messages is empty", field="messages", limit="at least 1", value=0)
    count("messages", turns, config.max_turns)
    for field, num in (
        ("messages.tool_calls", sum(len(turn.tool_calls) for turn in turns)),
        ("messages.content", sum(len(turn.content) for turn in turns if not isinstance(turn.content, str))),
    ):
        if num > config.max_turns:
            raise InvalidRequest(
                f"{field} has {num} entries in all turns, allowed: {config.max_turns}",
                field=field,
                limit=config.max_turns,
                value=num,
            )
    for number, turn in enumerate(turns):
        field = f"messages[{number}]"
        one_of(f"{field}.role", turn.role, ROLES)
        for name, roles in ROLES_OF_FIELD.items():
            if turn.role not in roles and (value := getattr(turn, name)) != getattr(_PLAIN, name):
                raise _misplaced(f"{field}.{name}", f"a turn of the role {roles[0]}", value)
        _prefix(turn, field, is_last=number == len(turns) - 1)
        if not isinstance(turn.content, str):
            _thoughts(turn, field)
    _results(turns)


def _prefix(turn: ChatMessage, field: str, *, is_last: bool) -> None:
    if turn.prefix and not is_last:
        raise _misplaced(f"{field}.prefix", "the last turn", value=True)
    if turn.prefix and turn.tool_calls:
        raise _misplaced(f"{field}.prefix", "a turn without tool_calls, which end it", value=True)


def _thoughts(turn: ChatMessage, field: str) -> None:
    for number, chunk in enumerate(turn.content):
        if not isinstance(chunk, ThinkingChunk):
            continue  # images: image_parts.py
        place = f"{field}.content[{number}]"
        if turn.role not in THINKERS:
            raise _misplaced(place, f"a turn of the role {' or '.join(THINKERS)}", turn.role, "a thought")
        if not chunk.closed and not (turn.prefix and number == len(turn.content) - 1):
            raise _misplaced(
                f"{place}.closed", "the end of a turn with prefix", False, "a thought that is not closed"
            )


def _results(turns: list[ChatMessage]) -> None:
    """Check that results name calls of the turn before them, each once, and that no call with an id lacks one."""
    open_ids: set[str] = set()
    known: set[str] = set()
    for number, turn in enumerate(turns):
        field = f"messages[{number}]"
        if turn.role != "tool":
            _all_there(open_ids, field)
            open_ids = known = _ids(turn, field)
        elif turn.tool_call_id and known:
            if turn.tool_call_id not in open_ids:
                what = (
                    "has its result already" if turn.tool_call_id in known else "is no call of the turn before it"
                )
                raise InvalidRequest(
                    f"{field}.tool_call_id {what}: {turn.tool_call_id[:MAX_SHOWN_CHARS]!r}",
                    field=f"{field}.tool_call_id",
                    limit=", ".join(sorted(open_ids)) or "none",
                    value=turn.tool_call_id,
                )
            open_ids = open_ids - {turn.tool_call_id}
        else:
            open_ids = set()  # results without names are in the order of the calls
    _all_there(open_ids, f"messages[{len(turns)}]")


def _ids(turn: ChatMessage, field: str) -> set[str]:
    """The ids of a turn's calls. Raises InvalidRequest for one that is there twice."""
    ids: set[str] = set()
    for number, call in enumerate(turn.tool_calls):
        if call.id and call.id in ids:
            place = f"{field}.tool_calls[{number}].id"
            what = f"{place} is that of another call of this turn: {call.id[:MAX_SHOWN_CHARS]!r}"
            raise InvalidRequest(what, field=place, limit="unique", value=call.id)
        ids.add(call.id)
    return ids - {""}


def _all_there(open_ids: set[str], field: str) -> None:
    if open_ids:
        ids = ", ".join(sorted(open_ids))
        raise InvalidRequest(
            f"{field} must be the result of a call that has none yet: {ids}",
            field=field,
            limit="a result for each call",
            value=ids,
        )


def _choice(message: Generate) -> None:
    """Check that there are tools of which one must be called, and that one by name is among them."""
    choice, names = message.tool_choice, [tool.name for tool in message.tools]
    if choice == "required" and not names:
        what = "tool_choice is required, and there are no tools"
        raise InvalidRequest(what, field="tool_choice", limit="with tools", value=choice)
    if choice != "required" and choice not in names:
        limit = ", ".join((*TOOL_CHOICES, "the name of one of tools"))
        what = f"tool_choice is {choice[:MAX_SHOWN_CHARS]!r}, allowed: {limit}"
        raise InvalidRequest(what, field="tool_choice", limit=limit, value=shown(choice))


def _tools(tools: list[Tool]) -> None:
    count("tools", tools, MAX_TOOLS)
    names = set()
    for number, tool in enumerate(tools):
        field, name = f"tools[{number}].name", tool.name
        if not is_tool_name(name):
            what = f"{field} is {name[:MAX_SHOWN_CHARS]!r}, allowed: {TOOL_NAME}"
            raise InvalidRequest(what, field=field, limit=TOOL_NAME, value=name)
        if name in names:
            raise InvalidRequest(f"{field} is there twice: {name}", field=field, limit="once", value=name)
        names.add(name)
        _parameters(f"tools[{number}].parameters", tool)


def _parameters(field: str, tool: Tool) -> None:
    kind = tool.parameters.get("type", "object")
    if kind != "object":
        raise InvalidRequest(
            f"{field}.type is {str(kind)[:MAX_SHOWN_CHARS]!r}, allowed: object",
            field=field,
            limit="object",
            value=shown(kind),
        )
    json_text(field, tool.parameters)


def _misplaced(field: str, place: str, value: object, what: str = "") -> InvalidRequest:
    return InvalidRequest(
        f"{field}: {what or field.rpartition('.')[2]} belongs to {place}",
        field=field,
        limit=place,
        value=shown(value),
    )
