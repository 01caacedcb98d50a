"""Sampling in plain torch: the definition of correct. `ops/sampling.py` says what each operation promises.

Everything here that reaches a drawn token is exact arithmetic: integers, or IEEE-754 double operations that are
correctly rounded and that torch runs one by one (+, -, *, /, round; never a library's exp or log, whose last
bits change with device, vector width and position in the array, and never a fused multiply-add). Sums of
probabilities are sums of integers, equal in any order. So a row gives the same token on every device, and
whatever rows stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Word = Tensor | int

_WORD = 0xFFFFFFFF
# Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
_PHILOX_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

# A score this far below the peak has a mass that rounds to 0 and cannot win: Gumbel noise of a 32-bit word lies
# between -ln(33 ln 2) = -3.13 and 33 ln 2 = 22.9, and exp(-32) is 0.06 units of mass.
_WINDOW = 32.0
_MASS_BITS = 44  # 2^18 tokens of mass 2^44 still fit in 63 bits
_BINS_PER_UNIT = 128.0  # of score, in top-p's search for its threshold
_ARGMAX_CHUNK = 256
_CHUNK = 16384  # elements worked on at once: they stay in the second-level cache
_FEW = 1024  # candidates below which a call of philox of its own costs a row more than it computes
_LIKELY_WORD = (1 << 32) - (1 << 25)  # one word in 128 is larger, and with it most winners

_LN2 = math.log(2.0)  # correctly rounded: 0x3FE62E42FEFA39EF
_LOG2_E = 1.0 / _LN2
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD  # the double next to sqrt(1/2)
_EXP_TERMS = [1.0 / math.factorial(n) for n in range(9, -1, -1)]
_LOG_TERMS = [1.0 / n for n in (13, 11, 9, 7, 5, 3, 1)]


def philox4x32(counter: Sequence[Word], key: Sequence[Word]) -> tuple[Word, Word, Word, Word]:
    """The four words of each counter. A word is 32 unsigned bits in an int64 tensor, or in a plain int."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 64-bit products; wrapping keeps all their bits
        c0, c1, c2, c3 = (p1 >> 32) & _WORD ^ c1 ^ k0, p1 & _WORD, (p0 >> 32) & _WORD ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def random_words(token_ids: Tensor, seed: Word, sample: Word, position: Word) -> Tensor:
    """int64[N] words of `token_ids` int64[N]: word id % 4 of counter (id // 4, position, sample, 0).

    `seed` (64 bits), `sample` and `position` are ints, or int64[N]. One call of philox per token id.
    """
    return _lanes(token_ids >> 2, seed, sample, position).gather(1, (token_ids & 3)[:, None]).view(-1)


def row_of_words(token_ids: Tensor, seed: int, sample: int, position: int) -> Tensor:
    """Words of many ascending ids of one row: one call per four ids of the range they span, then pick."""
    first, last = int(token_ids[0]), int(token_ids[-1])
    counters = torch.arange(first >> 2, (last >> 2) + 1, device=token_ids.device)
    words = torch.cat([_lanes(part, seed, sample, position) for part in counters.split(_CHUNK)]).view(-1)
    origin = first & ~3
    if last - first + 1 == token_ids.numel():
        return words[first - origin : last - origin + 1]
    return words[token_ids - origin]


def _lanes(counters: Tensor, seed: Word, sample: Word, position: Word) -> Tensor:
    """int64[N,4]: the four words of each counter."""
    words = philox4x32((counters, position, sample, 0), (seed & _WORD, (seed >> 32) & _WORD))
    return torch.stack([torch.as_tensor(word) for word in words], dim=1)


def gumbel_noise(words: Tensor) -> Tensor:
    """float64[N]: -ln(-ln u) with u = (2 word + 1) / 2^33, which is exact in double and never 0 or 1."""
    uniform = (words * 2 + 1).double() * 2.0**-33
    return _log(_log(uniform).neg_()).neg_()


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal doubles, by exact steps alone: relative error below 1e-12.

    x = 2^e m with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh(s), s = (m - 1) / (m + 1), |s| < 0.172.
    """
    bits = x.view(torch.int64)
    exponent = (bits - _SQRT_HALF_BITS) >> 52
    mantissa = (bits - (exponent << 52)).view(torch.float64)
    s = (mantissa - 1.0).div_(mantissa + 1.0)
    z = s * s
    series = torch.full_like(z, _LOG_TERMS[0])
    for term in _LOG_TERMS[1:]:
        series.mul_(z).add_(term)
    return series.mul_(s).mul_(2.0).add_(exponent.double().mul_(_LN2))


def _masses(scores: Tensor, peak: Tensor) -> Tensor:
    """int64[N]: exp(score - peak) in units of 2^-44, by exact steps alone; the peak's own mass is 2^44."""
    x = (scores - peak).clamp_(min=-_WINDOW)
    exponent = (x * _LOG2_E).round_()
    r = x.sub_(exponent * _LN2)
    series = torch.full_like(r, _EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        series.mul_(r).add_(term)
    power = ((exponent.to(torch.int64) + (1023 + _MASS_BITS)) << 52).view(torch.float64)
    return series.mul_(power).round_().to(torch.int64)


# --- changes to logits, in place ---------------------------------------------------------------------------


def add_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor) -> None:
    """See `ops.sampling.add_bias`."""
    logits[rows, token_ids] += bias


def apply_penalties(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """See `ops.sampling.apply_penalties`."""
    values = logits[rows, token_ids]
    factor = repetition[rows]
    values = torch.where(values > 0, values / factor, values * factor)
    values = values - frequency[rows] * output_counts
    logits[rows, token_ids] = values - presence[rows] * (output_counts > 0)


def mask_tokens(logits: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """See `ops.sampling.mask_tokens`."""
    logits[rows, token_ids] = -math.inf


def mask_bits(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """See `ops.sampling.mask_bits`."""
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    held = (bits[:, :, None] >> places & 1).bool().flatten(1)[:, : logits.shape[1]]
    logits[rows] = logits[rows].masked_fill_(~held, -math.inf)


# --- choosing tokens ---------------------------------------------------------------------------------------


def peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.sampling.peaks`. Maxima of short chunks first: torch vectorises `amax`, but not `argmax`."""
    num_rows, vocab_size = logits.shape
    if vocab_size % _ARGMAX_CHUNK or vocab_size == _ARGMAX_CHUNK or num_rows == 0:
        values, token_ids = logits.max(dim=1)
        return values, token_ids
    chunks = logits.view(num_rows, -1, _ARGMAX_CHUNK)
    values, chunk = chunks.amax(dim=2).max(dim=1)
    inside = chunks[torch.arange(num_rows, device=logits.device), chunk].argmax(dim=1)
    return values, chunk * _ARGMAX_CHUNK + inside


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
    """See `ops.sampling.draw`. Filters go row by row, as what they leave is ragged; few are then drawn at once."""
    filters = zip(top_ks.tolist(), top_ps.tolist(), min_ps.tolist(), strict=True)
    chosen = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    few: list[tuple[int, Tensor, Tensor]] = []
    for row, (top_k, top_p, min_p) in enumerate(filters):
        scores = logits[row].double() / temperatures[row]  # by a tensor: torch multiplies by 1/scalar on GPUs
        token_ids, scores = _candidates(scores, top_k, top_p, min_p)
        if token_ids.numel() <= _FEW:
            few.append((row, token_ids, scores))
        else:
            words = row_of_words(token_ids, int(seeds[row]), int(samples[row]), int(positions[row]))
            chosen[row] = token_ids[_winner(scores, words)]
    if few:
        rows = torch.tensor([row for row, _, _ in few], device=logits.device)
        chosen[rows] = _draw_few(few, seeds[rows], samples[rows], positions[rows])
    return chosen


def _draw_few(few: list[tuple[int, Tensor, Tensor]], seeds: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
    """Draw one token of each (row, ids, scores): all noise in one elementwise pass, then an argmax of each."""
    counts = [token_ids.numel() for _, token_ids, _ in few]
    repeats = torch.tensor(counts, device=seeds.device)
    keys = [key.repeat_interleave(repeats) for key in (seeds, samples, positions)]
    noise = gumbel_noise(random_words(torch.cat([token_ids for _, token_ids, _ in few]), *keys))
    parts = zip(few, noise.split(counts), strict=True)
    return torch.stack([token_ids[torch.argmax(scores + part)] for (_, token_ids, scores), part in parts])


def _winner(scores: Tensor, words: Tensor) -> Tensor:
    """First index with the largest score + noise. Noise is computed only where it can win.

    Noise grows with the word, so the best among large words bounds the scores that a small word could still lift.
    """
    likely = words >= _LIKELY_WORD
    indices = torch.nonzero(likely).view(-1)
    if 0 < indices.numel() < words.numel():
        best = (scores[indices] + gumbel_noise(words[indices])).max()
        ceiling = gumbel_noise(torch.full_like(words[:1], _LIKELY_WORD))
        possible = likely.logical_or_(scores >= best - ceiling - 1e-6)  # the margin covers the sums' rounding
        indices = torch.nonzero(possible).view(-1)
        scores, words = scores[indices], words[indices]
        return indices[torch.argmax(scores + gumbel_noise(words))]
    return torch.argmax(scores + gumbel_noise(words))


def _candidates(scores: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """(ascending token ids, their scores) of all that can be drawn; a filter keeps what ties with its last."""
    peak = scores.max()
    token_ids = torch.arange(scores.numel(), device=scores.device)
    in_window = scores >= peak - _WINDOW
    if int(in_window.sum()) * 4 < scores.numel():  # else it costs less to carry the hopeless along
        token_ids, scores = token_ids[in_window], scores[in_window]
    if 0 < top_k < scores.numel():
        kept = scores >= torch.topk(scores, top_k).values[-1]
        token_ids, scores = token_ids[kept], scores[kept]
    if top_p < 1.0:
        kept = scores >= _top_p_threshold(scores, peak, top_p)
        token_ids, scores = token_ids[kept], scores[kept]
    if min_p > 0.0:
        least = math.ceil(min_p * 2.0**_MASS_BITS)
        kept = scores >= peak + (
            math.log((least - 0.5) * 2.0**-_MASS_BITS) - 1e-6
        )  # below, no mass rounds to least
        token_ids, scores = token_ids[kept], scores[kept]
        kept = _masses(scores, peak) >= least
        token_ids, scores = token_ids[kept], scores[kept]
    return token_ids, scores


def _top_p_threshold(scores: Tensor, peak: Tensor, top_p: float) -> Tensor:
    """The score at which the mass of the scores, from the largest down, first reaches `top_p` of the whole.

    Masses are summed in bins of the score first, so that only the bin in which the sum crosses must be sorted.
    """
    masses = torch.cat([_masses(part, peak) for part in scores.split(_CHUNK)])
    wanted = math.ceil(top_p * int(masses.sum()))
    bins = ((peak - scores) * _BINS_PER_UNIT).clamp_(max=_WINDOW * _BINS_PER_UNIT).to(torch.int64)
    bin_masses = torch.zeros(int(_WINDOW * _BINS_PER_UNIT) + 1, dtype=torch.int64, device=scores.device)
    reached = bin_masses.index_add_(0, bins, masses).cumsum(0)
    crossing = int((reached >= wanted).to(torch.int8).argmax())
    below = int(reached[crossing - 1]) if crossing else 0
    inside = bins == crossing
    values, order = torch.sort(scores[inside], descending=True)
    enough = masses[inside][order].cumsum(0) >= wanted - below
    return values[enough.to(torch.int8).argmax()]


def log_probabilities(logits: Tensor) -> Tensor:
    """See `ops.sampling.log_probabilities`."""
    return torch.log_softmax(logits, dim=1)


def top_tokens(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """See `ops.sampling.top_tokens`. `topk` alone leaves the order of ties open."""
    ids = torch.empty((scores.shape[0], count), dtype=torch.int64, device=scores.device)
    values = torch.empty((scores.shape[0], count), dtype=scores.dtype, device=scores.device)
    if count == 0:
        return values, ids
    lowest = torch.topk(scores, count, dim=1).values[:, -1]
    for row in range(scores.shape[0]):
        token_ids = torch.nonzero(~(scores[row] < lowest[row])).view(-1)  # also of NaN, which mean nothing
        order = torch.sort(scores[row, token_ids], descending=True, stable=True).indices[:count]
        ids[row] = token_ids[order]
        values[row] = scores[row, ids[row]]
    return values, ids
