"""Rules for calls of tools, as a model's syntax has them: none but those of the tools that a request lists.

Forms: a marker, a name and arguments for each call; one marker and a list of JSON objects; a JSON object between
two tags; a JSON object alone. Arguments are a JSON object, of a strict tool one that holds its schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from cierzo.engine.messages import Tool
from cierzo.engine.text.held_text import ANY_OBJECT, json_rule, quoted
from cierzo.engine.text.syntax import LLAMA_CALL, Mark, Syntax

Rules = dict[str, str]  # the right sides of a grammar's rules, by their names
# Where a JSON object of a call may have spaces; the widest that chat templates write.
SPACE: Rules = {"space": "SPACE?", "SPACE": r"/[ \r\n\t]{1,4}/"}
ARGUMENTS = "arguments_"  # and the number of a tool: the rule for its arguments
_CALL_ID: Rules = {"CALL_ID": "/[a-zA-Z0-9]{9}/"}
_ANY_TEXT = "/(?s:.*)/"


def marker(syntax: Syntax, mark: Mark) -> str:
    """A marker of the model as Lark writes it; "" if there is none."""
    token_id = next((token_id for token_id, known in syntax.tokens.items() if known == mark), None)
    if token_id is not None:
        return f"<[{token_id}]>"
    return next((quoted(spelling) for spelling, known in syntax.spelled.items() if known == mark), "")


def call_bodies(
    syntax: Syntax, tools: Sequence[tuple[int, Tool]], rules: Rules, *, one_call: bool, with_text: bool
) -> list[str]:
    """Right sides for bodies that are calls, one or, unless `one_call`, several; with_text: or text, or text and
    calls. What they are made of is added to `rules`. tools: by their numbers in the request. Raises InvalidRequest
    for a schema that is none."""
    rules |= SPACE
    if syntax.named_calls and marker(syntax, "args"):
        rules["call"] = _either(_named(syntax, tool, rules, number) for number, tool in tools)
        return [("text_token* " if with_text else "") + ("call" + _times(one_call, with_text))]
    rules["entry"] = _either(_entry(syntax, tool, rules, number) for number, tool in tools)
    begin = marker(syntax, "call")
    if syntax.named_calls:
        more = "" if one_call else '(space "," space entry)*'
        rules["calls"] = f'{begin} space "[" space entry {more} space "]"'
        return ["text_token* calls?" if with_text else "calls"]
    if syntax.call_marker == LLAMA_CALL:
        rules["calls"] = f"{begin}? entry" if syntax.bare_calls else f"{begin} entry"
        return [r"/[^{ \r\n\t](?s:.*)/", "calls?"] if with_text else ["calls"]
    rules["call_rest"] = f"space entry space {marker(syntax, '/call')}".strip()
    if with_text and syntax.call_open_id is None:
        rules["call_head[lazy]"] = f"{_ANY_TEXT} {begin}"
        times = "?" if one_call else "*"
        return [f"(call_head call_rest){times} {_ANY_TEXT}"]
    rules["call"] = f"{begin} call_rest"
    calls = "call" if one_call else "call (space call)*"
    return [f"text_token* ({calls})?" if with_text else calls]


def _times(one_call: bool, may_be_none: bool) -> str:
    """How often there are calls, in Lark's signs."""
    if one_call:
        return "?" if may_be_none else ""
    return "*" if may_be_none else "+"


def _named(syntax: Syntax, tool: Tool, rules: Rules, number: int) -> str:
    """A call as a name and arguments behind markers, with an id between them where the model may write one."""
    call_id = ""
    if syntax.call_ids:
        rules |= _CALL_ID
        call_id = f"({marker(syntax, 'id')} CALL_ID)?"
    arguments = _arguments(tool, rules, number)
    return f"{marker(syntax, 'call')} {quoted(tool.name)} {call_id} {marker(syntax, 'args')} {arguments}"


def _entry(syntax: Syntax, tool: Tool, rules: Rules, number: int) -> str:
    """A call as a JSON object."""
    key = "parameters" if syntax.call_marker == LLAMA_CALL else "arguments"
    fields = [_field("name", quoted(quoted(tool.name))), _field(key, _arguments(tool, rules, number))]
    call_id = ""
    if syntax.named_calls:
        rules |= _CALL_ID
        call_id = '(space "," space ' + _field("id", '"\\"" CALL_ID "\\""') + ")?"
    between = ' space "," space '
    return f'"{{" space {between.join(fields)} {call_id} space "}}"'


def _field(key: str, value: str) -> str:
    return f'{quoted(quoted(key))} space ":" space {value}'


def _arguments(tool: Tool, rules: Rules, number: int) -> str:
    """The name of the rule for a tool's arguments."""
    if not tool.strict:
        rules["any_object"] = json_rule(ANY_OBJECT, "tools")
        return "any_object"
    field = f"tools[{number}].parameters"
    schema = {"type": "object"} | tool.parameters
    rules[f"{ARGUMENTS}{number}"] = json_rule(msgspec.json.encode(schema).decode(), field)
    return f"{ARGUMENTS}{number}"


def _either(rights: Iterable[str]) -> str:
    return " | ".join(rights)
