"""Sampling: against published vectors, brute force, and the exact distribution; and rows never meet."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cierzo.kernels import registry
from cierzo.kernels.check import ArgumentError
from cierzo.kernels.cpu import native
from cierzo.kernels.ops import sampling as ops
from cierzo.kernels.ref import sampling as ref

F = 0xFFFFFFFF
PI_COUNTER = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


IMPLEMENTATIONS = ["torch", *(f"native-{name}" for name in native.available())]


def use(name: str) -> None:
    """Bind this file's operations, and nothing else: other targets need not be importable here."""
    kind, _, instruction_set = name.partition("-")
    if kind == "native":
        native.select(instruction_set)
    chosen = [row for row in registry.IMPLEMENTATIONS if row.target.split(":")[0].endswith(".sampling")]
    for name in ("torch", kind):  # not every operation has a native form
        vars(registry.bound).update({row.operation: row.load() for row in chosen if row.name == name})


@pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs once per implementation."""
    use(request.param)
    yield request.param
    if native.available():
        native.select()
        native.set_threads(0)


def draws(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seeds: list[int] | None = None,
    position: int = 0,
) -> list[int]:
    """One token per row; row i has seed i unless told otherwise."""
    rows = logits.shape[0]
    whole, real = {"dtype": torch.int64}, {"dtype": torch.float64}
    return ops.draw(
        logits,
        torch.full((rows,), temperature, **real),
        torch.full((rows,), top_k, **whole),
        torch.full((rows,), top_p, **real),
        torch.full((rows,), min_p, **real),
        torch.tensor(seeds or list(range(rows)), **whole),
        torch.zeros(rows, **whole),
        torch.full((rows,), position, **whole),
    ).tolist()


def logits_of(rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


# --- random words ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((F, F, F, F), (F, F), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI_COUNTER, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words) -> None:
    assert ref.philox4x32(counter, key) == words  # python integers
    got = ref.philox4x32(tuple(torch.tensor([word, 1]) for word in counter), key)
    assert tuple(int(word[0]) for word in got) == words  # wrapping 64-bit tensors


def test_words_are_keyed_by_seed_sample_position_and_id() -> None:
    def expected(token_id: int, seed: int, sample: int, position: int) -> int:
        return ref.philox4x32((token_id // 4, position, sample, 0), (seed & F, (seed >> 32) & F))[token_id % 4]

    seed = 0x1234_5678_9ABC_DEF0
    ids = torch.tensor([0, 1, 2, 3, 6, 5, 900, 70_001])
    words = ref.random_words(ids, seed, 2, 77)
    assert words.tolist() == [expected(token_id, seed, 2, 77) for token_id in ids.tolist()]
    many = ref.random_words(ids, torch.arange(8) - 3, torch.arange(8), torch.arange(8) + 40)
    assert many.tolist() == [expected(int(ids[i]), i - 3, i, i + 40) for i in range(8)]


def test_words_are_equal_for_any_chunk_of_the_vocabulary() -> None:
    whole = ref.random_words(torch.arange(70_000), -5, 1, 9)
    for start, end in ((0, 1), (1, 70_000), (4097, 65_553), (69_998, 70_000)):
        assert torch.equal(ref.row_of_words(torch.arange(start, end), -5, 1, 9), whole[start:end])
    scattered = torch.arange(5, 70_000, 3)
    assert torch.equal(ref.row_of_words(scattered, -5, 1, 9), whole[scattered])


def test_noise_is_gumbel_of_the_word_and_its_bits_do_not_depend_on_where_it_stands() -> None:
    words = torch.cat(
        [
            torch.tensor([0, 1, F - 1, F, 1 << 31]),
            ref.random_words(torch.arange(5000), 1, 0, 0),
        ]
    )
    noise = ref.gumbel_noise(words)
    exact = [-math.log(-math.log((2 * word + 1) / 2**33)) if word < F - 1000 else 0.0 for word in words.tolist()]
    near_one = [-math.log(-math.log1p(-(2 * (F - word) + 1) / 2**33)) for word in (F - 1, F)]
    exact[2:4] = near_one
    assert torch.allclose(noise, torch.tensor(exact, dtype=torch.float64), rtol=1e-11, atol=1e-11)
    assert all(float(ref.gumbel_noise(words[i : i + 1])) == float(noise[i]) for i in range(0, 5000, 97))


# --- filters -----------------------------------------------------------------------------------------------


def allowed(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Brute force by a full sort in double."""
    scores = row.double() / temperature
    kept = torch.argsort(scores, descending=True, stable=True).tolist()
    if top_k:
        kept = [i for i in kept if scores[i] >= scores[kept[min(top_k, len(kept)) - 1]]]
    weights = torch.exp(scores - scores.max())
    if top_p < 1:
        mass, total, last = 0.0, float(weights[kept].sum()), 0
        while mass < top_p * total:
            mass, last = mass + float(weights[kept[last]]), last + 1
        kept = [i for i in kept if scores[i] >= scores[kept[last - 1]]]
    return {i for i in kept if weights[i] >= min_p}


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0),
        (1, 1.0, 0.0),
        (5, 1.0, 0.0),
        (0, 0.6, 0.0),
        (0, 0.05, 0.0),
        (0, 1.0, 0.2),
        (12, 0.8, 0.1),
        (999, 0.999, 0.0),
    ],
)
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_filters_keep_what_brute_force_keeps(top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    for seed in range(8):
        tied = logits_of(1, 300, seed)[0].mul(4).round().div(4)
        row = tied if seed % 2 else logits_of(1, 300, seed, spread=0.01)[0]
        row[7] = -math.inf
        scores = row.double() / temperature
        ids, kept_scores = ref._candidates(scores, top_k, top_p, min_p)
        expected = allowed(row, temperature, top_k, top_p, min_p)
        hopeless = {i for i in range(300) if scores[i] < scores.max() - 26.1}  # cannot win, may or may not be there
        assert set(ids.tolist()) - hopeless == expected - hopeless
        assert torch.equal(kept_scores, scores[ids])
        assert ids.tolist() == sorted(ids.tolist())


def test_noise_that_is_skipped_could_not_have_won() -> None:
    for seed, spread in enumerate((0.0, 0.3, 1.0, 3.0, 12.0)):
        row = logits_of(1, 8192, seed, spread)
        words = ref.random_words(torch.arange(8192), seed, 0, 4)
        full = torch.argmax(row[0].double() / 0.9 + ref.gumbel_noise(words))
        assert draws(row, temperature=0.9, seeds=[seed], position=4) == [int(full)]


def test_frequencies_match_the_filtered_softmax() -> None:
    row = torch.tensor([2.0, 1.5, 1.5, 0.0, -1.0, -9.0, 1.0])
    count = 4000
    for settings in ({}, {"top_k": 3}, {"temperature": 2.0, "top_p": 0.8}, {"min_p": 0.3}):
        tokens = draws(row.expand(count, -1).contiguous(), **settings)
        kept = sorted(
            allowed(
                row,
                settings.get("temperature", 1.0),
                settings.get("top_k", 0),
                settings.get("top_p", 1.0),
                settings.get("min_p", 0.0),
            )
        )
        expected = torch.zeros(7, dtype=torch.float64)
        expected[kept] = torch.softmax(row[kept].double() / settings.get("temperature", 1.0), dim=0)
        seen = torch.bincount(torch.tensor(tokens), minlength=7).double()
        assert seen[expected == 0].sum() == 0
        likely = expected > 1e-3
        chi2 = (((seen - count * expected) ** 2)[likely] / (count * expected[likely])).sum()
        assert chi2 < 22.5, (settings, seen / count, expected)  # 6 degrees of freedom, p = 0.001


# --- rows never meet ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.02}])
def test_a_row_is_drawn_alike_alone_and_in_any_company(settings) -> None:
    logits = logits_of(24, 5000, spread=2.0)
    together = draws(logits, **settings)
    for row in (0, 7, 23):
        assert draws(logits[row : row + 1], seeds=[row], **settings) == [together[row]]
    backwards = draws(logits.flip(0), seeds=list(range(23, -1, -1)), **settings)
    assert backwards[::-1] == together


def test_log_probabilities_and_top_tokens_of_a_row_do_not_depend_on_the_batch() -> None:
    logits = logits_of(33, 32_768)
    together = ops.log_probabilities(logits)
    for row in (0, 15, 32):
        assert torch.equal(ops.log_probabilities(logits[row : row + 1])[0], together[row])
    assert torch.allclose(together.double(), torch.log_softmax(logits.double(), dim=1), atol=2e-6)


def test_top_tokens_are_sorted_and_ties_go_to_the_lower_id() -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0, 5.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    values, ids = ops.top_tokens(scores, 4)
    assert ids.tolist() == [[1, 3, 2, 4], [5, 0, 1, 2]]
    assert values.tolist() == [[5, 5, 3, 3], [1, 0, 0, 0]]
    assert ops.top_tokens(scores, 0)[1].shape == (2, 0)


@pytest.mark.parametrize("vocab", [7, 256, 1024, 1000])
def test_peaks_find_the_first_of_equal_maxima_and_report_nan(vocab: int) -> None:
    logits = logits_of(6, vocab).round()
    values, ids = ops.peaks(logits)
    for row in range(6):
        best = float(logits[row].max())
        assert float(values[row]) == best
        assert int(ids[row]) == logits[row].tolist().index(best)
    logits[2, vocab - 1] = math.nan
    assert torch.isfinite(ops.peaks(logits)[0]).tolist() == [True, True, False, True, True, True]
    assert ops.peaks(logits[:0])[1].shape == (0,)


# --- edits -------------------------------------------------------------------------------------------------


def test_penalties_bias_and_masks_touch_only_their_entries() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    rows, ids = torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2])
    two = torch.tensor([2.0, 1.0])
    ops.apply_penalties(
        logits, rows, ids, torch.tensor([3, 0, 1]), two, torch.tensor([0.5, 9.0]), torch.tensor([0.1, 9.0])
    )
    expected = torch.tensor([[2.0 / 2 - 0.3 - 0.5, -2.0 * 2, 1.0 / 2 - 0.1 - 0.5, 4.0], [1.0, 1.0, 1.0, 1.0]])
    assert torch.allclose(logits, expected)
    ops.add_bias(logits, torch.tensor([1]), torch.tensor([3]), torch.tensor([-2.5]))
    ops.mask_tokens(logits, torch.tensor([0]), torch.tensor([3]))
    assert logits[1].tolist() == [1.0, 1.0, 1.0, -1.5]
    assert logits[0, 3] == -math.inf
    assert torch.isfinite(logits[0, :3]).all()


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, 300, 1029])
def test_bit_sets_leave_what_they_hold_of_their_rows_alone(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    wide = torch.randn(6, vocab + 7, generator=generator)
    wide[0, 3] = math.nan
    held = torch.rand(3, vocab, generator=generator) < torch.tensor([0.5, 0.0, 1.0])[:, None]
    words = -(-vocab // 32)
    padded = torch.zeros(3, words * 32, dtype=torch.int64)
    padded[:, :vocab] = held
    bits = (padded.view(3, words, 32) << torch.arange(32)).sum(2)
    bits[:, -1] |= torch.tensor(-1) << (vocab - (words - 1) * 32)  # what stands behind the last token means nothing
    rows = torch.tensor([4, 0, 2])
    expected = wide.clone()
    for row, kept in zip(rows.tolist(), held, strict=True):
        expected[row, 3 : vocab + 3][~kept] = -math.inf
    ops.mask_bits(wide[:, 3 : vocab + 3], rows, (bits << 32 >> 32).to(torch.int32))
    assert torch.equal(wide.nan_to_num(9.0), expected.nan_to_num(9.0))
    before = wide.clone()
    ops.mask_bits(wide[:, 3 : vocab + 3], rows[:0], torch.zeros(0, words, dtype=torch.int32))
    assert torch.equal(wide.nan_to_num(9.0), before.nan_to_num(9.0))


def test_a_wrong_shape_or_dtype_is_named() -> None:
    with pytest.raises(ArgumentError, match="sets have 2 words, N = 32 needs 1"):
        ops.mask_bits(torch.zeros(1, 32), torch.tensor([0]), torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ArgumentError, match="peaks: logits"):
        ops.peaks(torch.zeros(3))
    with pytest.raises(ArgumentError, match=r"add_bias: bias .*dtype"):
        ops.add_bias(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0]), torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="count 9"):
        ops.top_tokens(torch.zeros(1, 4), 9)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_takes_no_other_with_it(wrong: float) -> None:
    """Its own top tokens mean nothing, and nobody is told them."""
    scores = ref.log_probabilities(torch.tensor([[1.0, wrong, 0.0], [2.0, 1.0, 3.0]]))
    values, token_ids = ref.top_tokens(scores, 2)
    assert token_ids[1].tolist() == [2, 0]
    assert torch.isfinite(values[1]).all()
