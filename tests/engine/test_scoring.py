"""Scores of prompts from logits: which row scores which token, block by block, and what is not finite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cierzo.engine.worker import scoring
from cierzo.engine.worker.batch import BatchBuilder
from cierzo.engine.worker.scoring import Scorer
from cierzo.engine.worker.staging import Staging
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.registry import bind
from cierzo.scheduler.plan import Scoring, SeqPlan, StepPlan, TokenLogprobs, unpacked_entry

VOCAB, ROWS = 40, 64
LOGITS = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _bound() -> Iterator[None]:
    bind(KernelsConfig(), "cpu")
    with torch.inference_mode():
        yield


def chunk(slot: int, start: int, count: int, num_prompt: int, scored: Scoring | None = None) -> SeqPlan:
    """Tokens `start` to `start + count`, of a sequence of that many prompt tokens."""
    return SeqPlan((slot, 0), slot, 0, start, [*range(count)], num_prompt, [], False, None, scored)


# Expanded rows: 0-4 of the first, 5-9 of the third, 10 and 11 of the fourth, whose output is absorbed.
PLAN = [
    chunk(0, 3, 5, 9, Scoring(4, [7, 8, 9, 10], 3)),
    chunk(1, 9, 1, 5),
    chunk(2, 0, 5, 8),
    chunk(3, 0, 4, 2, Scoring(0, [39], 1)),
]
SCORED = {0: ([1, 2, 3, 4], 3), 3: ([10], 1)}


def score(logits: Tensor, staging: Staging | None = None) -> dict[int, list[TokenLogprobs] | None]:
    batch = BatchBuilder(ROWS, 4, 8, 4).build(StepPlan(1, PLAN, 15))
    found = Scorer(staging).launch(PLAN, batch, lambda rows: logits[rows])()
    return {index: None if raw is None else [unpacked_entry(one) for one in raw] for index, raw in found.items()}


@pytest.mark.parametrize("block_rows", [1, 2, 128])
@pytest.mark.parametrize("staging", [None, Staging(torch.device("cpu"))])
def test_each_token_is_scored_by_the_row_before_it(
    monkeypatch: pytest.MonkeyPatch, block_rows: int, staging: Staging | None
) -> None:
    monkeypatch.setattr(scoring, "BLOCK_ROWS", block_rows)
    found = score(LOGITS, staging)
    assert found.keys() == SCORED.keys()
    right = LOGITS.double().log_softmax(-1)
    for index, (rows, count) in SCORED.items():
        entries, scored = found[index], PLAN[index].scoring
        assert entries is not None
        assert scored is not None
        assert [entry.token_id for entry in entries] == scored.token_ids
        for row, entry in zip(rows, entries, strict=True):
            top = right[row].topk(count)
            assert entry.top_token_ids == top.indices.tolist()
            assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-5)
            assert entry.logprob == pytest.approx(right[row, entry.token_id].item(), abs=1e-5)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_fails_its_own_sequence(wrong: float) -> None:
    logits = LOGITS.clone()
    logits[3, 5] = wrong
    found = score(logits)
    assert found[0] is None
    assert found[3] == score(LOGITS)[3]


def test_logits_are_made_for_few_rows_at_a_time() -> None:
    """Whatever the step, as all of a prompt's would be gigabytes."""
    count = 1000
    seq = chunk(0, 0, count, count + 1, Scoring(0, [1] * count, 0))
    asked: list[int] = []

    def head(rows: Tensor) -> Tensor:
        asked.append(len(rows))
        return LOGITS[rows % ROWS]

    batch = BatchBuilder(count, 1, count, 4).build(StepPlan(1, [seq], count))
    (entries,) = Scorer().launch([seq], batch, head)().values()
    assert entries is not None
    assert sum(asked) == len(entries) == count
    assert max(asked) == scoring.BLOCK_ROWS
