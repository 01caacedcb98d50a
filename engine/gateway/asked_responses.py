"""Bodies of /v1/responses: its items become the turns of a conversation."""

from __future__ import annotations

from typing import Any

from cierzo.engine.frontend.bounds import count, missing, one_of, shown
from cierzo.engine.gateway.asked_grammar import read_choice, read_grammar
from cierzo.engine.gateway.asked_images import read_image
from cierzo.engine.gateway.field_rows import (
    ITEM_ROWS,
    ITEMS,
    REASONING_PART,
    REASONING_PARTS,
    RESPONSE_PART_ROWS,
    RESPONSE_PARTS,
    RESPONSE_TOOL,
    RESPONSE_TOOLS,
    RESPONSES,
)
from cierzo.engine.gateway.fields import Sieve
from cierzo.engine.gateway.reading import Asked, Body, Rules, entries, sequence, text

LOGPROBS = "message.output_text.logprobs"
# What else may be included: parts of items that no answer here has. A thought is told as it is, encrypted nowhere.
INCLUDABLE = (
    LOGPROBS,
    *("reasoning.encrypted_content", "file_search_call.results", "web_search_call.results"),
    *("web_search_call.action.sources", "message.input_image.image_url", "computer_call_output.output.image_url"),
    "code_interpreter_call.outputs",
)
ROLES = ("user", "assistant", "system", "developer")


def read_responses(body: bytes, rules: Rules) -> Asked:
    """Read what is asked for. Raises InvalidRequest with the field's place, and NotFound for another model."""
    read = Body("responses", body, RESPONSES, rules)
    given, turns = read.need("input"), _Turns(read)
    if "instructions" in read.given:
        turns.add_text("instructions", "system", text("", read.given, "instructions"))
    if isinstance(given, str):
        turns.add_text("input", "user", given)
    else:
        count("input", sequence(given, "input"), rules.max_turns)
        for place, item in entries(given, "input"):
            turns.take(item, place)
    arguments = read.arguments
    arguments["messages"] = turns.turns
    arguments.setdefault("max_tokens", rules.model.max_model_len)
    if "tools" in read.given:
        tools = entries(read.given["tools"], "tools")
        arguments["tools"] = [_tool(tool, place, read.sieve) for place, tool in tools]
    if "effort" in (reasoning := read.given.get("reasoning", {})):
        arguments["reasoning_effort"] = reasoning["effort"]
        read.places["reasoning_effort"] = "reasoning.effort"
    read_choice(read)
    read_grammar(read)
    _logprobs(read)
    return read.asked()


def _tool(tool: Any, place: str, sieve: Sieve) -> dict[str, Any]:
    sieve.kind(tool, RESPONSE_TOOLS, place)
    return sieve.served(tool, RESPONSE_TOOL, place)


def _logprobs(read: Body) -> None:
    """Ask for log-probabilities where they are to be included, or their alternatives are counted."""
    names = read.given.get("include", [])
    for place, name in entries(names, "include"):
        one_of(place, name if isinstance(name, str) else str(shown(name)), INCLUDABLE)
    top = read.integer("top_logprobs")
    if LOGPROBS in names or top:
        read.arguments["logprobs"] = top or 0
        read.places["sampling.logprobs"] = "top_logprobs"


class _Turns:
    """Turns that items make up: thoughts, text and calls that follow each other are one turn of the assistant's."""

    def __init__(self, read: Body) -> None:
        self.turns: list[dict[str, Any]] = []
        self._read = read
        self._sieve = read.sieve
        self._places = read.places
        self._places["messages"] = "input"

    def add(self, place: str, **turn: Any) -> dict[str, Any]:
        """Begin a turn, whose fields an error places at `place`."""
        self._places[f"messages[{len(self.turns)}]"] = place
        self.turns.append(turn)
        return turn

    def add_text(self, place: str, role: str, words: str) -> None:
        """Add a turn whose content is the body's field `place`."""
        self._places[f"messages[{len(self.turns)}].content"] = place
        self.add(place, role=role, content=words)

    def take(self, one: Any, place: str) -> None:
        """Take in the item at `place`."""
        kind = self._sieve.kind(one, ITEMS, place, default="message")
        fields = self._sieve.served(one, ITEM_ROWS[kind], place)
        match kind:
            case "message":
                self._message(fields, place)
            case "function_call":
                self._call(fields, place)
            case "function_call_output":
                self._result(fields, place)
            case "reasoning":
                self._thought(fields, place)

    def _message(self, fields: dict[str, Any], place: str) -> None:
        one_of(f"{place}.role", role := text(place, fields, "role"), ROLES)
        content = self._content(fields, "content", place)
        if role == "assistant" and (turn := self._open("content", "tool_calls")) is not None:
            turn["content"] = content
            self._places[f"messages[{len(self.turns) - 1}].content"] = f"{place}.content"
        else:
            self.add(place, role="system" if role == "developer" else role, content=content)

    def _call(self, fields: dict[str, Any], place: str) -> None:
        call = {"id": text(place, fields, "call_id")}
        call |= {name: text(place, fields, name) for name in ("name", "arguments")}
        turn = self._open()
        if turn is None:
            turn = self.add(place, role="assistant")
        calls = turn.setdefault("tool_calls", [])
        head = f"messages[{len(self.turns) - 1}].tool_calls[{len(calls)}]"
        self._places |= {head: place, f"{head}.id": f"{place}.call_id"}
        calls.append(call)

    def _result(self, fields: dict[str, Any], place: str) -> None:
        result = {"role": "tool", "tool_call_id": text(place, fields, "call_id")}
        if "name" in fields:
            result["name"] = text(place, fields, "name")
        head = f"messages[{len(self.turns)}]"
        self._places |= {f"{head}.tool_call_id": f"{place}.call_id", f"{head}.content": f"{place}.output"}
        self.add(place, **result, content=self._content(fields, "output", place))

    def _thought(self, fields: dict[str, Any], place: str) -> None:
        texts = []
        for at, part in entries(fields.get("content", []), f"{place}.content"):
            self._sieve.kind(part, REASONING_PARTS, at)
            texts.append(text(at, self._sieve.served(part, REASONING_PART, at), "text"))
        if texts:
            self.add(place, role="assistant", reasoning="".join(texts))

    def _open(self, *without: str) -> dict[str, Any] | None:
        """The last turn, if it is the assistant's and has none of these fields."""
        turn = self.turns[-1] if self.turns else None
        is_open = turn is not None and turn["role"] == "assistant" and turn.keys().isdisjoint(without)
        return turn if is_open else None

    def _content(self, fields: dict[str, Any], name: str, place: str) -> Any:
        """The content of the next turn: a text, or a list of parts that are texts and images."""
        content, field = fields.get(name), f"{place}.{name}"
        if isinstance(content, str):
            return content
        if content is None:
            raise missing(field)
        parts: list[dict[str, Any]] = []
        for at, part in entries(content, field):
            kind = self._sieve.kind(part, RESPONSE_PARTS, at)
            given = self._sieve.served(part, RESPONSE_PART_ROWS[kind], at)
            if kind == "input_image":
                name = f"messages[{len(self.turns)}].content[{len(parts)}]"
                parts.append(read_image(self._read, given.get("image_url"), f"{at}.image_url", name))
            else:
                parts.append({"type": "text", "text": text(at, given, "text")})
        return parts
