"""Bytes and operations of native operations, taken from the arguments of real calls, against counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native_only import needs_native

from cierzo.bench import attention_cases, kernel_cases, kernels
from cierzo.bench.kernel_cases import Maker, Model, Size
from cierzo.bench.work import Work, work
from cierzo.kernels.cpu import native
from cierzo.kernels.registry import implementations

# Outputs in multiples of 32, of which packed weights have panels: no padding is read.
TINY4 = Model(
    name="tiny4", hidden=64, heads=2, vocab=512, mlp_width=32, query_rank=32, rank=32, rope=16, nope=32,
    value_dim=32, experts=32, top_k=2, expert_width=32,
)  # fmt: skip
TINY3 = Model(name="tiny3", hidden=64, heads=4, vocab=512, mlp_width=96, kv_heads=2, head_dim=32)
DECODE = Size(name="decode 2", sequences=2, rows_each=1, context=64)  # 128 pairs of a row and a token
PREFILL = Size(name="prefill 5", sequences=1, rows_each=5, context=64)  # 60 + 61 + 62 + 63 + 64 = 310 pairs
MLP = 3 * 64 * 32  # weights of an expert: gate, up, down


def product(rows: int, k: int, n: int) -> Work:
    """In bf16: each weight once, rows in and out."""
    return 2 * rows * k * n, (k * n + rows * (k + n)) * 2


def both(*works: Work) -> Work:
    return sum(work[0] for work in works), sum(work[1] for work in works)


# (operation, model, size): operations and bytes. A norm counts four operations a value; a cached value has 2 bytes.
BY_HAND: dict[tuple[str, str, str], tuple[str, Work]] = {
    ("rms_norm", "tiny4", "decode 2"): ("norm", (4 * 2 * 64, 2 * 2 * 64 * 2)),
    ("add_rms_norm", "tiny4", "decode 2"): ("norm", (4 * 2 * 64, 4 * 2 * 64 * 2)),
    ("linear", "tiny4", "decode 2"): ("linear", product(2, 2 * 32, 64)),
    ("linear", "tiny3", "prefill 5"): ("linear", product(5, 4 * 32, 64)),
    ("gated_mlp", "tiny4", "decode 2"): ("gated_mlp", both(product(2, 64, 2 * 32), product(2, 32, 64))),
    ("route", "tiny4", "decode 2"): ("route", product(2, 64, 32)),
    # Two tokens to experts 0, 1 and 1, 5, and to the shared one: expert 1 has two rows, and so has that.
    ("expert_mlp", "tiny4", "decode 2"): (
        "expert_mlp",
        both(*(both(product(rows, 64, 2 * 32), product(rows, 32, 64)) for rows in (1, 2, 1, 2))),
    ),
    ("mla_absorb", "tiny4", "decode 2"): ("mla_absorb", (2 * 2 * 2 * 32 * 32, 2 * 32 * 32 * 2)),
    ("mla_unabsorb", "tiny4", "decode 2"): ("mla_unabsorb", (2 * 2 * 2 * 32 * 32, 2 * 32 * 32 * 2)),
    ("mla_decode", "tiny4", "decode 2"): ("mla_decode", (2 * 128 * 2 * (48 + 32), 2 * 64 * 48 * 2)),
    ("mla_prefill", "tiny4", "prefill 5"): (
        "mla_prefill",
        (2 * 310 * 2 * (32 + 16 + 32) + 2 * 64 * 2 * 32 * (32 + 32), 64 * 48 * 2),
    ),
    ("gqa_decode", "tiny3", "decode 2"): ("gqa_decode", (4 * 128 * 4 * 32, 2 * 64 * 2 * 2 * 32 * 2)),
    ("gqa_prefill", "tiny3", "prefill 5"): ("gqa_prefill", (4 * 310 * 4 * 32, 64 * 2 * 2 * 32 * 2)),
    ("peaks", "tiny4", "decode 2"): ("peaks", (2 * 512, 2 * 512 * 4)),
}


@needs_native
@pytest.mark.parametrize(("operation", "model", "size"), BY_HAND)
def test_a_native_call_is_counted_as_by_hand(
    operation: str, model: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_cases, "random_experts", lambda *_: torch.tensor([[0, 1], [1, 5]]))
    models, sizes = {"tiny4": TINY4, "tiny3": TINY3}, {"decode 2": DECODE, "prefill 5": PREFILL}
    call = kernels.CASES[operation](models[model], sizes[size], Maker(native=True, format="bf16", cold_bytes=0))
    assert call is not None
    (choice,) = (row for row in implementations(operation, "cpu") if row.name == "native")
    seen: list[tuple[str, Work]] = []
    native.observe(lambda name, args, seconds: seen.append((name, work(name, args))))
    try:
        choice.load()(*call.arguments[0])
    finally:
        native.observe(None)
    assert seen == [BY_HAND[operation, model, size]]


@needs_native
@pytest.mark.parametrize(("dtype", "row_bytes"), [(torch.float32, 48 * 4), (torch.uint8, 32 + 16 + 2 * 4)])
def test_cached_rows_have_the_bytes_of_their_format(dtype: torch.dtype, row_bytes: int) -> None:
    """INT8: a latent and a rotated key, each with a scale."""
    args: list[Any] = []
    pages = torch.zeros(4, 32, 48 if dtype == torch.float32 else 56, dtype=dtype)
    queries = attention_cases.queries_of(DECODE, 1)
    (choice,) = (row for row in implementations("mla_decode", "cpu") if row.name == "native")
    native.observe(lambda name, found, seconds: args.append(work(name, found)))
    try:
        choice.load()(torch.zeros(2, 2, 48), pages, queries, 0.1, 32)
    finally:
        native.observe(None)
    assert args == [(2 * 128 * 2 * (48 + 32), 2 * 64 * row_bytes)]


def test_an_operation_without_a_rule_counts_for_nothing() -> None:
    assert work("rope_tables", None) == (0.0, 0.0)
