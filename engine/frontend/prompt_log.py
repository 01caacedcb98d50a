"""The log-probabilities of a prompt: a log with a cursor, as an answer is one (`sample.py`).

Entries come packed from the core and leave as they came: nobody here looks into one, as a step may bring thousands.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from cierzo.engine.frontend.delta_cost import entry_cost
from cierzo.engine.frontend.logprob_log import LogprobLog


class PromptLog(LogprobLog):
    """Entries of a prompt's tokens from the second on; entry number i is of token i + 1.

    sent: the cursor; the reader has the entries before it. cost: of each in flow control. keeps: entries are kept
    after they were sent.
    """

    __slots__ = ("_keeps", "cost", "sent")

    def __init__(self, num_top: int, *, keeps: bool) -> None:
        super().__init__(0)
        self.sent = 0
        self.cost = entry_cost(num_top)
        self._keeps = keeps

    @property
    def is_unsent(self) -> bool:
        """Whether there is something behind the cursor."""
        return self.sent < self.end

    @property
    def unsent_bytes(self) -> int:
        """Heap of what is behind the cursor."""
        return self.num_bytes * (self.end - self.sent) // max(self.end - self.first, 1)

    def extend(self, entries: Iterable[msgspec.Raw]) -> int:
        """Append the next entries: the bytes that they take."""
        before = self.num_bytes
        self.add_packed(entries)
        return self.num_bytes - before

    def send(self, most: int) -> tuple[int, msgspec.Raw]:
        """Move the cursor by up to `most` entries: how many it were, and a MessagePack list of them."""
        start, self.sent = self.sent, min(self.sent + most, self.end)
        packed = self.packed(start, self.sent)
        if not self._keeps:
            self.forget(self.sent)
        return self.sent - start, packed

    def forget_logprobs(self, share: float, *, sent_only: bool) -> None:
        """Drop the oldest entries, a share of those that are kept; `sent_only`: before the cursor."""
        until = self.first + int((self.end - self.first) * share) + 1
        self.forget(min(until, self.sent) if sent_only else until)

    def keep_sent(self, num_bytes: int) -> None:
        """Drop entries before the cursor, but for the last ones, in so many bytes."""
        self.forget(self.before(self.sent, num_bytes))

    keep_from = LogprobLog.forget
