"""An answer as parts: text, thoughts, and calls of tools, joined from the pieces in which they came."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.messages import (
    ChatMessage,
    Content,
    Delta,
    EndReason,
    Final,
    Part,
    SampleEnd,
    TextChunk,
    ThinkingChunk,
    ToolCall,
)
from cierzo.engine.text.tool_names import is_tool_name

JOINED_AT_ONCE = 32


class Answer:
    """Sample of a generation, as far as it has come. `add` each of its deltas, and at last how it ended.

    finish_reason: why it ended, None until then. broken_calls: numbers of the calls that turned out to be none,
    known at the end; they are in `parts` alone. incomplete: it ended before its grammar did.
    message: why it failed.

    messages.append(answer.turn)  # the conversation goes on with it
    for call in answer.tool_calls:
        result = run(call.name, call.arguments)
        messages.append({"role": "tool", "content": result, "tool_call_id": call.id, "name": call.name})
    """

    __slots__ = ("_joining", "broken_calls", "finish_reason", "incomplete", "message")

    def __init__(self) -> None:
        self._joining: list[_Joining] = []
        self.broken_calls: list[int] = []
        self.finish_reason: EndReason | None = None
        self.incomplete = False
        self.message = ""

    def add(self, delta: Delta) -> None:
        """Take what is new."""
        self.take(delta.parts, delta.text, len(delta.token_ids))

    def add_all(self, deltas: list[Delta]) -> None:
        """Take what is new in several, in order."""
        if any(delta.parts for delta in deltas):
            for delta in deltas:
                self.add(delta)
        else:  # text alone, which is nearly all that comes
            num_tokens = sum([len(delta.token_ids) for delta in deltas])
            self.take([], "".join([delta.text for delta in deltas]), num_tokens)

    def end(self, end: SampleEnd) -> None:
        """Take the record of the sample's end, and the output, if that comes in it."""
        self.finish_reason, self.broken_calls = end.finish_reason, end.broken_calls
        self.incomplete, self.message = end.incomplete, end.message
        self.take(end.parts, end.text, len(end.token_ids))

    def take(self, parts: list[Part], text: str, num_tokens: int) -> None:
        """Take pieces; without any, so many tokens of text."""
        if not parts and self._joining and self._joining[-1].first.kind == "text":
            self._joining[-1].add(text, num_tokens)
            return
        for piece in pieces(parts, text, num_tokens):
            if not self._joining or not goes_on(self._joining[-1].first, piece):
                self._joining.append(_Joining(piece))
            self._joining[-1].add(piece.text, piece.num_tokens, piece.id)

    @property
    def parts(self) -> list[Part]:
        """All parts so far, in order, each whole; text alone is one part too."""
        return [joining.part() for joining in self._joining]

    @property
    def text(self) -> str:
        """The text alone, without thoughts and calls."""
        return "".join([joining.text() for joining in self._joining if joining.first.kind == "text"])

    @property
    def thinking(self) -> str:
        """The thoughts alone."""
        return "".join([joining.text() for joining in self._joining if joining.first.kind == "thinking"])

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls that it makes, whole ones alone: with a name, and with arguments that are a JSON object. Until
        it has ended, without what it ends with so far, which may get longer."""
        return tool_calls(self._settled(), self.broken_calls)

    @property
    def turn(self) -> ChatMessage:
        """The assistant's turn that says the same, for the next prompt; without calls that are not in `tool_calls`.
        It may be empty."""
        said = [part for part in self.parts if part.kind != "call"]
        return as_turn([*said, *(part for part in self._settled() if part.kind == "call")], self.broken_calls)

    def _settled(self) -> list[Part]:
        """The parts that do not change any more."""
        return self.parts if self.finish_reason is not None else self.parts[:-1]


class Answers:
    """The samples of a generation, as far as they have come. Deltas are joined a few at a time, or when somebody
    asks, as most callers look at the deltas alone; and only if `joins`, for who has the feature "parts"."""

    __slots__ = ("_by_sample", "_deltas", "_has_ended", "joins")

    def __init__(self, joins: bool = True) -> None:
        self.joins = joins
        self._by_sample: dict[int, Answer] = {}
        self._deltas: list[Delta] = []
        self._has_ended = False

    def add(self, delta: Delta) -> None:
        """Take what is new of a sample."""
        self._deltas.append(delta)
        if len(self._deltas) >= JOINED_AT_ONCE:
            self._join()

    def _join(self) -> None:
        deltas, self._deltas = self._deltas, []
        by_sample: dict[int, list[Delta]] = {}
        for delta in deltas:
            by_sample.setdefault(delta.sample, []).append(delta)
        for sample, own in by_sample.items():
            self._by_sample.setdefault(sample, Answer()).add_all(own)

    def of(self, sample: int, final: Final | None) -> Answer:
        """Give a sample; `final` if that has come. Raises InvalidRequest for one that came in deltas without the
        feature "parts"."""
        is_whole = final is not None and all(end.token_ids or not end.output_tokens for end in final.samples)
        if not self.joins and not is_whole:
            raise InvalidRequest(
                "deltas are joined to an answer with the feature parts alone", field="features", limit="parts"
            )
        self._join()
        if final is not None and not self._has_ended:
            self._has_ended = True
            for end in final.samples:
                self._by_sample.setdefault(end.sample, Answer()).end(end)
        return self._by_sample.setdefault(sample, Answer())


class _Joining:
    """A part that may get longer."""

    __slots__ = ("_id", "_num_tokens", "_texts", "first")

    def __init__(self, first: Part) -> None:
        self.first = first
        self._texts: list[str] = []
        self._num_tokens = 0
        self._id = ""

    def add(self, text: str, num_tokens: int, call_id: str = "") -> None:
        self._texts.append(text)
        self._num_tokens += num_tokens
        self._id = self._id or call_id

    def text(self) -> str:
        self._texts = ["".join(self._texts)]
        return self._texts[0]

    def part(self) -> Part:
        first = self.first
        return Part(
            kind=first.kind,
            text=self.text(),
            call=first.call,
            name=first.name,
            id=self._id,
            num_tokens=self._num_tokens,
        )


def goes_on(first: Part, piece: Part) -> bool:
    """Whether a piece is more of the part that began with `first`."""
    return first.kind == piece.kind and first.call == piece.call


def in_order(parts: list[Part], text: str, num_tokens: int, more: list[Part], held: str) -> list[Part]:
    """Pieces of one delta, or those that are text, and then what a reader held back of it: none if all is text."""
    if not parts and not more:
        return parts
    return [*(parts or plain(text, num_tokens)), *(more or plain(held, 0))]


def plain(text: str, num_tokens: int) -> list[Part]:
    """Text as pieces."""
    return [Part(kind="text", text=text, num_tokens=num_tokens)] if text or num_tokens else []


def pieces(parts: list[Part], text: str, num_tokens: int) -> list[Part]:
    """The pieces of a delta that are something: one may only say that of its tokens none is counted yet."""
    if not parts:
        return plain(text, num_tokens)
    return [piece for piece in parts if piece.text or piece.num_tokens or piece.name or piece.id]


def joined(parts: list[Part]) -> list[Part]:
    """The whole parts that pieces are of; none if all is text."""
    if not parts:
        return parts
    answer = Answer()
    answer.take(parts, "", 0)
    whole = answer.parts
    return [] if all(part.kind == "text" for part in whole) else whole


def tool_calls(parts: Iterable[Part], broken: Collection[int] = ()) -> list[ToolCall]:
    """The whole calls among parts, but for those of these numbers. Of a resumed answer the first may be the end of
    one."""
    return [
        ToolCall(name=part.name, arguments=part.text, id=part.id)
        for part in parts
        if part.kind == "call" and part.call not in broken and _is_whole(part)
    ]


def _is_whole(call: Part) -> bool:
    """Whether a conversation can go on with the call."""
    from cierzo.engine.text.tool_arguments import Arguments  # only who reads calls takes the time to import it

    is_object = call.text.strip() and Arguments.parse(call.text).value is not None
    return bool(is_object and is_tool_name(call.name))


def as_turn(parts: list[Part], broken: Collection[int] = ()) -> ChatMessage:
    """The assistant's turn that an answer is, letter by letter, so that the cache knows its tokens."""
    said = [part for part in parts if part.kind != "call" and part.text]
    thoughts = [part.text for part in said if part.kind == "thinking"]
    calls: dict[str, Any] = {"tool_calls": tool_calls(parts, broken)}
    if not thoughts or (len(thoughts) == 1 and said[0].kind == "thinking"):
        text = "".join(part.text for part in said if part.kind == "text")
        return ChatMessage(role="assistant", content=text, reasoning="".join(thoughts), **calls)
    content: Content = [
        TextChunk(text=part.text) if part.kind == "text" else ThinkingChunk(thinking=part.text) for part in said
    ]
    return ChatMessage(role="assistant", content=content, **calls)
