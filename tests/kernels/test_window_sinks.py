"""Grouped-query attention with a sliding window and sinks: the reference against transformers' gpt-oss and fp64."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from native_only import needs_native
from paged_cases import SEGMENTS, assert_attends, make_case
from paged_sequences import SCALE, Batch, Form, forget, make_batch, random_sequence
from torch import Tensor
from transformers import masking_utils
from transformers.models.gpt_oss import modeling_gpt_oss

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.ops import attention
from cierzo.kernels.ref import attention as ref
from cierzo.kernels.registry import bind

FORM = Form(heads=6, kv_heads=2, width=8)
SINKS = torch.tensor([-torch.inf, 0.0, 2.0, 9.0, 1e30, -3.0])
WINDOWS = (None, 1, 2, 7, 33, 10**9)
DOORS = ("gqa_prefill", "gqa_decode")


@pytest.fixture(autouse=True)
def _reference() -> None:
    bind(KernelsConfig(implementations=dict.fromkeys(DOORS, "torch")), "cpu")


def gpt_oss(batch: Batch, segment: int, window: int | None, sinks: Tensor) -> Tensor:
    """transformers' eager attention of one segment, with the mask that its gpt-oss makes -> [n,H,d]."""
    queries = batch.queries
    length, context = queries.query_lengths[segment], queries.contexts[segment]
    start = int(queries.query_starts[segment])
    blocks = queries.block_tables[queries.table_rows[segment], : -(-context // batch.pages[0].shape[1])].long()
    keys, values = (pages[blocks].flatten(0, 1)[:context].transpose(0, 1)[None] for pages in batch.pages)
    masks = [masking_utils.causal_mask_function]
    if window is not None:
        masks.append(masking_utils.sliding_window_overlay(window))
    sees = masking_utils.and_masks(*masks)
    rows, tokens = torch.arange(context - length, context)[:, None], torch.arange(context)
    mask = torch.where(sees(0, 0, rows, tokens), 0.0, -torch.inf)
    module = SimpleNamespace(sinks=sinks, num_key_value_groups=FORM.heads // FORM.kv_heads, training=False)
    q = batch.q[start : start + length].transpose(0, 1)[None]
    return modeling_gpt_oss.eager_attention_forward(module, q, keys, values, mask, SCALE)[0][0]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("door", DOORS)
def test_transformers_gpt_oss_agrees(door: str, window: int | None) -> None:
    sequences = [random_sequence(FORM, torch.float32, 80, seed) for seed in (1, 2)]
    batch = make_batch(FORM, sequences, [(0, 0, 80), (1, 30, 71), (0, 79, 80), (1, 0, 1), (1, 6, 9)], 5)
    got = getattr(attention, door)(batch.q, *batch.pages, batch.queries, SCALE, window, SINKS)
    for segment, rows in enumerate(got.split(batch.queries.query_lengths)):
        torch.testing.assert_close(rows, gpt_oss(batch, segment, window, SINKS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", SEGMENTS)
def test_hostile_cases(name: str, window: int | None, sinks: Tensor | None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(name, FORM.q_width, FORM.heads, dtype, entry=FORM.entry)
        pages = [page.contiguous() for page in case.pages.unbind(2)]
        both = [FORM.keys_values(context) for context in case.contexts]
        for door in DOORS:
            got = getattr(attention, door)(case.q, *pages, case.queries, SCALE, window, sinks)
            assert_attends(got, case, both, SCALE, window, sinks)


def test_what_lies_before_the_window_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [random_sequence(FORM, torch.float32, 60, seed) for seed in (1, 2)]
    batch = make_batch(FORM, sequences, [(0, 40, 60), (1, 49, 50), (1, 50, 53)], block_tokens=4)
    for door in DOORS:
        call = partial(getattr(attention, door), scale=SCALE, window=9, sinks=SINKS)
        whole = call(batch.q, *batch.pages, batch.queries)
        rest = forget(batch, 9)
        assert torch.equal(call(rest.q, *rest.pages, rest.queries), whole)
    monkeypatch.setattr(ref, "MASK_ELEMENTS", 60)  # two rows at a time
    cut = attention.gqa_prefill(batch.q, *batch.pages, batch.queries, SCALE, 9, SINKS)
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-6)


def test_misuse_is_refused_by_name() -> None:
    batch = make_batch(FORM, [random_sequence(FORM, torch.float32, 9, seed=1)], [(0, 8, 9)])
    arguments = (batch.q, *batch.pages, batch.queries, SCALE)
    for door in DOORS:
        call = getattr(attention, door)
        with pytest.raises(ArgumentError, match=f"{door}: window 0 is not at least 1"):
            call(*arguments, 0)
        with pytest.raises(ArgumentError, match=rf"{door}: sinks \[5\], q has 6 heads"):
            call(*arguments, None, SINKS[:5])
        with pytest.raises(
            ArgumentError, match=rf"{door}: sinks must have dtype torch.float32, has torch.bfloat16"
        ):
            call(*arguments, None, SINKS.bfloat16())


@needs_native
def test_the_c_plus_plus_kernels_refuse_both_by_name() -> None:
    bind(KernelsConfig(), "cpu")
    batch = make_batch(FORM, [random_sequence(FORM, torch.float32, 9, seed=1)], [(0, 8, 9)])
    arguments = (batch.q, *batch.pages, batch.queries, SCALE)
    for door in DOORS:
        call = getattr(attention, door)
        assert call(*arguments, None, None).isfinite().all()
        with pytest.raises(
            ArgumentError, match=f"{door}: window 4 given, and the C.. kernel has none: choose .*torch"
        ):
            call(*arguments, 4)
        with pytest.raises(
            ArgumentError, match=f"{door}: sinks given, and the C.. kernel has none: choose .*torch"
        ):
            call(*arguments, None, SINKS)
