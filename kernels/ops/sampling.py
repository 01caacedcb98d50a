"""Sampling, from logits to tokens.

Letters: M rows (one per sequence that samples), N vocabulary size, J sparse entries.

Order of operations on one row, each skipped where its parameter is off:

 1. log-probabilities are taken from the raw logits (`log_probabilities`), before anything else;
 2. logit bias is added (`add_bias`);
 3. penalties (`apply_penalties`): repetition, then frequency, then presence;
 4. what may not be chosen is masked: by a set of what may (`mask_bits`), as a grammar gives it, or token by token
    (`mask_tokens`), such as tokens that would stop before `min_tokens` are out;
 5. temperature 0: the largest logit, ties to the lower id (`peaks`). Otherwise `draw`: divide by the temperature,
    top-k, top-p among what top-k left, min-p, Gumbel noise, the largest sum, ties to the lower id.

No operation lets one row's values reach another row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels import check
from cierzo.kernels.registry import bound


def add_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor) -> None:
    """logits[rows, token_ids] += bias, in place.

    logits fp32 [M,N]; rows, token_ids int64 [J], pairs must be distinct; bias fp32 [J]. J may be 0.
    """
    check.sizes("add_bias", logits=(logits, "M N"), rows=(rows, "J"), token_ids=(token_ids, "J"), bias=(bias, "J"))
    check.dtype("add_bias", torch.float32, logits=logits, bias=bias)
    bound.add_bias(logits, rows, token_ids, bias)


def apply_penalties(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Lower the logits of tokens that a row has already seen, in place.

    logits fp32 [M,N]. Entry j says that row rows[j] has seen token_ids[j], output_counts[j] times in its output
    (0: in its prompt alone); pairs must be distinct; all int64 [J]. The penalties are fp32 [M], one per row.
    A seen logit x becomes (x > 0 ? x / repetition : x * repetition), less frequency * count, less presence if
    count > 0. Source: Keskar et al. 2019, arXiv 1909.05858, section 4.1; frequency and presence as in OpenAI's API.
    """
    check.sizes(
        "apply_penalties",
        logits=(logits, "M N"),
        rows=(rows, "J"),
        token_ids=(token_ids, "J"),
        output_counts=(output_counts, "J"),
        repetition=(repetition, "M"),
        presence=(presence, "M"),
        frequency=(frequency, "M"),
    )
    penalties = {"repetition": repetition, "presence": presence, "frequency": frequency}
    check.dtype("apply_penalties", torch.float32, logits=logits, **penalties)
    bound.apply_penalties(logits, rows, token_ids, output_counts, repetition, presence, frequency)


def mask_tokens(logits: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """logits[rows, token_ids] = -inf, in place. logits fp32 [M,N]; rows, token_ids int64 [J]."""
    check.sizes("mask_tokens", logits=(logits, "M N"), rows=(rows, "J"), token_ids=(token_ids, "J"))
    check.dtype("mask_tokens", torch.float32, logits=logits)
    bound.mask_tokens(logits, rows, token_ids)


def mask_bits(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """logits[rows[g], id] = -inf where bit id of set g is 0, in place.

    logits fp32 [M,N]; rows int64 [G]; bits int32 [G, ceil(N/32)]: token id has bit id % 32, from the lowest, of
    word id // 32. Bits behind the last token mean nothing. G may be 0.
    """
    named = check.sizes("mask_bits", logits=(logits, "M N"), rows=(rows, "G"), bits=(bits, "G W"))
    check.dtype("mask_bits", torch.float32, logits=logits)
    check.dtype("mask_bits", torch.int32, bits=bits)
    check.dtype("mask_bits", torch.int64, rows=rows)
    words = -(-named["N"] // 32)
    check.require("mask_bits", named["W"] == words, f"sets have {named['W']} words, N = {named['N']} needs {words}")
    bound.mask_bits(logits, rows, bits)


def peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit of each row and its token id, ties to the lower id -> (fp32 [M], int64 [M]).

    logits fp32 [M,N], contiguous. A row with a NaN gives NaN as its value, so a value that is not finite says
    that the row cannot be used; its id then means nothing. M may be 0.
    """
    check.sizes("peaks", logits=(logits, "M N"))
    check.dtype("peaks", torch.float32, logits=logits)
    return bound.peaks(logits)


def draw(
    logits: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    seeds: Tensor,
    samples: Tensor,
    positions: Tensor,
) -> Tensor:
    """Draw one token id per row from softmax(logits / temperature), filtered -> int64 [M].

    logits fp32 [M,N], no NaN, no +inf, -inf allowed but not throughout. temperatures fp64 [M] > 0; top_ks int64
    [M], 0 off; top_ps fp64 [M] in (0, 1], 1 off; min_ps fp64 [M] in [0, 1], 0 off; seeds (64 bits), samples and
    positions (32 bits each) int64 [M]: sample index and position of the token that is drawn.

    top-k keeps the k largest; top-p the smallest set of the largest whose mass reaches p; min-p what has at least
    p times the largest probability. Tokens that tie with the last one kept are kept. Then the Gumbel-max trick
    (Gumbel 1954): argmax of score + g, where g = -ln(-ln u), u = (2 w + 1) / 2^33, and w is word id % 4 of
    philox4x32-10 with key (seed's low word, high word) and counter (id // 4, position, sample, 0) (Salmon et al.,
    SC 2011). Scores and noise are double.
    """
    check.sizes(
        "draw",
        logits=(logits, "M N"),
        temperatures=(temperatures, "M"),
        top_ks=(top_ks, "M"),
        top_ps=(top_ps, "M"),
        min_ps=(min_ps, "M"),
        seeds=(seeds, "M"),
        samples=(samples, "M"),
        positions=(positions, "M"),
    )
    check.dtype("draw", torch.float32, logits=logits)
    check.dtype("draw", torch.float64, temperatures=temperatures, top_ps=top_ps, min_ps=min_ps)
    check.dtype("draw", torch.int64, top_ks=top_ks, seeds=seeds, samples=samples, positions=positions)
    return bound.draw(logits, temperatures, top_ks, top_ps, min_ps, seeds, samples, positions)


def log_probabilities(logits: Tensor) -> Tensor:
    """log_softmax of each row -> new fp32 [M,N]. logits fp32 [M,N]."""
    check.sizes("log_probabilities", logits=(logits, "M N"))
    check.dtype("log_probabilities", torch.float32, logits=logits)
    return bound.log_probabilities(logits)


def top_tokens(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, largest first, ties to the lower id.

    -> (values fp32 [M,count], token ids int64 [M,count]). scores fp32 [M,N]; 0 <= count <= N.
    """
    named = check.sizes("top_tokens", scores=(scores, "M N"))
    check.require("top_tokens", 0 <= count <= named["N"], f"count {count} must lie in 0 .. N = {named['N']}")
    return bound.top_tokens(scores, count)
