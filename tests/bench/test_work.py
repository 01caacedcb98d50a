"""Work of native operations, from the arguments of real calls, against that of their cases (test_gpu_calls.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native_only import needs_native
from packed_maker import PackedMaker

from cierzo.bench.gpu.calls import CASES, queries_of
from cierzo.bench.gpu.cases import Size
from cierzo.bench.work import work
from cierzo.engine.cost.operations import Work
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels.cpu import native
from cierzo.kernels.registry import implementations

TINY4 = ModelSizes(
    name="tiny4", hidden=64, heads=2, vocab=500, mlp_width=32, query_rank=32, rank=32, rope=16, nope=64,
    value_dim=96, experts=32, top_k=2, expert_width=64, shared_width=128,
)  # fmt: skip
TINY3 = ModelSizes(name="tiny3", hidden=64, heads=4, vocab=500, mlp_width=96, kv_heads=2, head_dim=32)
DECODE = Size(name="decode 2", sequences=2, rows_each=1, context=64)
PREFILL = Size(name="prefill 5", sequences=2, rows_each=5, context=64)
COUNTED = (
    *("rms_norm", "add_rms_norm", "linear", "lm_head", "gated_mlp", "route", "expert_mlp", "peaks"),
    *("mla_absorb", "mla_unabsorb", "mla_decode", "mla_prefill", "gqa_decode", "gqa_prefill"),
)


def seen(operation: str, *arguments: Any) -> list[Work]:
    """The work of the native calls that an operation makes."""
    (choice,) = (row for row in implementations(operation, "cpu") if row.name == "native")
    found: list[Work] = []
    native.observe(lambda name, args, seconds: found.append(work(name, args)))
    try:
        choice.load()(*arguments)
    finally:
        native.observe(None)
    return found


@needs_native
@pytest.mark.parametrize("format", ["bf16", "int8", "nvfp4"])
@pytest.mark.parametrize("operation", COUNTED)
def test_a_native_call_is_counted_as_its_case(operation: str, format: str) -> None:
    calls = 0
    for model in (TINY4, TINY3):
        for size in (DECODE, PREFILL):
            call = CASES[operation].call(model, size, PackedMaker(format, cold_bytes=0))
            if call is not None:
                (arguments,), wanted = call
                (found,) = seen(operation, *arguments)
                assert (found.num_bytes, found.operations) == (wanted.num_bytes, wanted.operations)
                calls += 1
    assert calls


@needs_native
@pytest.mark.parametrize(("dtype", "row_bytes"), [(torch.float32, 48 * 4), (torch.uint8, 32 + 16 + 2 * 4)])
def test_cached_rows_have_the_bytes_of_their_format(dtype: torch.dtype, row_bytes: int) -> None:
    """INT8: a latent and a rotated key, each with a scale. Queries and results are fp32 here."""
    pages = torch.zeros(4, 32, 48 if dtype == torch.float32 else 56, dtype=dtype)
    queries = queries_of(DECODE)
    (found,) = seen("mla_decode", torch.zeros(2, 2, 48), pages, queries, 0.1, 32)
    assert (found.num_bytes, found.operations) == (
        2 * 64 * row_bytes + 2 * 2 * (48 + 32) * 4,
        2 * 128 * 2 * (48 + 32),
    )


def test_an_operation_without_a_rule_counts_for_nothing() -> None:
    assert work("rope_tables", None) == Work("rope_tables", 0)
