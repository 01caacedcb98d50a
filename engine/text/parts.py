"""From token ids to the parts of an answer: text, thoughts, and calls of tools, as they come.

What belongs to no part: markers; of a call, all but its name, its arguments and, if it is 9 letters or digits, its
id, which in a list of calls may come behind the arguments, and then is in the call's last piece; the spaces between
a call's end and what follows. All else that the tokens spell is in some part, as it was written. What is not as it
should be ends so:

- A marker acts wherever it stands, except within its like: one that ends what has not begun, or begins a thought
  within a thought, is passed over. What begins ends what is open: a call ends a thought, a thought ends a call.
- A thought that is not closed is one to the end (`in_thinking`).
- Stop strings are looked for in text alone, and not across what stands between two texts. A stop string that is a
  control token stops wherever the model writes it.
- A call whose arguments are cut, or no JSON object, keeps their text, and is one of `broken_calls`; so is a call
  whose name is none that a tool may have. Where there is no beginning of arguments, its text is all that was
  written of it.
- A list of calls goes on behind one that is broken, if brackets and quotes say where that ends.
- With `parallel` false, what would open a second call stops like a stop string, and `stop` is the marker. If
  that is one token, it is not taken.

A token counts (`num_tokens`) for the part of its last character, and one that spells a marker, or is one, for what
the marker opens or closes. A token without a text counts for the part before it. Tokens are counted as soon as it
is certain for what: those of a push may be fewer or more than it took. Where it took some, and nothing is certain,
there is a piece without text and tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from cierzo.engine.messages import Part, PartKind
from cierzo.engine.text.calls import Calls
from cierzo.engine.text.detok import StopMatcher, TextReader, TokenBytes, stop_matcher
from cierzo.engine.text.json_scan import SPACE
from cierzo.engine.text.pieces import TEXT, THINKING, PartName, Piece
from cierzo.engine.text.reader_state import Mode, ReaderState
from cierzo.engine.text.syntax import Mark, Syntax

_is_call_id = re.compile(r"[a-zA-Z0-9]{9}").fullmatch


def numbered(call: int) -> str:
    """An id of a call that is unique within its answer."""
    return f"{call:09}"


class PartsReader(TextReader):
    """Parts of one sample. `push` and `flush` return its text, and leave all that they read in `parts`.

    in_thinking: the prompt ended within a thought. parallel: there may be several calls. call_id: an id for a call,
    by its number, if the model gives none. num_calls: calls that have begun. call_ids: of those that have one.
    broken_calls: numbers of those that ended as no whole call.
    """

    __slots__ = (
        "_call_id",
        "_calls",
        "_first",
        "_known_ids",
        "_last",
        "_marks",
        "_mode",
        "_parallel",
        "_pieces",
        "_plain",
        "_slow_ids",
        "_spelled",
        "_spelled_state",
        "_syntax",
        "_target",
        "_unclaimed",
        "_unsure",
        "broken_calls",
        "call_ids",
        "num_calls",
    )

    def __init__(
        self,
        tokens: TokenBytes,
        syntax: Syntax,
        stop: tuple[str, ...] = (),
        min_tokens: int = 0,
        stop_tokens: Mapping[int, str] = {},
        *,
        in_thinking: bool = False,
        parallel: bool = True,
        call_id: Callable[[int], str] = numbered,
    ) -> None:
        super().__init__(tokens, stop, min_tokens, stop_tokens)
        self._syntax = syntax
        self._marks = syntax.tokens
        self._slow_ids = frozenset((*syntax.tokens, *stop_tokens))
        self._spelled = stop_matcher(tuple(syntax.spelled)) if syntax.spelled else None
        self._first = ord(min(syntax.spelled)[0]) if syntax.spelled else 0  # the byte that they all begin with
        self._parallel = parallel
        self._call_id = call_id
        self._mode: Mode = "thinking" if in_thinking else "start" if syntax.bare_calls else "text"
        self._last = THINKING if in_thinking else TEXT
        self._target: PartName | None = self._last
        self._unclaimed = 0
        self._unsure: list[str] = []
        self._spelled_state = 0
        self._calls: Calls | None = None
        self._pieces: list[Piece] = []
        self.num_calls = 0
        self.call_ids: list[str] = []
        self._known_ids: set[str] = set()
        self.broken_calls: list[int] = []
        self._plain = self._plain_part()

    @property
    def watches(self) -> bool:
        """Whether there is something that stops: stop strings, or a second call."""
        return self._matcher is not None or not self._parallel

    @property
    def in_thinking(self) -> bool:
        """Whether it stands within a thought."""
        return self._mode == "thinking"

    def fork(self) -> Self:
        """Another one that stands at the same place."""
        fork = super().fork()
        fork._calls = None if self._calls is None else self._calls.copy()
        fork._unsure, fork._pieces = [*self._unsure], []
        fork.call_ids, fork.broken_calls = [*self.call_ids], [*self.broken_calls]
        fork._known_ids = {*self.call_ids}
        return fork

    def state(self) -> ReaderState:
        """The place where it stands, for `go_on_after` of one that is made alike, in any process."""
        return ReaderState(
            undecoded=self._decoder.getstate()[0],
            held=self._held,
            at_start=self._at_start,
            mode=self._mode,
            target=self._target,
            unclaimed=self._unclaimed,
            unsure=[*self._unsure],
            num_calls=self.num_calls,
            call_ids=[*self.call_ids],
            broken_calls=[*self.broken_calls],
            calls=None if self._calls is None else self._calls.copy(),
        )

    def go_on_after(self, num_tokens: int, state: ReaderState) -> None:
        """Stand where one that has seen so many tokens, and was not stopped, stands; this one must be new."""
        self.num_tokens = num_tokens
        self._decoder.setstate((state.undecoded, 0))
        self._hold(state.held)
        self._at_start = state.at_start
        self._mode, self._target, self._unclaimed = state.mode, state.target, state.unclaimed
        self._last, self._unsure = state.target or TEXT, [*state.unsure]
        self.num_calls = state.num_calls
        self.call_ids, self.broken_calls = [*state.call_ids], [*state.broken_calls]
        self._known_ids = {*state.call_ids}
        self._calls = None if state.calls is None else state.calls.copy()
        if self._spelled is not None:
            for char in "".join(self._unsure):
                self._spelled_state = self._spelled.step(self._spelled_state, char)
        self._plain = self._plain_part()

    def catch_up(self, token_ids: Sequence[int], end: int) -> None:
        """Go on after the first `end` tokens, in which nothing stops; this one must be new. It reads them all."""
        self.push(token_ids[:end])
        self.parts = []

    def push(self, token_ids: Sequence[int]) -> str:
        """Take tokens, return the text that is now certain; see `TextReader.push`."""
        plain = self._plain
        if plain is not None and self._slow_ids.isdisjoint(token_ids):
            if plain == "text" and self._spelled is None:
                self.parts = []
                return TextReader.push(self, token_ids)
            pieces = b"".join(map(self._token_bytes, token_ids))
            if self._spelled is None or self._first not in pieces:
                self.parts = []
                if plain == "text" and self._matcher is not None:
                    return TextReader.push(self, token_ids)
                self.num_tokens += len(token_ids)
                text = self._stripped(self._decoder.decode(pieces))
                if plain == "text":
                    return text
                self.parts = [Part(kind="thinking", text=text, num_tokens=len(token_ids))]
                return ""
        before = self.num_tokens
        for token_id in token_ids:
            if self._take(token_id):
                break
        return self._hand_over(self.num_tokens - before)

    def flush(self) -> str:
        """Text that was held back, at the end of a generation that nothing in it ended."""
        if self.stop is not None:
            self.parts = []
            return ""
        self._settle(self.num_tokens)
        if self.stop is None:
            self._leave()
        return self._hand_over(0)

    # --- calls, as `Calls` finds them

    def may_call(self, at: int) -> bool:
        """Whether another call may begin; if not, this stops."""
        if self._parallel or not self.num_calls:
            return True
        self.stop = self._syntax.call_marker
        return False

    def call(self, name: str, call_id: str, *, id_may_follow: bool) -> None:
        """A call begins."""
        if self._mode == "guess":  # and was none before
            self._unclaimed += len(self._unsure) - 1
            self._mode, self._unsure = "call", []
        number = self.num_calls
        self.num_calls += 1
        part: PartName = ("call", number)
        self._target = part
        self._piece(part).name = name
        if not id_may_follow:
            self._name(call_id)
        self._credit(0)

    def _name(self, call_id: str) -> None:
        """Give the present call an id: the model's, if it is one that no other call of the answer has."""
        number = self.num_calls - 1
        is_own = _is_call_id(call_id) is not None and call_id not in self._known_ids
        self.call_ids.append(call_id if is_own else self._call_id(number))
        self._known_ids.add(self.call_ids[-1])
        self._piece(("call", number)).call_id = self.call_ids[-1]

    def argue(self, text: str) -> None:
        """More of the call's arguments."""
        self._piece(("call", self.num_calls - 1)).texts.append(text)

    def close(self, is_whole: bool, call_id: str) -> None:
        """The call has ended."""
        if len(self.call_ids) < self.num_calls:
            self._name(call_id)
        if not is_whole:
            self.broken_calls.append(self.num_calls - 1)

    # --- tokens

    def _take(self, token_id: int) -> bool:
        """Take a token; whether it stops."""
        self.num_tokens += 1
        mark = self._marks.get(token_id)
        if token_id in self._stop_tokens and self.num_tokens >= self._min_tokens:
            self._settle(self.num_tokens - 1)
            self._leave()
            self.stop = self.stop or self._stop_tokens[token_id]
        elif mark is not None and self._acts(mark):
            self._settle(self.num_tokens - 1)
            if self.stop is None:
                self._act(mark)
                if self.stop is not None:
                    self.num_tokens -= 1
                    return True
        else:
            self._see(b"" if mark is not None else self._token_bytes(token_id))
        if not self._unsure:  # else it is the last of these
            self._credit(1)
        return self.stop is not None

    def _see(self, token: bytes) -> None:
        """Read a token's bytes."""
        piece = self._stripped(self._decoder.decode(token))
        if self._mode == "guess":
            if token:
                self._guess(piece)
            else:
                self._refuse(present=False)
        elif self._spelled is not None and (self._unsure or self._first in token):
            self._look(piece, self._spelled)
            if token and not piece:
                self._route("")
        elif token:
            self._route(piece)

    def _settle(self, last: int) -> None:
        """Read what was waiting for more, as none follows it. last: the number of the last token before here."""
        if self._mode == "guess":
            self._mode, self._calls = "text", None
        self._release_all(last, present=False)
        if self.stop is None and (piece := self._stripped(self._decoder.decode(b"", final=True))):
            self._route(piece)

    # --- markers

    def _look(self, piece: str, matcher: StopMatcher) -> None:
        """Read text in which a marker may be spelled."""
        state, unsure = self._spelled_state, self._unsure
        if not piece:  # a marker is written in one go
            self._release_all(self.num_tokens - 1, present=False)
            return
        unsure.append(piece)
        num_chars = sum(map(len, unsure))
        for seen, char in enumerate(piece, start=1):
            state = matcher.step(state, char)
            if (marker := matcher.match[state]) is None:
                continue
            rest = piece[seen:]
            self._release(num_chars - len(rest) - len(marker), self.num_tokens, present=True)
            if self.stop is None:
                self._act_spelled(self._syntax.spelled[marker], len(unsure) - 1)
            unsure[:] = [rest] if rest and self.stop is None else []
            if self.stop is not None:
                return
            num_chars, state = len(rest), 0
        self._spelled_state = state
        self._release(num_chars - matcher.depth[state], self.num_tokens, present=True)

    def _act_spelled(self, mark: Mark, num_before: int) -> None:
        """Act on a marker that so many tokens before the present one spell, too."""
        if not self._acts(mark):
            self._credit(num_before)
        elif mark in ("/think", "/call"):
            self._credit(num_before)
            self._act(mark)
        else:
            self._act(mark)
            self._credit(num_before)

    def _acts(self, mark: Mark) -> bool:
        """Whether a marker does something here."""
        match mark:
            case "call":
                return True
            case "think":
                return self._mode != "thinking"
            case "/think":
                return self._mode == "thinking"
        return self._mode == "call"

    def _act(self, mark: Mark) -> None:
        match mark:
            case "think":
                self._leave()
                self._mode, self._target = "thinking", THINKING
            case "/think":
                self._mode = "start" if self._syntax.bare_calls else "text"
            case "call":
                self._leave()
                if self.may_call(0):
                    self._mode, self._target = "call", None
                    self._calls = Calls(is_named=self._syntax.named_calls)
            case "/call":
                self._leave()
                self._mode = "closed"
            case _:
                assert self._calls is not None
                self._calls.mark(mark, self)

    def _leave(self) -> None:
        """End what is open."""
        if self._calls is not None:
            self._calls.end(self)
            self._calls, self._mode = None, "text"
            self._target = self._target or TEXT
            self._credit(0)
        elif self._held:
            self._piece(TEXT).texts.append(self._held)
            self._hold("")

    # --- text

    def _release_all(self, last: int, *, present: bool) -> None:
        self._release(sum(map(len, self._unsure)), last, present=present)
        self._spelled_state = 0

    def _release(self, num_chars: int, last: int, *, present: bool) -> None:
        """Read so many characters that are no part of a marker. last: the number of the last token that is unsure;
        present: it is not counted here."""
        unsure, now = self._unsure, self.num_tokens
        while unsure and self.stop is None:
            piece = unsure[0]
            self.num_tokens = last - len(unsure) + 1
            if num_chars < len(piece):
                if num_chars:
                    unsure[0] = piece[num_chars:]
                    self._route(piece[:num_chars])
                break
            num_chars -= len(piece)
            del unsure[0]
            self._route(piece)
            self._credit(1 if unsure or not present else 0)
        self.num_tokens = now
        if self.stop is not None:
            self._credit(len(unsure) - 1 if unsure and present else len(unsure))
            unsure.clear()

    def _route(self, text: str) -> None:
        """Read text that is no marker."""
        if self._mode == "closed":
            behind = text.lstrip(SPACE + ";" if self._syntax.bare_calls else SPACE)
            if text and not behind:
                return
            text, self._mode = behind, "start" if self._syntax.bare_calls else "text"
        if self._mode == "start":
            self._start(text)
        elif self._mode == "text":
            self._target = TEXT
            certain = text if self._matcher is None else self._match(text, self._matcher)
            self._piece(TEXT).texts.append(certain)
        elif self._mode == "thinking":
            self._target = THINKING
            self._piece(THINKING).texts.append(text)
        else:
            self._read_calls(text)

    def _start(self, text: str) -> None:
        """Read text before which there was none but spaces."""
        bare = text.lstrip(SPACE)
        spaces = text[: len(text) - len(bare)]
        self._mode = "text"
        if not bare.startswith("{"):
            self._route(text)
            if not bare:
                self._mode = "start"
            return
        if spaces:
            self._route(spaces)
        if self.stop is None and self.may_call(0):
            self._mode, self._calls = "guess", Calls(is_bare=True)
            self._guess(bare)

    def _guess(self, text: str) -> None:
        """Read what may be a call without a marker."""
        assert self._calls is not None
        self._unsure.append(text)
        behind = self._calls.feed(text, self)
        if self._calls.is_refused:
            self._refuse(present=True)
        elif self._mode == "call":
            self._after_calls(text[behind:])

    def _refuse(self, *, present: bool) -> None:
        """Take for text what might have been a call. present: the present token is a part of it."""
        self._mode, self._calls = "text", None
        self._release_all(self.num_tokens if present else self.num_tokens - 1, present=present)

    def _read_calls(self, text: str) -> None:
        assert self._calls is not None
        self._after_calls(text[self._calls.feed(text, self) :])

    def _after_calls(self, rest: str) -> None:
        """Go on behind calls, if they have ended."""
        assert self._calls is not None
        if self.stop is not None:
            self._leave()
        elif self._calls.place == "over":
            self._target = self._target or TEXT
            self._mode, self._calls = "closed", None
            if rest:
                self._route(rest)
        elif not self._calls.is_open:
            self._target = None

    # --- pieces

    def _piece(self, part: PartName) -> Piece:
        """The piece that is added to, if it is of this part; else a new one."""
        if not self._pieces or self._pieces[-1].part != part:
            self._pieces.append(Piece(part))
        return self._pieces[-1]

    def _credit(self, num_tokens: int) -> None:
        """Count tokens, and those that waited, for the present part."""
        num_tokens += self._unclaimed
        self._unclaimed = num_tokens if self._target is None else 0
        if self._target is not None and num_tokens:
            self._piece(self._target).num_tokens += num_tokens

    def _hand_over(self, num_taken: int) -> str:
        """The text of the pieces, which become `parts` if they are more than that."""
        pieces, self._pieces = self._pieces, []
        self._plain = self._plain_part()
        text = "".join(["".join(piece.texts) for piece in pieces if piece.part == TEXT])
        is_text = all(piece.part == TEXT for piece in pieces)
        if is_text and sum(piece.num_tokens for piece in pieces) == num_taken:
            self.parts = []
        else:
            self.parts = [piece.whole() for piece in pieces or (Piece(self._last),)]
        self._last = pieces[-1].part if pieces else self._last
        return text

    def _plain_part(self) -> PartKind | None:
        """The part that tokens without a marker belong to, all of them; None if it must be looked."""
        if self._unsure or self._target not in (TEXT, THINKING) or self._mode != self._target[0]:
            return None
        return self._target[0]
