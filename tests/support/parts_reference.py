"""The parts of a whole answer, slowly: each character is looked at with all that is around it, and the text behind
a call's marker is read anew with each character that it grows by.

It shares no code with the reader that it is the reference for, but for the names of markers.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from cierzo.engine.messages import Part
from cierzo.engine.text.syntax import Syntax

GAP, PARTIAL = "\U0010fffd", "\U0010fffc"  # stand for tokens without bytes, and without a character that is whole
ARGS, ID = "\U0010fff0", "\U0010fff1"
SPACES = " \t\n\r"
WS, STRING = "[ \t\n\r]", rf'"(?:[^"\\{GAP}]|\\[^{GAP}])*"'
NUMBER = re.compile(
    r"-?(?:0|[1-9][0-9]*)(?:\.(?:[0-9]+(?:[eE][+-]?[0-9]*)?)?|[eE][+-]?[0-9]*)?|-",
)
BARE = re.compile(
    rf'\{{(?:{WS}|,)*(?:"(?:name|type)"{WS}*:{WS}*{STRING}(?:{WS}|,)*)*"(?:arguments|parameters)"{WS}*:{WS}*(?=\{{)'
)
Spot = tuple[str, int]  # a part: its kind, and the number of a call
TEXT, THINKING = ("text", 0), ("thinking", 0)


@dataclass
class Call:
    """A call. start: where it begins in the text behind the marker."""

    start: int
    name: str = ""
    call_id: str = ""
    text: str = ""
    is_whole: bool = False


@dataclass
class Parsed:
    """An answer. texts: stretches of text, as characters with the number of the token that each came with."""

    parts: list[Part]
    broken: list[int]
    in_thinking: bool
    texts: list[list[tuple[str, int]]]

    @property
    def text(self) -> str:
        """Text without thoughts and calls."""
        return "".join(char for chars in self.texts for char, _ in chars)


class _IdleError(Exception):
    """A marker does nothing where it stands."""


def parse(
    token_ids: Sequence[int],
    token_bytes: Callable[[int], bytes],
    syntax: Syntax,
    call_id: Callable[[int], str],
    in_thinking: bool = False,
) -> Parsed:
    """The parts of these tokens."""
    idle: set[int] = set()
    while True:
        walk = _Walk(token_ids, token_bytes, syntax, idle, in_thinking)
        try:
            walk.all()
        except _IdleError as error:
            idle.add(error.args[0])
        else:
            return walk.parsed(call_id)


@dataclass
class _Walk:
    token_ids: Sequence[int]
    token_bytes: Callable[[int], bytes]
    syntax: Syntax
    idle: set[int]
    in_thinking: bool
    time: int = 0
    body: list[tuple[str, int]] | None = None  # characters behind a call's marker, with the time of each
    waiting: list[tuple[int, int, int | None]] = field(default_factory=list)  # place in the body, time, token
    calls: list[Call] = field(default_factory=list)
    wrote: list[tuple[int, Spot, str]] = field(default_factory=list)
    last: dict[int, tuple[int, Spot]] = field(default_factory=dict)  # by token: its last time, and the part then
    texts: list[list[tuple[str, int]]] = field(default_factory=lambda: [[]])

    def all(self) -> None:
        self.mode = "thinking" if self.in_thinking else "start" if self.syntax.bare_calls else "text"
        self.spot = THINKING if self.in_thinking else TEXT
        begin = 0
        for index, token_id in enumerate(self.token_ids):
            if index in self.idle or token_id not in self.syntax.tokens:
                continue
            self.run(begin, index)
            begin, mark = index + 1, self.syntax.tokens[token_id]
            if not self.acts(mark):
                raise _IdleError(index)
            self.act(mark, [index])
        self.run(begin, len(self.token_ids))
        self.end_calls()

    def run(self, begin: int, end: int) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        chars: list[tuple[str, int | None]] = []
        for index in range(begin, end):
            data = b"" if self.token_ids[index] in self.syntax.tokens else self.token_bytes(self.token_ids[index])
            text = decoder.decode(data)
            chars += [(char, index) for char in text or (PARTIAL if data else GAP)]
        chars += [(char, None) for char in decoder.decode(b"", final=True)]
        text, self.end = "".join(char for char, _ in chars), end
        markers = "|".join(map(re.escape, self.syntax.spelled)) or r"(?!)"
        at = 0
        for found in [*re.finditer(markers, text), None]:
            stop = len(text) if found is None else found.start()
            for place in range(at, stop):
                self.char(*chars[place], text[place:stop])
            if found is not None:
                at = found.end()
                mark, tokens = self.syntax.spelled[found[0]], [token for _, token in chars[stop:at]]
                if self.acts(mark):
                    self.act(mark, tokens)
                else:
                    self.note(tokens)

    def char(self, char: str, token: int | None, ahead: str) -> None:
        """Read a character; `ahead` is the text from it on."""
        if char == GAP:
            return self.note([token])
        if self.mode == "closed":
            if char in SPACES or (char == ";" and self.syntax.bare_calls):
                return self.note([token])
            self.mode = "start" if self.syntax.bare_calls else "text"
        if self.mode == "start" and char == "{":
            self.mode = "text"
            if _is_bare(ahead):
                self.mode, self.body = "call", []
        is_start = self.mode == "start"
        if self.mode == "call":
            return self.call_char(char, token)
        if is_start and char not in SPACES and char != PARTIAL:
            self.mode = "text"
        self.spot = THINKING if self.mode == "thinking" else TEXT
        self.note([token])
        if char != PARTIAL:
            self.wrote.append((self.time, self.spot, char))
            if self.spot == TEXT:
                self.texts[-1].append((char, self.end if token is None else token))
        return None

    def call_char(self, char: str, token: int | None) -> None:
        assert self.body is not None
        if char != PARTIAL:
            self.body.append((char, self.time + 1))
        self.note([token])
        if _calls("".join(char for char, _ in self.body), self.syntax.named_calls)[1] is not None:
            self.end_calls()
            self.mode = "closed"

    def note(self, tokens: list[int | None]) -> None:
        """Tokens belong to the present part, so far."""
        for token in tokens:
            self.time += 1
            if self.body is not None:
                self.waiting.append((len(self.body) - 1, self.time, token))
            elif token is not None:
                self.last[token] = (self.time, self.spot)

    def acts(self, mark: str) -> bool:
        if mark in ("think", "/think"):
            return (self.mode == "thinking") == (mark == "/think")
        return mark == "call" or self.mode == "call"

    def act(self, mark: str, tokens: list[int | None]) -> None:
        if mark in ("args", "id"):
            assert self.body is not None
            self.body.append((ARGS if mark == "args" else ID, self.time + 1))
        elif mark in ("think", "call"):
            self.end_calls()
            self.texts.append([])
            self.mode, self.body = ("thinking", None) if mark == "think" else ("call", [])
            self.spot = THINKING if mark == "think" else self.spot
        self.note(tokens)
        if mark == "/think":
            self.mode = "start" if self.syntax.bare_calls else "text"
        if mark == "/call":
            self.end_calls()
            self.mode = "closed"

    def end_calls(self) -> None:
        if self.body is None:
            return
        found, _ = _calls("".join(char for char, _ in self.body), self.syntax.named_calls)
        first = len(self.calls)
        self.calls += found
        for number, call in enumerate(found, start=first):
            self.wrote.append((self.body[call.start][1], ("call", number), call.text))
        for place, time, token in self.waiting:
            begun = sum(call.start <= place for call in found)
            self.spot = ("call", first + max(begun - 1, 0)) if found else TEXT
            if token is not None and self.last.get(token, (0, TEXT))[0] < time:
                self.last[token] = (time, self.spot)
        self.spot = ("call", first + len(found) - 1) if found else TEXT
        self.body, self.waiting, self.mode = None, [], "text"

    def parsed(self, call_id: Callable[[int], str]) -> Parsed:
        counts = [(time, spot, None) for time, spot in self.last.values()]
        events = sorted([*self.wrote, *counts], key=lambda event: (event[0], event[2] is None))
        parts, begun, ids = [], set(), set()
        for spot, group in groupby(events, key=lambda event: event[1]):
            texts = [text for _, _, text in group]
            kind, number = spot
            name = given = ""
            if kind == "call" and number not in begun:
                begun.add(number)
                name, given = self.calls[number].name, self.calls[number].call_id
                is_own = re.fullmatch("[a-zA-Z0-9]{9}", given) and given not in ids
                given = given if is_own else call_id(number)
                ids.add(given)
            text = "".join(text for text in texts if text is not None)
            parts.append(Part(kind=kind, text=text, call=number, name=name, id=given, num_tokens=texts.count(None)))
        broken = [number for number, call in enumerate(self.calls) if not call.is_whole]
        return Parsed(parts, broken, self.mode == "thinking", self.texts)


def _is_bare(text: str) -> bool:
    """Whether this begins as a call without a marker does."""
    found = BARE.match(text)
    if found is None:
        return False
    names = re.findall(f'"name"{WS}*:{WS}*({STRING})', found[0].replace(PARTIAL, ""))
    return bool(names) and bool(_string(names[-1]))


def _calls(body: str, is_named: bool) -> tuple[list[Call], int | None]:
    """The calls behind a marker, and where they end, if text may follow."""
    bare = body.lstrip(SPACES)
    start = len(body) - len(bare)
    if not bare:
        return [], None
    if bare[0] in (ARGS, ID) or (is_named and bare[0] not in "[{"):
        return [_named(bare, start)], None
    places = [place for place, char in enumerate(body) if place >= start and char not in (ARGS, ID)]
    text = "".join(body[place] for place in places)
    if text[0] not in "[{":
        return [Call(start, text=text)], None
    calls, end = _list(text, is_named) if text[0] == "[" else _single(text)
    for call in calls:
        call.start = places[call.start]
    return calls, end


def _named(text: str, start: int) -> Call:
    found = re.match(rf"([^{{{ARGS}{ID}]*)(?:{ID}([^{{{ARGS}]*))?{ARGS}?(.*)", text, re.DOTALL)
    assert found is not None
    name, call_id, arguments = (part or "" for part in found.groups())
    arguments = re.sub(f"[{ARGS}{ID}]", "", arguments)
    name = name.strip()
    return Call(start, name, call_id.replace(ID, "").strip(), arguments, _is_name(name) and _is_object(arguments))


def _list(text: str, has_late_ids: bool) -> tuple[list[Call], int | None]:
    calls: list[Call] = []
    at = 1
    while at < len(text):
        if text[at] in SPACES + ",":
            at += 1
        elif text[at] == "]":
            return calls, at + 1
        elif text[at] != "{":
            return [*calls, Call(at, text=text[at:])], None
        else:
            call, end = _object(text, at, has_late_ids)
            calls.append(call)
            if end is None:
                break
            at = end
    return calls, None


def _single(text: str) -> tuple[list[Call], int | None]:
    call, end = _object(text, 0, False)
    return [call], end


def _object(text: str, start: int, has_late_ids: bool) -> tuple[Call, int | None]:
    call, at, is_open = Call(start), start + 1, False
    is_late = False  # the call began without an id, and may get one
    arguments: str | None = None
    closed: int | None = None
    while at < len(text):
        if text[at] in SPACES + ",":
            at += 1
            continue
        if text[at] == "}":
            closed = at + 1
            break
        key = re.compile(STRING, re.DOTALL).match(text, at) if text[at] == '"' else None
        if text[at] == '"' and key is None:
            break
        at = _skip(text, key.end()) if key else at
        if at == len(text):
            break
        if key is None or text[at] != ":":
            if arguments is None:
                break
            at += 1
            continue
        at = _skip(text, at + 1)
        end = _value_end(text, at)
        value, name = text[at : len(text) if end is None else end], _string(key[0])
        if name in ("arguments", "parameters") and arguments is None and at < len(text):
            arguments, is_open = value, bool(call.name)
            is_late = is_open and has_late_ids and not call.call_id
            call.is_whole = end is not None and _is_object(value)
        elif end is not None and name == "id" and (is_late or not is_open):
            call.call_id = _string(value)
        elif end is not None and name == "name" and not is_open:
            call.name, is_open = _string(value), arguments is not None
            is_late = is_open and has_late_ids and not call.call_id
        if end is None:
            break
        at = end
    call.text = text[start:closed] if arguments is None else arguments
    call.name, call.call_id = call.name.strip(), call.call_id.strip()
    call.is_whole &= _is_name(call.name)
    return call, closed


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in SPACES:
        at += 1
    return at


def _value_end(text: str, at: int) -> int | None:
    """Where a value ends, told by quotes and brackets if it is no JSON; None if it goes on."""
    if any(text.startswith(word, at) for word in ("true", "false", "null")):
        return at + (5 if text[at] == "f" else 4)
    if found := NUMBER.match(text, at):
        return None if found.end() == len(text) else found.end()
    depth = 0
    while at < len(text):
        if text[at] == '"':
            found = re.compile(STRING, re.DOTALL).match(text, at)
            if found is None:
                return None
            at = found.end() - 1
        elif text[at] in "}],":
            if depth == 0:
                return at
            depth -= text[at] != ","
            if text[at] == ",":
                at += 1
                continue
        elif text[at] in "{[":
            depth += 1
            at += 1
            continue
        else:
            at += 1
            continue
        at += 1
        if depth == 0:
            return at
    return None


def _string(text: str) -> str:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # a half of a surrogate pair is none
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""


def _is_name(text: str) -> bool:
    return re.fullmatch("[a-zA-Z0-9_-]{1,64}", text) is not None


def _is_object(text: str) -> bool:
    def refuse(word: str) -> None:
        raise ValueError(word)

    try:
        value = json.loads(text, parse_constant=refuse)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        return isinstance(value, dict)
    except ValueError:
        return False
