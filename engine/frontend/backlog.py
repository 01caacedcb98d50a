"""Messages that a slow reader has not taken yet: deltas merged into one per sample, all messages in order."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from cierzo.engine.messages import Delta, Failure, Final, Message, TokenLogprobs

DELTA_BYTES, TOKEN_BYTES, LOGPROB_BYTES = 48, 5, 14  # upper estimates of what they take on the wire
_encode = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class _Merged:
    stream: int
    sample: int
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None

    def delta(self) -> Delta:
        return Delta(
            stream=self.stream,
            sample=self.sample,
            token_ids=self.token_ids,
            text="".join(self.texts),
            logprobs=self.logprobs,
        )


class Backlog:
    """Messages that wait for a reader. `num_bytes` is about what they will take on the wire."""

    __slots__ = ("_entries", "_merging", "num_bytes")

    def __init__(self) -> None:
        self._entries: list[Message | _Merged] = []
        self._merging: dict[int, dict[int, _Merged]] = {}  # stream -> sample
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, message: Message) -> None:
        """Append; a delta joins an earlier one of its sample."""
        if isinstance(message, Delta):
            self._merge(message)
            return
        if isinstance(message, Final | Failure):
            self._merging.pop(message.stream, None)
        self._entries.append(message)
        self.num_bytes += len(_encode(message))

    def take(self) -> list[Message]:
        """Everything, in order; the backlog is empty afterwards."""
        messages = [entry.delta() if isinstance(entry, _Merged) else entry for entry in self._entries]
        self._entries, self._merging, self.num_bytes = [], {}, 0
        return messages

    def _merge(self, delta: Delta) -> None:
        samples = self._merging.setdefault(delta.stream, {})
        merged = samples.get(delta.sample)
        if merged is None:
            merged = samples[delta.sample] = _Merged(delta.stream, delta.sample)
            self._entries.append(merged)
            self.num_bytes += DELTA_BYTES
        merged.token_ids += delta.token_ids
        merged.texts.append(delta.text)
        self.num_bytes += TOKEN_BYTES * len(delta.token_ids) + len(delta.text.encode())
        if delta.logprobs is not None:
            merged.logprobs = (merged.logprobs or []) + delta.logprobs
            self.num_bytes += LOGPROB_BYTES * sum(1 + len(entry.top_token_ids) for entry in delta.logprobs)
