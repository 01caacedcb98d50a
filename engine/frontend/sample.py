"""An answer as a log of its tokens, with a cursor that says what its reader has got.

Text is not kept: what is certain after so many tokens is a function of these tokens, so that a reader at any place
of the log gets its text from a detokenizer that stands there. One that tells text, thoughts and calls apart cannot
be put anywhere by a few tokens: the log keeps where it stood, now and then.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import cast

import msgspec

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.answer import in_order, joined
from cierzo.engine.frontend.logprob_log import LogprobLog
from cierzo.engine.messages import EndReason, Finish, Part, Submit, TokenDelta, TokenLogprobs
from cierzo.engine.text.parts import PartsReader
from cierzo.engine.text.prompt import Reader
from cierzo.engine.text.reader_state import ReaderState
from cierzo.scheduler.plan import entry_bytes

NEVER_S = -1.0  # a time before all others
TOKEN_BYTES = 4
TEXT_BYTES = 4  # of a token, about; of an answer in parts its states instead
STATE_TOKENS = 1024  # after so many, where a reader of parts stands is kept: nobody has to read more again
STATE_BYTES = 128  # of a state that is kept, besides its MessagePack
NO_PARTS: list[Part] = []
Taken = tuple[list[int], str, list[TokenLogprobs] | None, list[Part]]  # tokens, text, log-probabilities, parts
_encode = msgspec.msgpack.Encoder().encode
_decode_state = msgspec.msgpack.Decoder(ReaderState).decode


def most_token_bytes(logprobs: int | None) -> int:
    """Heap that a token of an answer takes at most, with so many alternatives to it."""
    return TOKEN_BYTES + TEXT_BYTES + (0 if logprobs is None else entry_bytes(logprobs))


def require_bounded(submit: Submit, num_prompt_tokens: int, limit: int) -> None:
    """Raise InvalidRequest for answers that are to come in one piece, and may take more bytes than `limit`."""
    params = submit.sampling
    if params.prompt_logprobs is not None:
        each = entry_bytes(params.prompt_logprobs)
        if num_prompt_tokens * each > limit // 2:
            raise InvalidRequest(
                f"without deltas, log-probabilities of {num_prompt_tokens} prompt tokens may take {each} bytes "
                f"each, more than half of max_answer_bytes, {limit}",
                field="sampling.prompt_logprobs",
                limit=f"a prompt of {limit // 2 // each} tokens",
                value=num_prompt_tokens,
            )
        limit -= num_prompt_tokens * each
    token_bytes = most_token_bytes(params.logprobs)
    if params.n * params.max_tokens * token_bytes > limit:
        raise InvalidRequest(
            f"without deltas, {params.n} answers of {params.max_tokens} tokens may take {token_bytes} bytes a "
            f"token, more than max_answer_bytes, {limit}",
            field="sampling.max_tokens",
            limit=limit // (params.n * token_bytes),
            value=params.max_tokens,
        )


class Sample:
    """An answer, of a request's n. `token_ids` includes the tokens of a resumed request (`num_brought`).

    sent: the cursor; the reader has the tokens before it. keeps: log-probabilities are kept after they were sent.
    whole: nothing is sent before the end (deltas=false). states: where a reader of parts stood within the tokens
    that a resumed request brought, after each STATE_TOKENS and after all.
    computed: positions that runs before the present one have computed for sure. last_s: when its last tokens came,
    by the clock; NEVER_S before the first ones, and after a pause of its reader.
    cut: a stop string was found, or a call too many; whatever the core still sends is overrun.
    tail_apart: it ended without a last token, so the text that was held back comes in a delta without tokens.
    """

    __slots__ = (
        "_flushed",
        "_keeps",
        "_logprobs",
        "_reader",
        "_state_bytes",
        "_states",
        "_text",
        "_watches",
        "_whole",
        "computed",
        "cut",
        "detokenizer",
        "finish",
        "index",
        "last_s",
        "num_brought",
        "sent",
        "stop",
        "tail_apart",
        "token_ids",
    )

    def __init__(
        self,
        index: int,
        detokenizer: Reader | None,
        token_ids: Iterable[int] = (),
        *,
        keeps: bool = False,
        whole: bool = False,
        states: Sequence[ReaderState] = (),
    ) -> None:
        self.index = index
        self.detokenizer = detokenizer
        self.token_ids = array("i", token_ids)
        self.num_brought = self.sent = len(self.token_ids)
        self.stop: str | int | None = None
        self.computed = 0
        self.last_s = NEVER_S
        self.cut = False
        self.finish: Finish | None = None
        self.tail_apart: bool | None = None
        self._keeps = keeps
        is_apart = isinstance(detokenizer, PartsReader)
        self._watches = detokenizer is not None and (is_apart or detokenizer.watches)
        # With stop strings `detokenizer` stands at the end of the log, and a reader that is behind has its own;
        # without, it stands at the cursor. With `whole` and stop strings the text is kept, as UTF-8. A reader of
        # parts stands at the end of the log in any case, and the text is not kept: its `_states` are.
        self._whole = whole
        self._text = bytearray() if whole and self._watches and not is_apart else None
        self._reader: Reader | None = None
        self._flushed = False
        self._logprobs: LogprobLog | None = None
        self._state_bytes = 0
        self._states: list[tuple[int, bytes]] | None = [] if is_apart else None  # by tokens before
        for count, state in enumerate(states, start=1):
            self._keep_state(min(count * STATE_TOKENS, self.num_brought), state)

    @property
    def unsent(self) -> bool:
        """Whether there is something behind the cursor."""
        if self.sent < len(self.token_ids):
            return True
        return (self.finish is not None or self.cut) and not self._flushed

    @property
    def unsent_bytes(self) -> int:
        """Heap of what is behind the cursor."""
        tokens = len(self.token_ids) - self.sent
        if not tokens or self._logprobs is None:
            return TOKEN_BYTES * tokens
        kept = len(self.token_ids) - self._logprobs.first
        return TOKEN_BYTES * tokens + self._logprobs.num_bytes * min(tokens, kept) // max(kept, 1)

    @property
    def num_bytes(self) -> int:
        """Heap of the whole log."""
        text = 0 if self._text is None else len(self._text)
        return TOKEN_BYTES * len(self.token_ids) + text + self.logprob_bytes + self._state_bytes

    @property
    def logprob_bytes(self) -> int:
        """Heap of the log-probabilities."""
        return 0 if self._logprobs is None else self._logprobs.num_bytes

    @property
    def first_offset(self) -> int:
        """The first token from which on the log is whole."""
        return 0 if self._logprobs is None else self._logprobs.first

    def take(self, delta: TokenDelta) -> Taken:
        """Pass on, to a reader who has all that was before: the tokens of `delta` that belong to the answer, the
        text that is now certain, their log-probabilities, ready to be sent, and the parts that all this is."""
        token_ids, logprobs, detokenizer = delta.token_ids, delta.logprobs, self.detokenizer
        text = "" if detokenizer is None else detokenizer.push(token_ids)
        if delta.finish is not None or (detokenizer is not None and detokenizer.stop is not None):
            token_ids, text, logprobs, parts = self._end_text(delta, text)
            self._flushed = True
        else:
            parts = detokenizer.parts if token_ids and detokenizer is not None else NO_PARTS
        if logprobs and self._keeps:
            logprobs = cast(
                list[TokenLogprobs], msgspec.Raw(self._log(logprobs))
            )  # packed once, for log and reader
        self.token_ids.fromlist(token_ids)
        self.sent = len(self.token_ids)
        self._reader = None
        return token_ids, text, logprobs, parts

    def append(self, delta: TokenDelta) -> int:
        """Only log, for a reader who is behind or not there: the bytes that it takes."""
        token_ids, logprobs = delta.token_ids, delta.logprobs
        if self._watches:
            assert self.detokenizer is not None
            if self._reader is None and not self._whole:
                self._reader = self.detokenizer.fork()
            token_ids, text, logprobs, _ = self._end_text(delta, self.detokenizer.push(token_ids))
            if self._text is not None:
                self._text += text.encode()
        elif delta.finish is not None:
            self.tail_apart = not token_ids
        before = self.logprob_bytes
        if logprobs:
            self._log(logprobs)
        self.token_ids.fromlist(token_ids)
        return self.logprob_bytes - before + TOKEN_BYTES * len(token_ids)

    def remember(self) -> None:
        """Keep where a reader of parts stands, if STATE_TOKENS have come since the last time."""
        states, num_tokens = self._states, len(self.token_ids)
        if states is None or self.cut or num_tokens - (states[-1][0] if states else 0) < STATE_TOKENS:
            return
        assert isinstance(self.detokenizer, PartsReader)
        self._keep_state(num_tokens, self.detokenizer.state())

    def read(self, most: int) -> Taken | None:
        """Move the cursor by up to `most` tokens: what `take` gives of these; None for nothing."""
        start, end = self.sent, min(self.sent + most, len(self.token_ids))
        token_ids = self.token_ids[start:end].tolist()
        reader = self._reader or self.detokenizer
        text, parts = "", NO_PARTS
        if reader is not None and token_ids:
            text, parts = reader.push(token_ids), reader.parts
        self.sent = end
        if end == len(self.token_ids):
            if self.finish is None and not self.cut:
                self._reader = None  # `detokenizer` stands here too
            elif not self._flushed and not (self.tail_apart and token_ids):
                self._flushed = True
                text, parts = _flushed(reader, token_ids, text, parts)
        logprobs = None
        if self._logprobs is not None and token_ids:
            logprobs = self._logprobs.read(start, end)
            if not self._keeps:
                self._logprobs.forget(end)
        return (token_ids, text, logprobs, parts) if token_ids or text or parts else None

    def seek(self, offset: int, fresh: Reader | None) -> None:
        """Move the cursor to token `offset`, for a reader who has what is before; `fresh` is a new detokenizer."""
        self.sent = offset
        is_end = offset == len(self.token_ids)
        has_ended = self.finish is not None or self.cut
        self._flushed = is_end and has_ended and not self.tail_apart
        if fresh is None:
            return
        self.place(fresh, offset)
        if not self._watches:
            self.detokenizer = fresh
        elif not self._whole:
            self._reader = None if is_end and not has_ended else fresh

    def place(self, fresh: Reader, offset: int) -> None:
        """Have a new reader stand behind the first `offset` tokens."""
        if self._states is None or not isinstance(fresh, PartsReader):
            fresh.catch_up(self.token_ids, offset)
            return
        start, before = 0, bisect_right(self._states, offset, key=itemgetter(0))
        if before:
            start, state = self._states[before - 1]
            fresh.go_on_after(start, _decode_state(state))
        fresh.push(self.token_ids[start:offset])

    def read_whole(self, fresh: Reader | None) -> tuple[str, list[Part]]:
        """The text and the parts of the whole answer, of one that has ended; without those of tokens that the
        client brought."""
        if self._text is not None:
            return self._text.decode(), NO_PARTS
        if fresh is None:
            return "", NO_PARTS
        self.place(fresh, self.num_brought)
        token_ids = self.token_ids[self.num_brought :]
        text, parts = _flushed(fresh, token_ids, fresh.push(token_ids), fresh.parts)
        return text, joined(parts)

    def all_logprobs(self) -> list[TokenLogprobs] | None:
        """The log-probabilities of the whole answer, ready to be sent."""
        log = self._logprobs
        return None if log is None else cast(list[TokenLogprobs], log.packed(log.first, len(self.token_ids)))

    @property
    def watched_text(self) -> bytearray | None:
        """The text of the whole answer, as UTF-8, if it was looked at for stop strings and nothing was sent."""
        return self._text

    def packed_logprobs(self) -> tuple[bytes, bytearray] | None:
        """The log-probabilities of the whole answer, as MessagePack in two parts."""
        return None if self._logprobs is None else self._logprobs.whole()

    def forget_logprobs(self, share: float, *, sent_only: bool) -> None:
        """Drop the oldest log-probabilities, a share of those that are kept; `sent_only`: before the cursor."""
        if (log := self._logprobs) is not None:
            until = log.first + int((len(self.token_ids) - log.first) * share) + 1
            log.forget(min(until, self.sent) if sent_only else until)

    def keep_sent(self, num_bytes: int) -> None:
        """Drop log-probabilities before the cursor, but for the last ones, in so many bytes."""
        if self._logprobs is not None and self._keeps:  # else none are there
            self._logprobs.forget(self._logprobs.before(self.sent, num_bytes))

    def keep_from(self, token: int) -> None:
        """Drop log-probabilities before this token."""
        if self._logprobs is not None:
            self._logprobs.forget(token)

    def end(self, finish: Finish) -> None:
        """The sample is over; a stop string found before keeps its say about why."""
        self.finish = finish
        if self.tail_apart is None:
            self.tail_apart = True
        if self.stop is None:
            self.stop = finish.stop_token_id

    def outcome(self, finish: Finish) -> tuple[EndReason, list[int]]:
        """Why it ended, as the client sees it, and the numbers of the calls in it that are broken."""
        reason: EndReason = "stop" if self.cut else finish.reason
        if not isinstance(self.detokenizer, PartsReader):
            return reason, []
        reader = self.detokenizer.fork()  # it may have ended without a last word of the core
        reader.flush()
        has_whole_call = reader.num_calls > len(reader.broken_calls)
        return ("tool_calls" if reason == "stop" and has_whole_call else reason), [*reader.broken_calls]

    def _keep_state(self, num_tokens: int, state: ReaderState) -> None:
        """Keep where the reader stands, unless that takes more than `most_token_bytes` counts for the text."""
        num_bytes = STATE_BYTES + len(packed := _encode(state))
        if self._states is not None and num_bytes <= STATE_TOKENS * TEXT_BYTES:
            self._states.append((num_tokens, packed))
            self._state_bytes += num_bytes

    def _end_text(self, delta: TokenDelta, text: str) -> Taken:
        """At the end of the text, add what the detokenizer held back, and cut what is behind a stop string."""
        token_ids, logprobs, detokenizer = delta.token_ids, delta.logprobs, self.detokenizer
        parts = NO_PARTS
        if detokenizer is not None:
            parts = detokenizer.parts if token_ids else NO_PARTS
            if detokenizer.stop is None and delta.finish is not None:
                text, parts = _flushed(detokenizer, token_ids, text, parts)
            if detokenizer.stop is not None:
                self.stop, self.cut = detokenizer.stop, True
                token_ids = token_ids[: detokenizer.num_tokens - len(self.token_ids)]
                logprobs = None if logprobs is None else logprobs[: len(token_ids)]
        if delta.finish is not None or self.cut:
            self.tail_apart = not token_ids
        return token_ids, text, logprobs, parts

    def _log(self, logprobs: list[TokenLogprobs]) -> bytes:
        """Append log-probabilities of tokens that are about to be appended; they as a MessagePack list."""
        if self._logprobs is None or (not self._keeps and self._logprobs.num_bytes == 0):
            self._logprobs = LogprobLog(len(self.token_ids))
        return self._logprobs.add(logprobs)


def _flushed(
    reader: Reader | None, token_ids: Sequence[int], text: str, parts: list[Part]
) -> tuple[str, list[Part]]:
    """`text` and `parts`, which a reader made of these tokens, with what it held back until the end."""
    if reader is None:
        return text, parts
    held = reader.flush()
    return text + held, in_order(parts, text, len(token_ids), reader.parts, held)
