"""Words for tokens: the text and bytes by which answers tell the tokens of log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import msgspec

from cierzo.engine.gateway.backend import Backend
from cierzo.engine.messages import Delta, TokenLogprobs

LOWEST = -9999.0  # JSON has no infinity; a probability of zero is told like this
_encode = msgspec.json.encode


class TokenWords:
    """The words of one model's tokens, as far as they were asked for. `learn` before `text` and `entry`.

    Bytes that are no UTF-8 alone are told in OpenAI's way, "bytes:\\xe2\\x82"; a token without any, by its id.
    """

    __slots__ = ("_by_id", "_bytes", "_entries", "_texts")

    def __init__(self, by_id: bool = False) -> None:
        """by_id: tell every token as "token_id:7"."""
        self._by_id = by_id
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}
        self._entries: dict[int, bytes] = {}

    async def learn(self, backend: Backend, token_ids: Iterable[int]) -> None:
        """Ask for the bytes of tokens that are not known yet."""
        if unknown := [*{token_id for token_id in token_ids if token_id not in self._bytes}]:
            self._bytes.update(zip(unknown, await backend.token_bytes(unknown), strict=True))

    async def learn_all(self, backend: Backend, deltas: Iterable[Delta]) -> None:
        """Ask for those of all log-probabilities in new output."""
        for delta in deltas:
            if entries := delta.logprobs or delta.prompt_logprobs:
                await self.learn(backend, tokens_of(entries))

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token."""
        return self._bytes.get(token_id, b"")

    def text(self, token_id: int) -> str:
        """The text of a token."""
        found = self._texts.get(token_id)
        if found is None:
            found = self._texts[token_id] = self._spelled(token_id)
        return found

    def entry(self, token_id: int, logprob: float) -> bytes:
        """The token as an object of JSON that has no end yet: token, bytes, logprob."""
        head = self._entries.get(token_id)
        if head is None:
            told = _encode([*self.bytes_of(token_id)])
            head = b'{"token":%b,"bytes":%b,"logprob":' % (_encode(self.text(token_id)), told)
            self._entries[token_id] = head
        return head + _encode(number(logprob))

    def _spelled(self, token_id: int) -> str:
        data = self.bytes_of(token_id)
        if self._by_id or not data:
            return f"token_id:{token_id}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def number(logprob: float) -> float:
    """A log-probability as JSON can tell it."""
    return logprob if math.isfinite(logprob) else LOWEST


def tokens_of(logprobs: Iterable[TokenLogprobs]) -> Iterator[int]:
    """The tokens that these entries tell of."""
    for entry in logprobs:
        yield entry.token_id
        yield from entry.top_token_ids


def chat_entry(words: TokenWords, entry: TokenLogprobs) -> bytes:
    """A position as chat completions tell it, in JSON."""
    tops = zip(entry.top_token_ids, entry.top_logprobs, strict=True)
    told = b"},".join([words.entry(token_id, logprob) for token_id, logprob in tops])
    return b'%b,"top_logprobs":[%b]}' % (words.entry(entry.token_id, entry.logprob), told + b"}" if told else b"")


def legacy_top(words: TokenWords, entry: TokenLogprobs) -> dict[str, float]:
    """The most likely tokens of a position, by their texts, as completions tell them: the chosen one is among them.
    Of several tokens with one text the others are told by their ids."""
    told = {words.text(entry.token_id): number(entry.logprob)}
    for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True):
        if token_id != entry.token_id:
            text = words.text(token_id)
            told[f"token_id:{token_id}" if text in told else text] = number(logprob)
    return told


def prompt_entry(words: TokenWords, entry: TokenLogprobs) -> bytes:
    """A position of a prompt as clients of vLLM read it: by token id, ranks as far as they are known."""
    ranks = {token_id: rank for rank, token_id in enumerate(entry.top_token_ids, 1)}
    found = {entry.token_id: entry.logprob, **dict(zip(entry.top_token_ids, entry.top_logprobs, strict=True))}
    told = {
        str(token_id): {
            "logprob": number(logprob),
            "rank": ranks.get(token_id),
            "decoded_token": words.text(token_id),
        }
        for token_id, logprob in found.items()
    }
    return _encode(told)
