"""Calls of tools, as models write them behind a marker, a piece at a time.

Forms, told apart by their first character: a list of JSON objects, one JSON object, or a name and arguments (only
where the syntax has that). The arguments are passed on as they are written. An object's other text is not: it is
kept until the arguments begin, and becomes the text of the call if they never do.
"""

from __future__ import annotations

import json
from typing import Literal, Protocol

import msgspec

from cierzo.engine.text.json_scan import SPACE, JsonScan
from cierzo.engine.text.syntax import Mark
from cierzo.engine.text.tool_names import is_tool_name

MAX_HEAD_CHARS = 16_384  # of a call, before it is known whom it calls
MAX_NAME_CHARS = 256  # of a name or an id that no JSON string delimits
MAX_BARE_CHARS = 512  # of an answer that could be a call without a marker
ARGUMENTS = ("arguments", "parameters")
STRINGS = ("name", "id")
BARE_KEYS = ("name", "type", *ARGUMENTS)

Place = Literal[
    "start",
    "name",
    "id",
    "named arguments",
    "element",
    "object",
    "key",
    "colon",
    "value",
    "other value",
    "arguments",
    "broken",
    "over",
]


class Caller(Protocol):
    """The reader whose calls these are."""

    def may_call(self, at: int) -> bool:
        """Whether another call may begin, at index `at` of the present text; if not, no more of it is read."""
        ...

    def call(self, name: str, call_id: str, *, id_may_follow: bool) -> None:
        """A call begins. id_may_follow: its id was not there yet, and may come with its end."""
        ...

    def argue(self, text: str) -> None:
        """More of its arguments."""
        ...

    def close(self, is_whole: bool, call_id: str) -> None:
        """The call has ended. `is_whole`: its name is one, and its arguments are a JSON object."""
        ...


class Calls(msgspec.Struct, omit_defaults=True):
    """Place within what stands behind a marker.

    is_named: a name and arguments may stand there. is_bare: there was no marker, and what is no call is refused.
    head: text of the present call that was not passed on: of an object, from its bracket on; if its arguments began
    before its name, these. is_open: the call has begun for the caller. argued: its arguments have begun. is_whole:
    they are a JSON object.
    """

    is_named: bool = False
    is_bare: bool = False
    is_refused: bool = False
    is_list: bool = False
    place: Place = "start"
    head: str = ""
    key: str = ""
    name: str = ""
    call_id: str = ""
    is_open: bool = False
    argued: bool = False
    is_whole: bool = False
    scan: JsonScan = msgspec.field(default_factory=JsonScan)
    string: str = ""

    def copy(self) -> Calls:
        """Another one at the same place."""
        return msgspec.structs.replace(self, scan=msgspec.structs.replace(self.scan))

    def feed(self, text: str, caller: Caller) -> int:
        """Read on; the index in `text` behind the last of the calls, or behind the text."""
        at = 0
        while at < len(text) and self.place != "over" and not self.is_refused:
            at = self._read(text, at, caller)
        return at

    def mark(self, mark: Mark, caller: Caller) -> None:
        """Take a marker that stands between name, id and arguments; one that does not is nothing."""
        if mark == "args" and self.place in ("start", "name", "id"):
            self._begin_named_arguments(caller)
        elif mark == "id" and self.place in ("start", "name"):
            self.place = "id"

    def end(self, caller: Caller) -> None:
        """Nothing more comes: end a call that has not ended."""
        if self.place in ("start", "element", "over"):
            return
        if self.place == "named arguments":
            self.is_whole = self.scan.is_object
        self._close(caller)

    def _read(self, text: str, at: int, caller: Caller) -> int:
        match self.place:
            case "start":
                return self._start(text, at, caller)
            case "name" | "id":
                return self._named(text, at, caller)
            case "named arguments":
                caller.argue(text[at:])
                behind = self.scan.feed(text, at)
                self.scan.is_valid &= not text[behind:].strip(SPACE)
                return len(text)
            case "broken":
                caller.argue(text[at:])
                return len(text)
            case "element":
                return self._element(text, at, caller)
            case "arguments":
                return self._arguments(text, at, caller)
        behind = self._object(text, at, caller)
        if not self.argued and not self.is_open and self.place not in ("element", "over"):
            self._keep(text[at:behind], caller)
        return behind

    def _start(self, text: str, at: int, caller: Caller) -> int:
        char = text[at]
        if char in SPACE:
            return at + 1
        if char == "[":
            self.is_list, self.place = True, "element"
            return at + 1
        if char == "{":
            self._begin_object()
            return at + 1
        if self.is_named:
            self.place = "name"
            return at
        return self._deviate(at, caller)

    def _named(self, text: str, at: int, caller: Caller) -> int:
        """Read a name or an id: both end where the arguments begin, at the latest."""
        behind = text.find("{", at)
        more = text[at:] if behind < 0 else text[at:behind]
        if self.place == "name":
            self.name += more
        else:
            self.call_id += more
        if len(self.name) + len(self.call_id) > MAX_NAME_CHARS:
            self.head, self.name, self.call_id = self.name + self.call_id, "", ""
            self._break(caller)
        elif behind >= 0:
            self._begin_named_arguments(caller)
        return len(text) if behind < 0 else behind

    def _begin_named_arguments(self, caller: Caller) -> None:
        self.place, self.argued = "named arguments", True
        self._open(caller)

    def _element(self, text: str, at: int, caller: Caller) -> int:
        """Read between the objects of a list."""
        char = text[at]
        if char in SPACE or char == ",":
            return at + 1
        if char == "]":
            self.place = "over"
            return at + 1
        if not caller.may_call(at):
            self.place = "over"
            return at
        self._begin_object()
        if char == "{":
            return at + 1
        self.head = ""
        self._break(caller)
        return at

    def _begin_object(self) -> None:
        self.place, self.head, self.key, self.name, self.call_id = "object", "{", "", "", ""
        self.is_open = self.argued = self.is_whole = False

    def _object(self, text: str, at: int, caller: Caller) -> int:
        """Read an object's text that is not its arguments."""
        char = text[at]
        if self.place in ("key", "other value"):
            return self._scalar(text, at, caller)
        if char in SPACE:
            return at + 1
        if self.place == "colon":
            if char != ":":
                return self._deviate(at, caller)
            self.place = "value"
            return at + 1
        if self.place == "value":
            return self._value(char, at, caller)
        if char == '"':
            self._scan("key")
            return at
        if char == "}" and not (self.is_bare and not self.is_open):
            if not self.argued:
                self.head += char
            self._close(caller)
            self.place = "element" if self.is_list else "over"
            return at + 1
        return at + 1 if char == "," else self._deviate(at, caller)

    def _value(self, char: str, at: int, caller: Caller) -> int:
        """Begin a value."""
        is_arguments = self.key in ARGUMENTS and not self.argued
        if self.is_bare and not self.is_open:
            begins = "{" if is_arguments else '"'
            if self.key not in BARE_KEYS or char != begins or (is_arguments and not self.name):
                return self._deviate(at, caller)
        if not is_arguments:
            self._scan("other value")
            return at
        self._scan("arguments")
        self.argued, self.head = True, ""
        if self.name:
            self._open(caller)
        return at

    def _scan(self, place: Place) -> None:
        self.place, self.scan, self.string = place, JsonScan(), ""

    def _scalar(self, text: str, at: int, caller: Caller) -> int:
        """Read a key, or a value that is not the arguments."""
        behind = self.scan.feed(text, at)
        if self.place == "key" or self.key in STRINGS:
            self.string += text[at:behind]
            if len(self.string) > MAX_HEAD_CHARS:
                self.string, self.scan.is_valid = "", False
        if self.place == "key" and self.is_bare and not self.is_open and not _may_be_bare(self.string):
            return self._deviate(at, caller)
        if not self.scan.is_done:
            return behind
        string = _decoded(self.string) if self.scan.is_valid and self.string[:1] == '"' else ""
        if self.place == "key":
            self.place, self.key = "colon", string
            return behind
        self.place = "object"
        if self.key == "name" and not self.is_open:
            self.name = string
            if self.argued:
                self._open(caller)
        elif self.key == "id":
            self.call_id = string
        return behind

    def _arguments(self, text: str, at: int, caller: Caller) -> int:
        behind = self.scan.feed(text, at)
        if self.is_open:
            caller.argue(text[at:behind])
        else:
            self._keep(text[at:behind], caller)
        if self.scan.is_done:
            self.place, self.is_whole = "object", self.scan.is_object
        return behind

    def _keep(self, text: str, caller: Caller) -> None:
        self.head += text
        if len(self.head) > (MAX_BARE_CHARS if self.is_bare else MAX_HEAD_CHARS):
            if self.argued:
                self._open(caller)
            else:
                self._deviate(0, caller)

    def _deviate(self, at: int, caller: Caller) -> int:
        """Pass over a character that cannot stand here: it ends a call whose arguments have not begun."""
        if self.is_bare and not self.is_open:
            self.is_refused = True
            return at
        if self.argued:
            self.place = "object"
            return at + 1
        self._break(caller)
        return at

    def _break(self, caller: Caller) -> None:
        self.place = "broken"
        self._open(caller)

    def _open(self, caller: Caller) -> None:
        """Begin the call, with what was kept of it."""
        self.is_open = True
        id_may_follow = self.is_list and self.is_named and not self.call_id and self.place != "broken"
        caller.call(self.name.strip(), self.call_id.strip(), id_may_follow=id_may_follow)
        if self.head:
            caller.argue(self.head)
        self.head = self.string = ""

    def _close(self, caller: Caller) -> None:
        if not self.is_open:
            self._open(caller)
        caller.close(self.is_whole and is_tool_name(self.name.strip()) is not None, self.call_id.strip())


def _may_be_bare(start: str) -> bool:
    """Whether a key that begins so may stand in a call without a marker."""
    return any(f'"{key}"'.startswith(start) for key in BARE_KEYS)


def _decoded(string: str) -> str:
    """The text of a JSON string."""
    return str(json.loads(string))
