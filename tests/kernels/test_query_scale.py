"""The factor on the queries of grouped-query attention: to double it is to double the query's weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_engine import gpu_kernels
from oracle import make_queries
from torch import Tensor

from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.ops import block, rope
from cierzo.kernels.ops.block import GqaWeights, PositionTables, StepRows
from cierzo.kernels.registry import bind

HEADS, KV_HEADS, WIDTH, HIDDEN, EXPANDED, ROWS = 4, 2, 32, 64, 5, 8
DTYPES = [torch.float32, torch.bfloat16]


def gqa_weights(dtype: torch.dtype) -> GqaWeights:
    random = torch.Generator().manual_seed(0)
    rows = (HEADS + 2 * KV_HEADS) * WIDTH
    return GqaWeights(
        norm=torch.ones(HIDDEN, dtype=dtype),
        qkv=(torch.randn(rows, HIDDEN, generator=random) * 0.15).to(dtype),
        output=(torch.randn(HIDDEN, HEADS * WIDTH, generator=random) * 0.15).to(dtype),
        query_heads=HEADS,
        kv_heads=KV_HEADS,
        eps=1e-5,
        scale=WIDTH**-0.5,
    )


def doubled(weights: GqaWeights, factor: float) -> GqaWeights:
    """The same with queries `factor` times as large, a power of two: exactly."""
    assert isinstance(weights.qkv, Tensor)
    qkv = weights.qkv.clone()
    qkv[: HEADS * WIDTH] *= factor
    return replace(weights, qkv=qkv)


def attend(weights: GqaWeights, scale: Tensor | None) -> Tensor:
    """A step of five prompt rows and three generated ones of one sequence."""
    dtype = weights.norm.dtype
    residual = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    tables = torch.tensor([[2, 0]], dtype=torch.int32)
    rows = StepRows(
        torch.zeros(ROWS, dtype=torch.int64),
        torch.arange(ROWS),
        torch.tensor([8, 9, 10, 11, 0, 1, 2, 3]),
        EXPANDED,
        make_queries([(EXPANDED, EXPANDED, 0)], tables),
        make_queries([(ROWS - EXPANDED, ROWS, 0)], tables),
    )
    cos, sin = rope.rope_tables(rows.positions, rope.default_inv_freq(WIDTH, 100.0))
    pages = [torch.full((3, 4, KV_HEADS, WIDTH), torch.nan, dtype=dtype) for _ in range(2)]
    return block.gqa_block(None, residual, weights, rows, PositionTables(cos, sin, scale), *pages)


def check(dtype: torch.dtype) -> None:
    """Each row has the bits that it has when all queries are multiplied by its factor."""
    weights, scale = gqa_weights(dtype), torch.tensor([1.0, 2, 4, 0.5, 2, 1, 4, 2])
    found = attend(weights, scale)
    for factor in (0.5, 1.0, 2.0, 4.0):
        expected = attend(doubled(weights, factor), None)
        same = scale == factor
        assert torch.equal(found[same], expected[same]), factor
        assert not torch.equal(found[~same], expected[~same])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["in one call", "composed"])
def test_on_a_cpu(implementation: str, dtype: torch.dtype) -> None:
    chosen = {"gqa_block": "composed"} if implementation == "composed" else {}
    bind(KernelsConfig(implementations=chosen), "cpu")
    check(dtype)


def test_by_each_instruction_set(instruction_set: str) -> None:
    check(torch.bfloat16)


def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, where blocks are composed of single operations."""
    with gpu_kernels(monkeypatch):
        check(torch.bfloat16)
