"""Answers of /v1/responses: the events of a stream, and the object that they end in, of a generation's deltas.

An answer is a list of items: a message for each run of text, a reasoning item for each thought, a function call for
each call. An item is announced, gets longer, and is told as a whole when the next one begins or the answer ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from cierzo.engine.errors import CierzoError
from cierzo.engine.frontend.answer import goes_on, pieces, tool_calls
from cierzo.engine.gateway.errors import require_planned
from cierzo.engine.gateway.token_words import TokenWords, chat_entry
from cierzo.engine.messages import Delta, Final, Part, TokenLogprobs

PREFIX = {"text": "msg", "thinking": "rs", "call": "fc"}  # of the ids of items
EVENTS = {
    "text": "response.output_text",
    "thinking": "response.reasoning_text",
    "call": "response.function_call_arguments",
}
# What the answers repeat of a request, as the types of OpenAI's client want it where it was left out.
REPEATED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "parallel_tool_calls": True,
    "reasoning": {"effort": None, "summary": None},
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": None,
}
UNCHANGED: dict[str, Any] = {
    "background": False,
    "metadata": {},
    "previous_response_id": None,
    "store": False,
    "truncation": "disabled",
}
BEGIN = ("created", "in_progress")
_encode = msgspec.json.encode
Event = dict[str, Any]
NewEvent = Callable[..., Event]  # of a type and fields


def response_head(response_id: str, created_at: int, model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The response as it is at its beginning. given: what was asked for, by the names of the body."""
    repeated = {name: given.get(name, value) for name, value in REPEATED.items()}
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "model": model,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "output": [],
        "usage": None,
        **repeated,
        **UNCHANGED,
    }


class ResponseEvents:
    """The events of one answer: `begin`, then `take` what comes, then `end`, or `fail`. They are bytes of a stream;
    `response` is the object so far, and after the end all of it.

    thought_tokens: of thoughts, told so far.
    """

    def __init__(self, head: dict[str, Any], words: TokenWords | None = None) -> None:
        """head: of `response_head`. words: of the tokens, where log-probabilities are to be told."""
        self.response = head
        self.thought_tokens = 0
        self._words = words
        self._number = 0
        self._item: _Item | None = None
        self._entries: list[TokenLogprobs] = []  # of tokens that no item has yet
        self._early = 0  # tokens of a text that has no letter yet

    def begin(self, prompt_tokens: int = 0) -> bytes:
        """The events before any output."""
        return self._told(self._event(f"response.{name}", response=self.response) for name in BEGIN)

    def take(self, deltas: Sequence[Delta]) -> bytes:
        """The events that tell of new output."""
        return b"".join([self._more_text(delta) or self._told(self._take(delta)) for delta in deltas])

    def end(self, final: Final) -> bytes:
        """The events at the end. Of an answer that came without deltas, all of them."""
        return self._told(self._end(final))

    def fail(self, error: CierzoError) -> bytes:
        """The events at an end that was not planned: what came so far is told as it is."""
        return self._told(self._fail(error))

    # --- inside ----------------------------------------------------------------------------------------

    def _take(self, delta: Delta) -> Iterator[Event]:
        if self._words is not None:
            self._entries += delta.logprobs or ()
        for piece in pieces(delta.parts, delta.text, len(delta.token_ids)):
            yield from self._piece(piece)

    def _more_text(self, delta: Delta) -> bytes:
        """The one event of more text, which is the rule; nothing of any other delta."""
        item = self._item
        if item is None or delta.parts or not delta.text or self._words is not None or not item.is_told_text:
            return b""
        self._number += 1
        return item.more_text(delta.text, self._number - 1)

    def _piece(self, piece: Part) -> Iterator[Event]:
        if self._item is None or not goes_on(self._item.first, piece):
            yield from self._close()
            if piece.kind == "text" and not piece.text:
                self._early += piece.num_tokens
                return
            self._item = self._open(piece)
        item = self._item
        entries, self._entries = self._entries[: piece.num_tokens], self._entries[piece.num_tokens :]
        if piece.kind == "thinking":
            self.thought_tokens += piece.num_tokens
        yield from item.push(piece, self._spelled(entries) if piece.kind == "text" else [], self._event)

    def _open(self, first: Part) -> _Item:
        """Begin an item, which has the tokens before its first letter."""
        early, self._early = self._early, 0
        entries, self._entries = self._entries[:early], self._entries[early:]
        output = self.response["output"]
        name = self.response["id"].partition("_")[2] or self.response["id"]
        item = _Item(first, f"{PREFIX[first.kind]}_{name}_{len(output)}", len(output))
        item.unsent += self._spelled(entries) if first.kind == "text" else []
        output.append(item.whole("in_progress"))
        return item

    def _close(self, *, is_cut: bool = False) -> Iterator[Event]:
        """End the item under way, if there is one. is_cut: the answer ends within it."""
        item, self._item = self._item, None
        if item is None:
            return
        is_whole = bool(tool_calls([item.part()])) if item.first.kind == "call" else not is_cut
        whole = item.whole("completed" if is_whole else "incomplete")
        self.response["output"][item.index] = whole
        yield from item.close(whole, self._event)

    def _end(self, final: Final) -> Iterator[Event]:
        sample = final.samples[0]
        if sample.token_ids or sample.text:
            whole = Delta(stream=0, token_ids=sample.token_ids, text=sample.text, parts=sample.parts)
            yield from self._take(msgspec.structs.replace(whole, logprobs=sample.logprobs))
        is_good = sample.finish_reason in ("stop", "tool_calls")
        yield from self._close(is_cut=not is_good)
        response, usage = self.response, final.usage
        response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.thought_tokens},
            "total_tokens": usage.prompt_tokens + usage.output_tokens,
        }
        try:
            require_planned(final)
        except CierzoError as error:
            yield self._failed(error)
            return
        response["status"] = "completed" if is_good else "incomplete"
        response["incomplete_details"] = None if is_good else {"reason": "max_output_tokens"}
        yield self._event(f"response.{response['status']}", response=response)

    def _fail(self, error: CierzoError) -> Iterator[Event]:
        yield from self._close(is_cut=True)
        yield self._failed(error)

    def _failed(self, error: CierzoError) -> Event:
        code = {400: "invalid_prompt", 429: "rate_limit_exceeded"}.get(error.http_status, "server_error")
        self.response["status"] = "failed"
        self.response["error"] = {"code": code, "message": error.message, "param": error.field, "type": error.code}
        return self._event("response.failed", response=self.response)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _told(self, events: Iterable[Event]) -> bytes:
        return b"".join([b"event: %b\ndata: %b\n\n" % (event["type"].encode(), _encode(event)) for event in events])

    def _spelled(self, entries: list[TokenLogprobs]) -> list[msgspec.Raw]:
        """Log-probabilities as they are told; of none where none are asked for."""
        words = self._words
        return [] if words is None else [msgspec.Raw(chat_entry(words, entry)) for entry in entries]


class _Item:
    """An item under way, which began with the piece `first`. unsent: log-probabilities that no delta had yet.

    A call is announced with its id, which some models write behind its arguments: then it waits for that.
    """

    def __init__(self, first: Part, item_id: str, index: int) -> None:
        self.first = first
        self.index = index
        self.unsent: list[msgspec.Raw] = []
        self._id = item_id
        self._call_id = ""
        self._texts: list[str] = []
        self._logprobs: list[msgspec.Raw] = []
        self._is_told = False
        self._before_text = b""  # of events of more text, but for their number

    @property
    def is_told_text(self) -> bool:
        """Whether it is a text that has been announced."""
        return self._is_told and self.first.kind == "text"

    def more_text(self, text: str, number: int) -> bytes:
        """Take a piece of text without log-probabilities; the event that tells it."""
        self._texts.append(text)
        if not self._before_text:
            kind = f"{EVENTS['text']}.delta"
            told = {"type": kind, **self._place(), "logprobs": []}
            self._before_text = b"event: %b\ndata: %b" % (kind.encode(), _encode(told)[:-1])
        return b'%b,"sequence_number":%d,"delta":%b}\n\n' % (self._before_text, number, _encode(text))

    def push(self, piece: Part, logprobs: list[msgspec.Raw], event: NewEvent) -> Iterator[Event]:
        """Take a piece. event: makes events."""
        self._call_id = self._call_id or piece.id
        self._texts.append(piece.text)
        self.unsent += logprobs
        if self.first.kind == "call" and not self._call_id:
            return
        if not self._is_told:
            yield from self._announce(event)
        elif piece.text:
            yield self._delta(piece.text, event)

    def close(self, whole: dict[str, Any], event: NewEvent) -> Iterator[Event]:
        """End it as this object."""
        if not self._is_told:
            yield from self._announce(event)
        self._logprobs += self.unsent
        told, place = self._told(), self._place()
        if self.first.kind == "call":
            yield event(f"{EVENTS['call']}.done", **place, **told, name=self.first.name)
        else:
            part = whole["content"][0]
            yield event(f"{EVENTS[self.first.kind]}.done", **place, **told)
            yield event("response.content_part.done", **place, part=part)
        yield event("response.output_item.done", output_index=self.index, item=whole)

    def whole(self, status: str) -> dict[str, Any]:
        """The item as it is now."""
        head: dict[str, Any] = {"id": self._id, "status": status}
        if self.first.kind == "call":
            call_id = self._call_id or self._id
            told = {"type": "function_call", "call_id": call_id, "name": self.first.name}
            return head | told | {"arguments": "".join(self._texts)}
        content = [self._part("".join(self._texts), [*self._logprobs, *self.unsent])] if self._texts else []
        if self.first.kind == "text":
            return head | {"type": "message", "role": "assistant", "content": content}
        return head | {"type": "reasoning", "summary": [], "content": content}

    def part(self) -> Part:
        """All that came, as one piece."""
        return msgspec.structs.replace(self.first, text="".join(self._texts), id=self._call_id)

    def _announce(self, event: NewEvent) -> Iterator[Event]:
        texts, self._texts = self._texts, []
        self._is_told = True
        yield event("response.output_item.added", output_index=self.index, item=self.whole("in_progress"))
        if self.first.kind != "call":
            yield event("response.content_part.added", **self._place(), part=self._part("", []))
        self._texts = texts
        if text := "".join(texts):
            yield self._delta(text, event)

    def _delta(self, text: str, event: NewEvent) -> Event:
        logprobs, self.unsent = self.unsent, []
        self._logprobs += logprobs
        more = {"logprobs": logprobs} if self.first.kind == "text" else {}
        return event(f"{EVENTS[self.first.kind]}.delta", **self._place(), delta=text, **more)

    def _place(self) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": self._id, "output_index": self.index}
        return place if self.first.kind == "call" else place | {"content_index": 0}

    def _told(self) -> dict[str, Any]:
        text = "".join(self._texts)
        if self.first.kind == "call":
            return {"arguments": text}
        return {"text": text, "logprobs": self._logprobs} if self.first.kind == "text" else {"text": text}

    def _part(self, text: str, logprobs: list[msgspec.Raw]) -> dict[str, Any]:
        if self.first.kind == "thinking":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
