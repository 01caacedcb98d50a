"""Masks: which token may come next, by the tokens of the answer so far. Allowed tokens, banned words, thoughts.

A banned word is a sequence of token ids: its last one may not be chosen where the answer ends in those before it.
Tokens of the prompt are none of the answer's. A thought that has used its budget is closed: the closing token comes
next, whatever else is asked for.

Where a step is launched before the one before it is collected, nobody but the device knows the answer's last token.
What depends on it is then told as a condition on it ("b may not follow a"), which the device checks. So no sequence
waits to know its token, and the rows of a step depend on no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cierzo.scheduler.params import ThinkingBudget
from cierzo.scheduler.plan import Admission

NOTHING_LEFT = "allowed_token_ids, bad_words, tool_choice and min_tokens leave no token to choose"
Word = tuple[int, ...]
_NO_PAIRS = np.zeros((0, 2), np.int64)


@dataclass(frozen=True, slots=True)
class Forced:
    """A token that comes next if whether the last one is `last` says `is_last`. As it stands: in any case, as no
    token is -1."""

    token_id: int
    last: int = -1
    is_last: bool = False


class Masks:
    """State of one sequence's masks. It follows from the parameters and the output alone."""

    def __init__(
        self,
        allowed: Sequence[int],
        banned: Sequence[Word],
        thinking: ThinkingBudget | None,
        output: Sequence[int] = (),
    ) -> None:
        """allowed: the only tokens to choose from; empty: all."""
        words = {tuple(word) for word in banned if word}
        self.allowed: NDArray[np.int64] = np.unique(np.array(allowed, np.int64))
        self._single = np.array(sorted(word[0] for word in words if len(word) == 1), np.int64)
        self._pairs = np.array(sorted(word for word in words if len(word) == 2), np.int64).reshape(-1, 2)
        self._by_last_but_one = _index(words, 2)  # the token that stands before a word's last
        self._by_last_but_two = _index(words, 3)
        self._reach = max(map(len, words), default=1) - 1
        self._tail = [*output[-self._reach :]] if self._reach else []
        self._thinking = thinking
        self._is_open, self._used = thinking is not None and thinking.is_open, 0
        if thinking is not None:
            for token_id in output:
                self._think(token_id, thinking)

    @classmethod
    def of(cls, admission: Admission) -> Masks | None:
        """Masks of a sequence as it is admitted; None where it asks for none."""
        allowed, banned, thinking = admission.sampling.allowed_token_ids, admission.banned, admission.thinking
        if not (allowed or banned or thinking):
            return None
        return cls(allowed, banned, thinking, admission.output_token_ids)

    def append(self, token_id: int) -> None:
        """Take in the answer's next token."""
        if self._reach:
            self._tail = [*self._tail, token_id][-self._reach :]
        if self._thinking is not None:
            self._think(token_id, self._thinking)

    def banned(self, pending: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens that may not come next, int64 [B]; and pairs, int64 [P,2], of a last token and one that may not
        follow it, where the last token is pending: chosen, and not taken in yet."""
        if not pending:
            more = [word[-1] for word in self._ending(self._by_last_but_one, 1)]
            return np.append(self._single, np.array(more, np.int64)) if more else self._single, _NO_PAIRS
        pairs = [word[-2:] for word in self._ending(self._by_last_but_two, 2)]
        return self._single, np.append(self._pairs, np.array(pairs, np.int64), 0) if pairs else self._pairs

    def forced(self, pending: bool) -> Forced | None:
        """The token that must come next, if there is one; on a condition where the last token is pending."""
        thinking = self._thinking
        if thinking is None:
            return None
        if self._is_open and self._used + pending >= thinking.max_tokens:
            return Forced(thinking.close_id, thinking.close_id, False) if pending else Forced(thinking.close_id)
        if pending and not self._is_open and not thinking.max_tokens:
            return Forced(thinking.close_id, thinking.open_id, True)
        return None

    def _ending(self, words: dict[int, list[Word]], num_last: int) -> list[Word]:
        """Words that the answer holds but for their `num_last` last tokens; `words` by the last token of that."""
        tail = self._tail
        found = words.get(tail[-1], ()) if tail else ()
        return [word for word in found if tail[num_last - len(word) :] == [*word[:-num_last]]]

    def _think(self, token_id: int, thinking: ThinkingBudget) -> None:
        if self._is_open:
            self._is_open = token_id != thinking.close_id
            self._used += 1
        elif token_id == thinking.open_id:
            self._is_open, self._used = True, 0


def _index(words: set[Word], place: int) -> dict[int, list[Word]]:
    """Words by the token at `place`, counted from the end; of those that have one."""
    found: dict[int, list[Word]] = {}
    for word in sorted(words):
        if len(word) >= place:
            found.setdefault(word[-place], []).append(word)
    return found
