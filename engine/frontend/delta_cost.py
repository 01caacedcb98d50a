"""Costs of deltas in flow control, by a formula that both sides compute alike; docs/rpc.md has it in words."""

from __future__ import annotations

from cierzo.engine.messages import Delta, Part, TokenLogprobs


def delta_cost(delta: Delta) -> int:
    """Bytes that `delta` counts for: about what it takes of a heap."""
    text = delta.text  # as `text_cost`, of every token: no call
    cost = 64 + 8 * len(delta.token_ids) + (len(text) if text.isascii() else len(text.encode()))
    if delta.parts:
        cost += parts_cost(delta.parts)
    if delta.prompt_logprobs:
        cost += logprobs_cost(delta.prompt_logprobs)
    return cost if delta.logprobs is None else cost + logprobs_cost(delta.logprobs)


def text_cost(num_tokens: int, text: str) -> int:
    """The part of a delta's cost that it has without log-probabilities."""
    return 64 + 8 * num_tokens + (len(text) if text.isascii() else len(text.encode()))


def entry_cost(num_top: int) -> int:
    """The cost of an entry of log-probabilities with so many top tokens."""
    return 32 + 16 * num_top


def logprobs_cost(logprobs: list[TokenLogprobs]) -> int:
    """The part of a delta's cost that its log-probabilities are."""
    return 32 * len(logprobs) + 16 * sum([len(entry.top_token_ids) for entry in logprobs])


def parts_cost(parts: list[Part]) -> int:
    """The part of a delta's cost that its parts are."""
    return sum([64 + _utf8_bytes(part.text) + _utf8_bytes(part.name) + _utf8_bytes(part.id) for part in parts])


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
