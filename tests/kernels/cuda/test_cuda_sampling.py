"""Sampling in CUDA C++, on the CPU: the reference's very tokens; random rows, filters and keys, and the hostile."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from cierzo.engine import device_memory
from cierzo.kernels.check import ArgumentError
from cierzo.kernels.cuda.launch import sampling as launcher
from cierzo.kernels.ops import sampling as ops
from cierzo.kernels.ref import sampling as ref

TEMPERATURES = [1.0, 0.7, 0.01, 1e-5, 2.0, 0.123456, 1e30]
TOP_KS = [0, 0, 1, 2, 20, 999]
TOP_PS = [1.0, 1.0, 0.9, 0.5, 1e-9, 0.999999, 1 - 2**-53, 0.3]
MIN_PS = [0.0, 0.0, 0.05, 1.0, 1e-12, 1e-13, 0.3]

pytestmark = pytest.mark.usefixtures("backend")


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
    top_ks = torch.tensor([draw.choice(TOP_KS) for _ in range(rows)], dtype=torch.int64)
    seeds = torch.tensor([draw.randrange(-(2**63), 2**63) for _ in range(rows)], dtype=torch.int64)
    samples, positions = (
        torch.tensor([draw.randrange(2**32) for _ in range(rows)], dtype=torch.int64) for _ in range(2)
    )
    return [temperatures, top_ks, top_ps, min_ps, seeds, samples, positions]


def parameters_of(rows: int, **settings: float) -> list[Tensor]:
    """Random keys; temperature 1 and no filter unless told otherwise."""
    parameters = random_parameters(random.Random(2), rows)
    wanted = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    for values, value in zip(parameters, wanted.values(), strict=False):
        values.fill_(value)
    return parameters


def test_drawn_tokens_are_the_references(backend) -> None:
    draw = random.Random(4 + backend.seed)
    for case in range(40):
        vocab = draw.choice([1, 2, 7, 16, 17, 300, 1024, 1029])
        logits, parameters = random_logits(draw, 4, vocab), random_parameters(draw, 4)
        before, expected = logits.clone(), ref.draw(logits, *parameters)
        assert torch.equal(ops.draw(logits, *parameters), expected), (case, vocab, parameters)
        assert torch.equal(logits, before)
        row = draw.randrange(4)
        alone = ops.draw(logits[row : row + 1], *(values[row : row + 1] for values in parameters))
        assert torch.equal(alone[0], expected[row])


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 4000, "top_p": 0.99, "min_p": 1e-3}, {"temperature": 1e30}],
)
def test_a_large_vocabulary(settings: dict[str, float]) -> None:
    logits = torch.randn(2, 9001, generator=torch.Generator().manual_seed(1))[:, 1:]
    parameters = parameters_of(2, **settings)
    assert torch.equal(ops.draw(logits, *parameters), ref.draw(logits.contiguous(), *parameters))


def test_the_whole_vocabulary_of_a_model(backend) -> None:
    if backend.seed:
        pytest.skip("once is enough")
    logits = torch.randn(1, 131_072, generator=torch.Generator().manual_seed(3)) * 2
    parameters = parameters_of(1, temperature=0.8, top_p=0.95)
    assert torch.equal(ops.draw(logits, *parameters), ref.draw(logits, *parameters))
    assert all(
        torch.equal(a, b) for a, b in zip(ops.top_tokens(logits, 20), ref.top_tokens(logits, 20), strict=True)
    )


def test_the_number_of_blocks_changes_no_token(backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 256 to 4096 values; cuts that fall in one bin, in two, and between pieces."""
    draw = random.Random(9 + backend.seed)
    for case in range(6):
        vocab = draw.choice([1029, 2048, 4500])
        logits, parameters = random_logits(draw, 2, vocab), random_parameters(draw, 2)
        expected = ref.draw(logits, *parameters)
        for threads, few in ((32, 1 << 20), (128, 0), (512, 0)):
            monkeypatch.setattr(launcher, "_DRAW_THREADS", threads if not few else 4 * threads)
            monkeypatch.setattr(launcher, "_FEW_VALUES", few)
            monkeypatch.setattr(launcher, "_CUT_THREADS", draw.choice([32, 96, 512]))
            assert torch.equal(ops.draw(logits, *parameters), expected), (case, threads, parameters)


@pytest.mark.parametrize(
    "settings",
    [{"top_p": 0.5}, {"top_k": 4500}, {"top_k": 4500, "top_p": 0.9}, {"top_k": 20, "top_p": 0.9}, {"top_k": 5001}],
)
@pytest.mark.parametrize("spread", [0.0, 1e-4, 1e4])
def test_more_tokens_in_a_bin_than_the_list_has(settings: dict[str, float], spread: float, backend) -> None:
    """Ties, a row of which one token stands far above the others, and one with most of them out of reach."""
    if backend.seed > 1:
        pytest.skip("twice is enough")
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(8)) * spread
    logits[0, 77] += 12.0
    for temperature in (1.0, 1e30):
        parameters = parameters_of(1, temperature=temperature, **settings)
        assert torch.equal(ops.draw(logits, *parameters), ref.draw(logits, *parameters))


def test_tokens_win_by_their_score_and_by_their_noise() -> None:
    """A few tokens with a likely score, whose random words are small as a rule, among many that are six below."""
    logits = torch.zeros(1, 5000)
    logits[0, 100::125] = 6.0
    found = []
    for seed in range(12):
        parameters = parameters_of(1)
        parameters[4].fill_(seed)
        found.append(ops.draw(logits, *parameters))
        assert torch.equal(found[-1], ref.draw(logits, *parameters)), seed
    assert {float(logits[0, token]) for token in found} == {0.0, 6.0}


def test_a_large_mass_is_summed_whole() -> None:
    """All tokens of a piece have the largest mass there is, and fall in one bin."""
    logits = torch.zeros(1, 4096)
    for top_p in (0.25, 1 - 2**-53):
        parameters = parameters_of(1, top_p=top_p)
        assert torch.equal(ops.draw(logits, *parameters), ref.draw(logits, *parameters))


def test_a_draw_takes_the_memory_that_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    empty = torch.empty

    def noted(*arguments: Any, **options: Any) -> Tensor:
        made.append((found := empty(*arguments, **options)).nbytes)
        return found

    monkeypatch.setattr(torch, "empty", noted)
    for vocab, rows in ((300, 2), (5000, 3)):
        made.clear()
        ops.draw(torch.zeros(rows, vocab), *parameters_of(rows))
        assert sum(made) <= device_memory.drawn_bytes(rows, vocab)


def test_top_p_counts_what_top_k_left() -> None:
    """Flat rows of which top-k keeps more than half: half of that mass is far less than half of the row's."""
    logits = torch.randn(24, 400, generator=torch.Generator().manual_seed(6)) * 0.1
    parameters = parameters_of(24, top_k=250, top_p=0.5)
    assert torch.equal(ops.draw(logits, *parameters), ref.draw(logits, *parameters))


def test_frequencies_match_the_softmax() -> None:
    row = torch.tensor([2.0, 1.5, 1.5, 0.0, -1.0, -9.0, 1.0])
    parameters = parameters_of(3000)
    parameters[4] = torch.arange(3000)
    seen = torch.bincount(ops.draw(row.expand(3000, -1), *parameters), minlength=7).double()
    expected = row.double().softmax(0) * 3000
    assert (((seen - expected) ** 2 / expected)[expected > 3]).sum() < 22.5  # 6 degrees of freedom, p = 0.001


def test_largest_tokens_and_peaks_are_the_references(backend) -> None:
    draw = random.Random(5 + backend.seed)
    for _ in range(16):
        vocab = draw.choice([1, 15, 16, 33, 700, 5000])
        logits = random_logits(draw, 3, vocab)
        for count in {0, 1, min(vocab, 20), vocab if vocab < 1000 else 300}:
            values, ids = ops.top_tokens(logits, count)
            want_values, want_ids = ref.top_tokens(logits, count)
            assert torch.equal(ids, want_ids)
            assert torch.equal(values, want_values)
        assert all(torch.equal(a, b) for a, b in zip(ops.peaks(logits), ref.peaks(logits), strict=True))
    logits = random_logits(draw, 2, 3000)
    found = ops.top_tokens(logits, launcher.MOST_TOP), ops.top_tokens(logits, 2999)  # the last one by torch
    for values, ids in found:
        assert torch.equal(ids, ref.top_tokens(logits, ids.shape[1])[1])
        assert torch.equal(values, logits.gather(1, ids))


def test_zeros_of_both_signs_tie() -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0, -2.0]])
    assert ops.peaks(logits)[1].tolist() == [1]
    assert ops.top_tokens(logits, 3)[1].tolist() == [[1, 2, 3]]
    for seed in range(20):
        parameters = parameters_of(1, top_k=1)
        parameters[4].fill_(seed)
        assert torch.equal(ops.draw(logits, *parameters), ref.draw(logits, *parameters))


def test_rows_that_are_not_finite_are_survived() -> None:
    """Their tokens mean nothing, but are tokens; and the other rows do not notice."""
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(2))
    parameters = random_parameters(random.Random(1), 6)
    expected, best = ref.draw(logits, *parameters), ref.top_tokens(logits, 7)[1]
    poisoned = logits.clone()
    poisoned[0], poisoned[2], poisoned[3, 5], poisoned[5, 9] = math.nan, -math.inf, math.nan, math.inf
    for filters in (parameters, parameters_of(6, top_k=9, top_p=0.7, min_p=0.1), parameters_of(6, top_p=0.5)):
        tokens = ops.draw(poisoned, *filters)
        assert ((tokens >= 0) & (tokens < 100)).all()
    tokens, (_, top) = ops.draw(poisoned, *parameters), ops.top_tokens(poisoned, 7)
    assert all(len(set(row)) == 7 and min(row) >= 0 and max(row) < 100 for row in top.tolist())
    assert torch.equal(tokens[[1, 4]], expected[[1, 4]])
    assert torch.equal(top[[1, 4]], best[[1, 4]])
    assert torch.isfinite(ops.peaks(poisoned)[0]).tolist() == [False, True, False, False, True, False]
    found = ops.log_probabilities(poisoned)
    assert found[[1, 4]].isfinite().all()
    assert found[[0, 2, 3, 5]].isnan().all()


def test_log_probabilities_are_rounded_once() -> None:
    for vocab in (1, 3, 64, 1000, 7001):
        logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab)) * 4
        logits[1, 0] = -math.inf if vocab > 1 else 0.0
        together = ops.log_probabilities(logits)
        exact = torch.log_softmax(logits.double(), dim=1)
        finite = exact.isfinite()
        assert torch.equal(together[~finite].double(), exact[~finite])
        off = (together.double() - exact)[finite].abs()
        assert (off <= exact[finite].abs() * 2.0**-24 + 1e-9).all()  # half a unit in the last place
        for row in (0, 4):
            assert torch.equal(ops.log_probabilities(logits[row : row + 1])[0], together[row])


def test_edits_are_the_references() -> None:
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(30, 1003, generator=generator)
    rows = torch.arange(30).repeat_interleave(90)
    ids = torch.cat([torch.randperm(1000, generator=generator)[:90] for _ in range(30)])
    counts = torch.randint(0, 4, (len(ids),), generator=generator)
    bias, penalties = torch.randn(len(ids), generator=generator), torch.rand(3, 30, generator=generator) + 0.5
    for module in (ops, ref):
        edited = wide.clone()
        module.add_bias(edited[:, 2:1002], rows, ids, bias)
        module.apply_penalties(edited[:, 2:1002], rows, ids, counts, *penalties)
        module.mask_tokens(edited[:, 2:1002], rows[::7], ids[::7])
        if module is ops:
            got = edited
    assert torch.equal(got, edited)
    columns = wide.t().contiguous().t()
    ops.add_bias(columns[:, 2:1002], rows, ids, bias)
    ref.add_bias(wide[:, 2:1002], rows, ids, bias)
    assert torch.equal(columns, wide)


def test_bit_sets_are_the_references() -> None:
    generator = torch.Generator().manual_seed(4)
    for vocab in (1, 31, 32, 33, 5000):
        wide = torch.randn(5, vocab + 3, generator=generator)
        bits = torch.randint(-(2**31), 2**31, (3, -(-vocab // 32)), generator=generator).to(torch.int32)
        rows, expected = torch.tensor([4, 0, 2]), wide.clone()
        ops.mask_bits(wide[:, 2 : vocab + 2], rows, bits)
        ref.mask_bits(expected[:, 2 : vocab + 2], rows, bits)
        assert torch.equal(wide, expected)
    ops.mask_bits(wide[1:3, 2 : vocab + 2], torch.tensor([-1, 2, 2**40]), torch.zeros_like(bits))
    assert torch.equal(wide, expected)


def test_entries_outside_the_logits_change_nothing() -> None:
    wide = torch.ones(4, 12)
    rows, ids = torch.tensor([2, 0, -1, 0, 2**40]), torch.tensor([0, 8, 0, -1, 3])
    logits, halves = wide[1:3, 2:10], torch.full((2,), 0.5)
    ops.mask_tokens(logits, rows, ids)
    ops.add_bias(logits, rows, ids, torch.ones(5))
    ops.apply_penalties(logits, rows, ids, torch.ones_like(ids), halves, halves, halves)
    assert torch.equal(wide, torch.ones(4, 12))


def test_no_rows_and_no_entries() -> None:
    logits, none = torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64)
    assert ops.peaks(logits)[1].shape == (0,)
    assert ops.draw(logits, *parameters_of(0)).shape == (0,)
    assert ops.log_probabilities(logits).shape == (0, 16)
    assert ops.top_tokens(logits, 3)[0].shape == (0, 3)
    ops.mask_tokens(torch.zeros(2, 16), none, none)
    with pytest.raises(ArgumentError, match=r"peaks: logits have N = 262145, must be 1 \.\. 262144"):
        ops.peaks(torch.zeros(1, (1 << 18) + 1))
