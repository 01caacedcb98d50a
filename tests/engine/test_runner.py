"""What the runner hands to a model: tensors and host copies say the same, whatever kind of step it is."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from cierzo.cache.config import CacheConfig
from cierzo.cache.pool import KVPool
from cierzo.engine.messages import Submit
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import fake_config
from cierzo.engine.worker.runner import ModelRunner
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ops.block import StepRows
from cierzo.kernels.registry import bind
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.params import SamplingParams

BLOCK_TOKENS = 4
VOCAB = 40


@pytest.fixture(autouse=True)
def _bind() -> None:
    bind(KernelsConfig(), "cpu")


class SuspiciousModel:
    """Recomputes every field of its inputs from the others. A kernel may read either copy of a number."""

    def __init__(self) -> None:
        self.crossings = 0  # steps that hold both forms of one sequence
        self.num_rows = 0

    def logits(self, inputs: StepRows, kv: KVPool, logit_rows: Tensor | None) -> Tensor:
        rows = len(inputs.token_ids)
        groups = ((inputs.expanded, 0, inputs.num_expanded), (inputs.absorbed, inputs.num_expanded, rows))
        for queries, first, last in groups:
            self.check(queries, inputs.positions[first:last], inputs.cache_slots[first:last])
        self.crossings += bool({*inputs.expanded.table_rows.tolist()} & {*inputs.absorbed.table_rows.tolist()})
        self.num_rows += rows
        chosen = inputs.token_ids if logit_rows is None else inputs.token_ids[logit_rows]
        return torch.sin(chosen[:, None].float() * torch.arange(1, VOCAB + 1))

    def check(self, queries: PagedQueries, positions: Tensor, cache_slots: Tensor) -> None:
        for tensor in (queries.query_starts, queries.context_lengths, queries.table_rows, queries.block_tables):
            assert tensor.dtype == torch.int32
        assert queries.query_starts[0] == 0
        assert queries.query_starts.diff().tolist() == queries.query_lengths
        assert queries.context_lengths.tolist() == queries.contexts
        assert len(queries.table_rows) == len(queries.contexts)
        ends = zip(queries.query_lengths, queries.contexts, strict=True)
        assert positions.tolist() == [p for length, context in ends for p in range(context - length, context)]
        rows = queries.table_rows.repeat_interleave(torch.tensor(queries.query_lengths, dtype=torch.int64))
        blocks = queries.block_tables[rows, positions // BLOCK_TOKENS]
        assert torch.equal(cache_slots, blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS)


def test_tensors_and_host_copies_agree_in_every_step() -> None:
    limits = SchedulerConfig(budget_tokens=20, max_chunk_tokens=7, max_running=4, max_model_len=32)
    cache = CacheConfig(block_tokens=BLOCK_TOKENS, num_blocks=10, prefix_caching=False)
    model = SuspiciousModel()
    core = EngineCore(
        fake_config(limits, cache, vocab_size=VOCAB), ModelRunner(model, cast(KVPool, None), limits.max_running)
    )
    for number in range(8):
        params = SamplingParams(max_tokens=16, seed=number, ignore_eos=True)
        core.submit(Submit(request_id=number, prompt_token_ids=[*range(1 + 2 * number)], sampling=params))
    reasons = [delta.finish.reason for _ in range(200) for delta in core.step_plain() if delta.finish is not None]
    assert reasons == 8 * ["length"]  # a check that fails in `forward` fails its step
    assert core.stats().preemptions > 0
    assert model.crossings > 0
    assert model.num_rows > 8 * 16
