"""Answers of the engine as OpenAI's interface tells them: whole ones, and the events of a stream.

An event is made of bytes that are the same for the whole stream and of what is new, so that a token costs one small
string. Nothing here waits, and nothing here knows HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import msgspec

from cierzo import __version__
from cierzo.engine.errors import CierzoError
from cierzo.engine.frontend.answer import Answer
from cierzo.engine.frontend.frames import Buffer
from cierzo.engine.gateway.config import Reasoning
from cierzo.engine.gateway.errors import encoded, require_planned
from cierzo.engine.gateway.token_words import TokenWords, chat_entry, legacy_top, number
from cierzo.engine.messages import Delta, Final, Part, SampleEnd, TokenLogprobs

DONE = b"data: [DONE]\n\n"
Piece = Buffer  # of what is long: pieces belong together, and are not copied
FINGERPRINT = f"cierzo-{__version__}"
_encode = msgspec.json.encode


class Events(Protocol):
    """Events of one prompt's answer, in the order in which they are asked for. thought_tokens: told so far."""

    thought_tokens: int

    def begin(self, prompt_tokens: int) -> bytes:
        """Events before any output; prompt_tokens: as far as it is known."""
        ...

    def take(self, deltas: Sequence[Delta]) -> bytes:
        """Events that tell of new output."""
        ...

    def end(self, final: Final) -> bytes:
        """Events at the end. Raises the CierzoError that the end is, if it is none that was planned."""
        ...

    def fail(self, error: CierzoError) -> bytes:
        """Events at an end that was not planned."""
        ...


class Head(msgspec.Struct, frozen=True):
    """The fields that every object of an answer begins with."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str = FINGERPRINT


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """Ways in which an answer is to be told.

    prompt_text: told before it; first_token: the first token of that, where its log-probabilities are told too.
    drops_output: nothing is told of the answer itself. first_index: number of its first choice. logprobs: whether
    any are told. has_usage: `stream_options` has include_usage; continuous: every event tells the usage so far.
    """

    head: Head
    words: TokenWords
    num_samples: int = 1
    first_index: int = 0
    reasoning: Reasoning = "reasoning_content"
    logprobs: bool = False
    has_usage: bool = False
    continuous: bool = False
    prompt_text: str = ""
    first_token: int | None = None
    drops_output: bool = False


def head(kind: str, name: str, request_id: str, model: str) -> Head:
    """The head of an answer that is begun now. name: of its kind in ids, as in "chatcmpl"."""
    return Head(id=f"{name}-{request_id}", object=kind, created=int(time.time()), model=model)


# --- usage -------------------------------------------------------------------------------------------------


def usage_of(finals: Iterable[Final], thought_tokens: int = 0) -> dict[str, Any]:
    """The token counts of a request, of all its prompts."""
    found = [final.usage for final in finals]
    cached = sum(usage.cached_tokens for usage in found)
    told: dict[str, Any] = _counts(
        sum(usage.prompt_tokens for usage in found), sum(usage.output_tokens for usage in found)
    )
    told["prompt_tokens_details"] = {"cached_tokens": cached}
    if thought_tokens:
        told["completion_tokens_details"] = {"reasoning_tokens": thought_tokens}
    return told


def _counts(prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }


def usage_event(told: Head, usage: dict[str, Any]) -> bytes:
    """The last event of a stream that was asked for its usage: it has no choices."""
    return event(_encode(_fields(told) | {"choices": [], "usage": usage}))


def event(data: bytes) -> bytes:
    """An event of a stream."""
    return b"data: %b\n\n" % data


def _fields(told: Head) -> dict[str, Any]:
    return msgspec.structs.asdict(told)


# --- streams -----------------------------------------------------------------------------------------------


class _Stream:
    """Events of a stream: what they have in common. _closing: fields of a sample's last event, beside its end."""

    _closing = b""

    def __init__(self, told: Told) -> None:
        self.told = told
        self.thought_tokens = 0
        self._prompt_tokens = self._output_tokens = 0
        before = _encode(_fields(told.head))[:-1]
        self._before = [
            b'data: %b,"choices":[{"index":%d,' % (before, told.first_index + sample)
            for sample in range(told.num_samples)
        ]
        self._usage = b',"usage":null' if told.has_usage else b""
        self._after = b',"finish_reason":null}]%b}\n\n' % self._usage

    def begin(self, prompt_tokens: int) -> bytes:
        """Events before any output."""
        self._prompt_tokens = prompt_tokens
        return b""

    def take(self, deltas: Sequence[Delta]) -> bytes:
        """Events that tell of new output."""
        return b"".join([self._delta(delta) for delta in deltas])

    def _delta(self, delta: Delta) -> bytes:
        raise NotImplementedError

    def end(self, final: Final) -> bytes:
        """The events that say why each sample ended. Raises the CierzoError that it is, if it was not planned."""
        require_planned(final)
        return b"".join([self._last(end) for end in final.samples])

    def fail(self, error: CierzoError) -> bytes:
        """The event with an error."""
        return event(encoded(error))

    def _event(self, sample: int, said: bytes, logprobs: bytes) -> bytes:
        """An event; `said`: a field of the choice, or several."""
        told = b',"logprobs":%b' % logprobs if logprobs else b""
        if not self.told.continuous:
            return b"%b%b%b%b" % (self._before[sample], said, told, self._after)
        usage = _encode(_counts(self._prompt_tokens, self._output_tokens))
        return b'%b%b%b,"finish_reason":null}],"usage":%b}\n\n' % (self._before[sample], said, told, usage)

    def _last(self, end: SampleEnd) -> bytes:
        after = b',"usage":%b' % _encode(_counts(self._prompt_tokens, self._output_tokens))
        return b"%b%b,%b}]%b}\n\n" % (
            *(self._before[end.sample], self._closing),
            *(_encode(_ended(end))[1:-1], after if self.told.continuous else self._usage),
        )


class ChatEvents(_Stream):
    """Events of a chat completion."""

    _closing = b'"delta":{}'

    def begin(self, prompt_tokens: int) -> bytes:
        """The events that say who speaks."""
        super().begin(prompt_tokens)
        first = b'"delta":{"role":"assistant","content":""}'
        return b"".join([self._event(sample, first, b"") for sample in range(self.told.num_samples)])

    def _delta(self, delta: Delta) -> bytes:
        self._output_tokens += len(delta.token_ids)
        logprobs = self._logprobs(delta.logprobs)
        if not delta.parts:
            if not delta.text and not logprobs and not self.told.continuous:
                return b""
            return self._event(delta.sample, b'"delta":{"content":%b}' % _encode(delta.text), logprobs)
        said = []
        for part in delta.parts:
            if part.kind == "thinking":
                self.thought_tokens += part.num_tokens
            if (piece := self._piece(part)) is not None:
                said.append(piece)
        if not said and logprobs:
            said = [b'"delta":{}']
        # the log-probabilities are those of all pieces: they come with the first
        return b"".join(
            [self._event(delta.sample, piece, b"" if number else logprobs) for number, piece in enumerate(said)]
        )

    def _piece(self, part: Part) -> bytes | None:
        """New output of a part, as a field; None if that is nothing."""
        if part.kind == "call":
            return b'"delta":{"tool_calls":[%b]}' % _encode(_call_delta(part))
        if not part.text:
            return None
        if part.kind == "text":
            return b'"delta":{"content":%b}' % _encode(part.text)
        if self.told.reasoning == "thinking":
            return b'"delta":{"content":[%b]}' % _encode(_thinking(part.text))
        return b'"delta":{"reasoning_content":%b}' % _encode(part.text)

    def _logprobs(self, logprobs: list[TokenLogprobs] | None) -> bytes:
        if not self.told.logprobs or not logprobs:
            return b""
        return b'{"content":[%b],"refusal":null}' % b",".join([chat_entry(self.told.words, e) for e in logprobs])


class CompletionEvents(_Stream):
    """Events of a text completion."""

    _closing = b'"text":"","logprobs":null'

    def __init__(self, told: Told) -> None:
        super().__init__(told)
        self._offsets = [len(told.prompt_text)] * told.num_samples
        self._prompt_offset = 0

    def begin(self, prompt_tokens: int) -> bytes:
        """The prompt, where it is to be told."""
        super().begin(prompt_tokens)
        told = self.told
        if not told.prompt_text and told.first_token is None:
            return b""
        logprobs = b""
        if told.first_token is not None:
            legacy = Legacy(told.words)
            legacy.begin(told.first_token, told.prompt_text)
            logprobs, self._prompt_offset = legacy.encoded(), legacy.offset
        return self._everywhere(told.prompt_text, logprobs)

    def _delta(self, delta: Delta) -> bytes:
        if delta.prompt_logprobs:
            logprobs, self._prompt_offset = self._legacy(delta.prompt_logprobs, self._prompt_offset)
            return self._everywhere("", logprobs)
        self._output_tokens += len(delta.token_ids)
        if self.told.drops_output:
            return b""
        sample, logprobs = delta.sample, b""
        if self.told.logprobs and delta.logprobs:
            logprobs, self._offsets[sample] = self._legacy(delta.logprobs, self._offsets[sample])
        text = delta.text if not delta.parts else text_of(delta.parts)
        if not text and not logprobs and not self.told.continuous:
            return b""
        return self._event(sample, b'"text":%b' % _encode(text), logprobs)

    def _everywhere(self, text: str, logprobs: bytes) -> bytes:
        """Events that tell the same of every sample."""
        said = b'"text":%b' % _encode(text)
        return b"".join([self._event(sample, said, logprobs) for sample in range(self.told.num_samples)])

    def _legacy(self, entries: list[TokenLogprobs], offset: int) -> tuple[bytes, int]:
        """Log-probabilities in JSON, and where the text behind them begins."""
        legacy = Legacy(self.told.words, offset)
        legacy.add(entries)
        return legacy.encoded(), legacy.offset


def text_of(parts: Iterable[Part]) -> str:
    """All that parts say, as a completion of a text tells it, which has none."""
    return "".join([part.name + part.text for part in parts])


def _call_delta(part: Part) -> dict[str, Any]:
    """A piece of a call: its name and id come once, its arguments in pieces. Mistral's client wants a name in each;
    an empty one changes nothing for clients that join pieces."""
    call: dict[str, Any] = {"index": part.call}
    if part.id:
        call["id"] = part.id
    if part.name:
        call["type"] = "function"
    return call | {"function": {"name": part.name, "arguments": part.text}}


def _thinking(text: str) -> dict[str, Any]:
    """A thought as a chunk of Mistral's."""
    return {"type": "thinking", "thinking": [{"type": "text", "text": text}]}


# --- whole answers -----------------------------------------------------------------------------------------


def listed(*parts: bytes | bytearray) -> list[Piece]:
    """Entries, each with a comma behind it, without the last comma; not copied."""
    found = [part for part in parts if part]
    return [*found[:-1], memoryview(found[-1])[:-1]] if found else []


class Legacy:
    """Log-probabilities as completions tell them: lists of the same length, in JSON. `offset`: where the next
    token's text begins, in characters of the texts of tokens."""

    _LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")

    def __init__(self, words: TokenWords, offset: int = 0) -> None:
        self.offset = offset
        self._words = words
        self._lists = {name: bytearray() for name in self._LISTS}

    def begin(self, token_id: int, text: str) -> None:
        """Append the first position of a prompt with this text: nothing is before it to be likely after."""
        self._append(token_id, None, None)
        if not text.startswith(self._words.text(token_id)):
            self.offset = 0  # a control token, of which the text has nothing

    def add(self, logprobs: Iterable[TokenLogprobs]) -> int:
        """Append positions; the bytes that they are."""
        words, before = self._words, self._num_bytes
        for entry in logprobs:
            self._append(entry.token_id, number(entry.logprob), legacy_top(words, entry))
        return self._num_bytes - before

    @property
    def _num_bytes(self) -> int:
        return sum(map(len, self._lists.values()))

    def encoded(self) -> bytes:
        """The object."""
        return b"".join(self.pieces())

    def pieces(self, before: Legacy | None = None) -> list[Piece]:
        """The object, with the positions of `before` in front, in pieces that belong together: it may be long."""
        told: list[Piece] = []
        for name, entries in self._lists.items():
            told += [b"," if told else b"{", _encode(name), b":["]
            told += listed(before._lists[name] if before else b"", entries)
            told.append(b"]")
        return [*told, b"}"]

    def _append(self, token_id: int, *told: Any) -> None:
        row = (self._words.text(token_id), *told, self.offset)
        for entries, value in zip(self._lists.values(), row, strict=True):
            entries += _encode(value)
            entries += b","
        self.offset += len(self._words.bytes_of(token_id).decode(errors="replace"))


def message_of(answer: Answer, reasoning: Reasoning) -> dict[str, Any]:
    """An answer as the message that it is."""
    parts = answer.parts
    thought, text = answer.thinking, answer.text
    calls = [_call(part) for part in parts if part.kind == "call"]
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
    if thought and reasoning == "thinking":
        said = [part for part in parts if part.kind != "call" and part.text]
        message["content"] = [
            _thinking(part.text) if part.kind == "thinking" else {"type": "text", "text": part.text}
            for part in said
        ]
    elif thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return message


def _call(part: Part) -> dict[str, Any]:
    function = {"name": part.name, "arguments": part.text}
    return {"id": part.id, "type": "function", "function": function}


def thought_tokens(answers: Iterable[Answer]) -> int:
    """Tokens that thoughts are, of all answers."""
    return sum(part.num_tokens for answer in answers for part in answer.parts if part.kind == "thinking")


def chat_choice(
    index: int, answer: Answer, end: SampleEnd, reasoning: Reasoning, entries: bytearray
) -> list[Piece]:
    """A choice of a chat completion, in pieces. entries: its log-probabilities, as of `listed`; empty for none."""
    told = _encode({"index": index, "message": message_of(answer, reasoning), **_ended(end)})[:-1]
    if not entries:
        return [told, b',"logprobs":null}']
    return [told, b',"logprobs":{"content":[', *listed(entries), b'],"refusal":null}}']


def completion_choice(
    index: int, text: str, end: SampleEnd, logprobs: Sequence[Piece], prompt_logprobs: Sequence[Piece] = ()
) -> list[Piece]:
    """A choice of a text completion, in pieces. logprobs, prompt_logprobs: in JSON; empty for none."""
    told = _encode({"index": index, "text": text, **_ended(end)})[:-1]
    more = [b',"prompt_logprobs":', *prompt_logprobs] if prompt_logprobs else []
    return [told, b',"logprobs":', *(logprobs or [b"null"]), *more, b"}"]


def _ended(end: SampleEnd) -> dict[str, Any]:
    """The fields that say how a sample ended. incomplete: before its grammar did; left out where that is not so."""
    told = {"finish_reason": end.finish_reason, "stop_reason": end.stop}
    return told | {"incomplete": True} if end.incomplete else told


def whole(
    told: Head, choices: Sequence[Sequence[Piece]], usage: dict[str, Any], prompt_logprobs: Sequence[Piece] = ()
) -> list[Piece]:
    """A whole answer, in pieces. prompt_logprobs: in JSON, where they stand beside choices."""
    before = b'%b,"choices":[' % _encode(_fields(told))[:-1]
    between = [piece for choice in choices for piece in (b",", *choice)][1:]
    more = [b',"prompt_logprobs":', *prompt_logprobs] if prompt_logprobs else []
    return [before, *between, b'],"usage":%b' % _encode(usage), *more, b"}"]
