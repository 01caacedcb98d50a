"""Sampling in C++ gives the reference's very tokens: random rows, filters and keys, and the hostile ones."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cpu import native
from cierzo.kernels.ops import sampling as ops
from cierzo.kernels.ref import sampling as ref
from cierzo.kernels.registry import bind

TEMPERATURES = [1.0, 0.7, 0.01, 1e-5, 2.0, 0.123456, 1e30]
TOP_KS = [0, 0, 1, 2, 20, 999]
TOP_PS = [1.0, 1.0, 0.9, 0.5, 1e-9, 0.999999, 1 - 2**-53, 0.3]
MIN_PS = [0.0, 0.0, 0.05, 1.0, 1e-12, 1e-13, 0.3]


@pytest.fixture(autouse=True)
def _bound() -> None:
    bind(KernelsConfig(), "cpu")


def random_logits(draw: random.Random, rows: int, vocab: int) -> Tensor:
    """Flat, peaked, tied, rounded, and with most tokens masked."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    logits = torch.randn(rows, vocab, generator=generator) * draw.choice([0.0, 0.01, 0.5, 3.0, 30.0, 1e4])
    if draw.random() < 0.3:
        logits = (logits * 4).round() / 4
    if draw.random() < 0.3:
        logits[:, torch.randint(0, vocab, (2 * vocab,), generator=generator)] = -math.inf
        logits[:, draw.randrange(vocab)] = 1.0
    return logits


def random_parameters(draw: random.Random, rows: int) -> list[Tensor]:
    reals = [[draw.choice(options) for _ in range(rows)] for options in (TEMPERATURES, TOP_PS, MIN_PS)]
    temperatures, top_ps, min_ps = (torch.tensor(values, dtype=torch.float64) for values in reals)
    top_ks = torch.tensor([draw.choice(TOP_KS) for _ in range(rows)])
    seeds = torch.tensor([draw.randrange(-(2**63), 2**63) for _ in range(rows)])
    samples, positions = (torch.tensor([draw.randrange(2**32) for _ in range(rows)]) for _ in range(2))
    return [temperatures, top_ks, top_ps, min_ps, seeds, samples, positions]


def test_drawn_tokens_are_the_references(instruction_set: str) -> None:
    draw = random.Random(4)
    native.set_threads(2)
    for case in range(60):
        vocab = draw.choice([1, 2, 7, 16, 17, 300, 1024, 1029, 5000])
        logits, parameters = random_logits(draw, 4, vocab), random_parameters(draw, 4)
        expected = ref.draw(logits, *parameters)
        assert torch.equal(ops.draw(logits, *parameters), expected), (case, vocab, parameters)
        row = draw.randrange(4)
        alone = ops.draw(logits[row : row + 1], *(values[row : row + 1] for values in parameters))
        assert torch.equal(alone[0], expected[row])


def test_a_large_vocabulary_on_two_threads(instruction_set: str) -> None:
    native.set_threads(2)
    logits = torch.randn(3, 70_001, generator=torch.Generator().manual_seed(1))[:, 1:]
    parameters = random_parameters(random.Random(0), 3)
    for values, wanted in zip(parameters[:4], (1.0, 0, 1.0, 0.0), strict=True):
        values.fill_(wanted)
    for settings in ({}, {1: 50}, {2: 0.9}, {1: 40_000, 2: 0.99, 3: 1e-3}):
        changed = [
            values.clone().fill_(settings[i]) if i in settings else values for i, values in enumerate(parameters)
        ]
        assert torch.equal(ops.draw(logits, *changed), ref.draw(logits.contiguous(), *changed))


def test_top_p_counts_what_top_k_left(instruction_set: str) -> None:
    """Flat rows of which top-k keeps more than half: half of that mass is far less than half of the row's."""
    logits = torch.randn(64, 400, generator=torch.Generator().manual_seed(6)) * 0.1
    parameters = random_parameters(random.Random(2), 64)
    for values, wanted in zip(parameters[:4], (1.0, 250, 0.5, 0.0), strict=True):
        values.fill_(wanted)
    assert torch.equal(ops.draw(logits, *parameters), ref.draw(logits, *parameters))


def test_largest_tokens_and_peaks_are_the_references(instruction_set: str) -> None:
    draw = random.Random(5)
    native.set_threads(2)
    for _ in range(40):
        vocab = draw.choice([1, 15, 16, 33, 700, 66_000])
        logits = random_logits(draw, 3, vocab)
        for count in {0, 1, min(vocab, 20), vocab if vocab < 1000 else 300}:
            values, ids = ops.top_tokens(logits, count)
            want_values, want_ids = ref.top_tokens(logits, count)
            assert torch.equal(ids, want_ids)
            assert torch.equal(values, want_values)
        assert all(torch.equal(a, b) for a, b in zip(ops.peaks(logits), ref.peaks(logits), strict=True))


def test_rows_that_are_not_finite_are_survived(instruction_set: str) -> None:
    """Their tokens mean nothing, but are tokens; and the other rows do not notice."""
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(2))
    parameters = random_parameters(random.Random(1), 5)
    expected, best = ref.draw(logits, *parameters), ref.top_tokens(logits, 7)[1]
    poisoned = logits.clone()
    poisoned[0], poisoned[2], poisoned[3, 5] = math.nan, -math.inf, math.nan
    tokens, (_, top) = ops.draw(poisoned, *parameters), ops.top_tokens(poisoned, 7)
    assert ((tokens >= 0) & (tokens < 100)).all()
    assert all(len(set(row)) == 7 and min(row) >= 0 and max(row) < 100 for row in top.tolist())
    assert torch.equal(tokens[[1, 4]], expected[[1, 4]])
    assert torch.equal(top[[1, 4]], best[[1, 4]])
    assert torch.isfinite(ops.peaks(poisoned)[0]).tolist() == [False, True, False, False, True]
    assert ops.log_probabilities(poisoned)[[1, 4]].isfinite().all()


def test_log_probabilities_are_rounded_once(instruction_set: str) -> None:
    for vocab in (1, 3, 64, 1000, 33_333):
        logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab)) * 4
        native.set_threads(2)
        together = ops.log_probabilities(logits)
        exact = torch.log_softmax(logits.double(), dim=1)
        # half a unit in the last place, and what the sum of fp32 powers is off by
        assert ((together.double() - exact).abs() <= exact.abs() * 2.0**-24 + 3e-7).all()
        native.set_threads(1)
        for row in (0, 8):
            assert torch.equal(ops.log_probabilities(logits[row : row + 1])[0], together[row])


def test_penalties_are_the_references(instruction_set: str) -> None:
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(160, 1003, generator=generator)
    rows = torch.arange(160).repeat_interleave(900)
    ids = torch.cat([torch.randperm(1000, generator=generator)[:900] for _ in range(160)])
    counts = torch.randint(0, 4, (len(ids),), generator=generator)
    penalties = torch.rand(3, 160, generator=generator) + 0.5
    native.set_threads(2)
    got, expected = wide.clone(), wide.clone()
    ops.apply_penalties(got[:, 2:1002], rows, ids, counts, *penalties)
    ref.apply_penalties(expected[:, 2:1002], rows, ids, counts, *penalties)
    assert torch.equal(got, expected)


def test_an_entry_outside_the_logits_is_refused(instruction_set: str) -> None:
    logits, halves = torch.ones(2, 8), torch.full((2,), 0.5)
    for row, token in ((2, 0), (0, 8), (-1, 0), (0, -1)):
        rows, ids = torch.tensor([1, row]), torch.tensor([3, token])
        with pytest.raises(ArgumentError, match="apply_penalties: 1 entries lie outside"):
            ops.apply_penalties(logits, rows, ids, torch.ones_like(ids), halves, halves, halves)
    assert torch.equal(logits[0], torch.ones(8))
    for row in (2, -1):
        with pytest.raises(ArgumentError, match="mask_bits: 1 rows lie outside"):
            ops.mask_bits(logits, torch.tensor([row]), torch.zeros(1, 1, dtype=torch.int32))
    assert torch.equal(logits[0], torch.ones(8))
