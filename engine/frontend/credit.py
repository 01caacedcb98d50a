"""The cost of a delta: what a reader's credit is counted in, on both sides of the wire."""

from __future__ import annotations

from cierzo.engine.messages import Delta

# About the heap that a delta takes with its reader. The numbers are part of the protocol: docs/rpc.md has them.
DELTA_COST, TOKEN_COST, LOGPROBS_COST, ALTERNATIVE_COST = 64, 8, 32, 16


def delta_cost(delta: Delta) -> int:
    """64, and 8 for a token, 1 for a byte of text as UTF-8, 32 for an entry of `logprobs` and 16 for each of its
    alternatives."""
    text = delta.text
    cost = DELTA_COST + TOKEN_COST * len(delta.token_ids) + (len(text) if text.isascii() else len(text.encode()))
    if delta.logprobs:
        for entry in delta.logprobs:
            cost += LOGPROBS_COST + ALTERNATIVE_COST * len(entry.top_token_ids)
    return cost
