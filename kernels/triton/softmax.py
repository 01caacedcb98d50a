"""The online softmax of attention: scores to base 2, a tile of tokens at a time.

A row of queries carries three values from tile to tile: its largest score so far, the sum of its weights
2^(score - largest), and the values acc weighted by them. At the end, acc / total is the row's result.
"""

from __future__ import annotations

import triton.language as tl

from cierzo.kernels.triton.launch import kernel

LOG2_E = 1.4426950408889634  # goes into the factor of the scores, so that exp2 takes the place of exp
_LOG2_E = tl.constexpr(LOG2_E)


@kernel
def masked(scores, positions, sees, WINDOW: tl.constexpr):
    """scores [ROWS,TOKENS] with -inf where a row does not see the token at `positions` [TOKENS].

    A row sees the positions before `sees` [ROWS]; with a WINDOW, the last so many of them. WINDOW 0 is none.
    """
    scores = tl.where(positions[None, :] < sees[:, None], scores, float("-inf"))
    if WINDOW > 0:
        scores = tl.where(positions[None, :] < sees[:, None] - WINDOW, float("-inf"), scores)
    return scores


@kernel
def softmax_step(
    scores, factor, values, acc, largest, total, MAY_BE_EMPTY: tl.constexpr, LIFT: tl.constexpr = 0
):  # fmt: skip
    """Add one tile of tokens: returns the new acc, largest, total.

    scores fp32 [ROWS,TOKENS], which a positive factor takes to base 2; values [TOKENS,W] in the dtype of the
    product; acc fp32 [ROWS,W]; largest and total fp32 [ROWS]. MAY_BE_EMPTY: a row may have seen no token yet, after
    this tile either. LIFT: the weights are 2^LIFT times what they are elsewhere.
    """
    peak = tl.maximum(largest, tl.max(scores, 1) * factor)
    base = peak
    if MAY_BE_EMPTY:
        base = tl.where(peak == float("-inf"), 0.0, peak)  # -inf minus -inf would be NaN
    weights = tl.exp2(tl.fma(scores, factor, -(base - LIFT)[:, None]))
    fade = tl.exp2(largest - base)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
    return acc, peak, total


@kernel
def sink_of(sinks_ptr, head):
    """The sink of a query head, a logit, to base 2 like the scores."""
    return tl.load(sinks_ptr + head) * _LOG2_E
