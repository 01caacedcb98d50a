"""transformers agrees: logits and greedy tokens, whichever way the tokens come through the pages."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from oracle import ORACLES, Ours, oracle_logits, vocab_size
from torch import Tensor

TOKENS = 43
FAR = "moe_8192"


def agree(name: str, logits: Tensor, expected: Tensor) -> None:
    """Relative difference at most 1e-4, and equal greedy tokens where the oracle's best two are 1e-3 apart."""
    assert logits.shape == expected.shape
    difference = (logits - expected).abs().max() / expected.abs().max()
    assert difference <= 1e-4, f"{name}: relative difference {difference:.2e}"
    best = expected.topk(2, dim=-1).values
    clear = best[:, 0] - best[:, 1] > 1e-3
    assert clear.float().mean() > 0.9, "the oracle's logits are too alike for a greedy comparison to mean anything"
    assert torch.equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])


def prompt(name: str, length: int = TOKENS, seed: int = 0) -> list[int]:
    """Random tokens of the case's vocabulary."""
    return random.Random(seed).choices(range(vocab_size(name)), k=length)


def in_one_go(ours: Ours, tokens: list[int]) -> Tensor:
    """A fresh prompt."""
    (logits,) = ours.step((ours.sequence(), tokens, False))
    return logits


def in_chunks(ours: Ours, tokens: list[int]) -> Tensor:
    """Prompt chunks that end anywhere in a block."""
    sequence = ours.sequence()
    return torch.cat([ours.step((sequence, tokens[i : i + 9], False))[0] for i in range(0, len(tokens), 9)])


def one_by_one(ours: Ours, tokens: list[int]) -> Tensor:
    """A prompt of five, the others as generated tokens, one per step."""
    sequence = ours.sequence()
    steps = [ours.step((sequence, tokens[:5], False))[0]]
    return torch.cat([*steps, *(ours.step((sequence, [token], True))[0] for token in tokens[5:])])


def recomputed(ours: Ours, tokens: list[int]) -> Tensor:
    """As after a preemption: prompt and many generated tokens in one step, crossing from one form to the other."""
    sequence = ours.sequence()
    return torch.cat(ours.step((sequence, tokens[:17], False), (sequence, tokens[17:], True)))


def in_company(ours: Ours, tokens: list[int]) -> Tensor:
    """Beside sequences of other lengths, some of which prefill while others decode."""
    others = [(ours.sequence(), prompt_of(ours, 3 + 11 * i)) for i in range(3)]
    sequence = ours.sequence()
    rows = [ours.step((others[0][0], others[0][1], False), (sequence, tokens[:20], False))[1]]
    for index, token in enumerate(tokens[20:]):
        pieces = [(others[0][0], [1], True), (sequence, [token], True)]
        if index in (1, 2):
            pieces.append((others[index][0], others[index][1], False))
        elif index > 2:
            pieces += [(others[1][0], [2], True), (others[2][0], [3], True)]
        rows.append(ours.step(*pieces)[1])
    return torch.cat(rows)


def prompt_of(ours: Ours, length: int) -> list[int]:
    """Tokens for a neighbour."""
    return random.Random(length).choices(range(ours.config.vocab_size), k=length)


@pytest.mark.parametrize(
    "way", [in_one_go, in_chunks, one_by_one, recomputed, in_company], ids=lambda way: way.__name__
)
@pytest.mark.parametrize("name", [name for name in ORACLES if name != FAR])
def test_agrees_with_transformers(name: str, way: Callable[[Ours, list[int]], Tensor]) -> None:
    tokens = prompt(name)
    agree(name, way(Ours(name, num_blocks=96), tokens), oracle_logits(name, tokens))


def test_positions_beyond_8192() -> None:
    """The real constants of Small 4: the query scale and the long wavelengths, past a cached context of 8k."""
    tokens = prompt(FAR, 8192 + 24)
    ours = Ours(FAR, num_blocks=200, block_tokens=64)
    sequence = ours.sequence()
    ours.step((sequence, tokens[:8180], False))
    rows = ours.step((sequence, tokens[8180:8200], False))
    rows += [ours.step((sequence, [token], True))[0] for token in tokens[8200:]]
    expected = oracle_logits(FAR, tokens)
    agree(FAR, torch.cat(rows), expected[8180:])
