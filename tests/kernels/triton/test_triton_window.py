"""Sliding windows and sinks in Triton: hostile cases, a row's own bits, what is not read, cost past the window."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from paged_cases import SEGMENTS, assert_attends, make_case, make_queries
from paged_sequences import SCALE, Batch, Form, Sequence, forget, make_batch, random_sequence, segments_near
from rounding import assert_near
from torch import Tensor

from cierzo.kernels.triton import flash, gqa, split
from cierzo.kernels.triton.split import Partials, Shape, Splits

FORM = Form(heads=6, kv_heads=2, width=8)
NARROW = Form(heads=2, kv_heads=1, width=8)
SINKS = torch.tensor([-torch.inf, 0.0, 9.0, 1e30, -3.0, 2.0])
WINDOWS = (1, 64, 100, 10**9)
LENGTH = 470  # three short splits, two long ones, and part of a third
Result = Callable[..., list[Tensor]]


@pytest.fixture(autouse=True)
def _small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "SPLITS", Splits(64, 3, 128))
    monkeypatch.setattr(flash, "WORKSPACE_TOKENS", 2 * flash.TOKENS)
    made = Partials.empty

    def poisoned(*arguments: Any) -> Partials:
        partials = made(*arguments)
        for memory in (partials.values, partials.maxima, partials.sums):
            memory.fill_(1e38)  # a split that was left out must not be looked at
        return partials

    monkeypatch.setattr(Partials, "empty", poisoned)


def attended(
    call: Callable[..., Tensor], batch: Batch, window: int | None, sinks: Tensor | None = SINKS
) -> list[Tensor]:
    """One result per segment."""
    result = call(
        batch.q, *batch.pages, batch.queries, SCALE, window, None if sinks is None else sinks[-batch.form.heads :]
    )
    return list(result.split(batch.queries.query_lengths))


decode: Result = partial(attended, gqa.gqa_decode)
prefill: Result = partial(attended, gqa.gqa_prefill)


@pytest.mark.parametrize(("window", "sinks"), [(None, SINKS), (1, None), (63, SINKS), (65, SINKS)])
def test_hostile_cases(window: int | None, sinks: Tensor | None) -> None:
    """Every kind of segment with a window of 1 and without one; those that reach past a tile with the others."""
    names = ["chunk_after_context", "decode_unequal", "several_splits"]
    if window in (None, 1):  # prompts are below
        names = [name for name in SEGMENTS if name not in ("mixed", "fresh_prompts", "long_context")]
    for dtype, name in [(torch.float32, name) for name in names] + [(torch.bfloat16, "mixed")]:
        case = make_case(name, FORM.q_width, FORM.heads, dtype, entry=FORM.entry, margin=8)
        pages = [page.contiguous() for page in case.pages.unbind(2)]
        both = [FORM.keys_values(context) for context in case.contexts]
        for call in (gqa.gqa_decode, gqa.gqa_prefill):
            result = call(case.q, *pages, case.queries, SCALE, window, sinks)
            assert_attends(result, case, both, SCALE, window, sinks)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_row_has_its_bits_alone_and_beside_others(window: int) -> None:
    sequences = [random_sequence(NARROW, torch.bfloat16, LENGTH, seed) for seed in (1, 2)]
    batch = partial(make_batch, NARROW, sequences)
    ends = [1, 2, 64, 65, 128, 193, 321, LENGTH]
    alone = {end: decode(batch([(0, end - 1, end)]), window)[0] for end in ends}
    assert torch.cat(list(alone.values())).isfinite().all()
    segments = [(0, end - 1, end) for end in ends]
    beside = [(1, max(0, end - 1 - i % 3), end) for i, end in enumerate(ends)]
    mixed = [segment for pair in zip(beside, segments, strict=True) for segment in pair]
    for end, row in zip(ends, decode(batch(mixed, 7), window)[1::2], strict=True):
        assert torch.equal(row, alone[end]), end
    for rows in decode(batch([(0, 193 - n, 193) for n in (1, 4, 8)]), window):  # rows that share a tile
        assert torch.equal(rows[-1], alone[193][0])
    many = decode(batch([(0, 120, 200)]), window)[0]  # rows of several tiles, with windows in several splits
    for end in (128, 193):
        assert torch.equal(many[end - 121], alone[end][0]), end


@pytest.mark.parametrize("window", WINDOWS)
def test_a_prompts_row_has_its_bits_however_it_is_cut(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sinks = SINKS if window == 64 else None  # a sink comes before the rows' first token, and hides a missing one
    sequences = [random_sequence(NARROW, torch.bfloat16, 300, seed) for seed in (1, 2)]
    monkeypatch.setattr(flash, "WORKSPACE_TOKENS", 4096)  # one round
    whole = prefill(make_batch(NARROW, sequences, [(0, 0, 300)]), window, sinks)[0]
    assert whole.isfinite().all()
    monkeypatch.setattr(flash, "WORKSPACE_TOKENS", 2 * flash.TOKENS)
    segments = [(1, 30, 200), (0, 0, 1), (0, 1, 131), (1, 299, 300), (0, 131, 300)]
    pieces = prefill(make_batch(NARROW, sequences, segments, block_tokens=7), window, sinks)
    assert torch.equal(torch.cat([pieces[1], pieces[2], pieces[4]]), whole)


def test_a_window_past_the_context_and_a_sink_of_nothing_change_no_bit() -> None:
    sequences = [random_sequence(NARROW, torch.bfloat16, LENGTH, seed) for seed in (1, 2)]
    batch = make_batch(NARROW, sequences, [(0, LENGTH - 1, LENGTH), (1, 180, 200), (0, 100, 103)])
    nothing = torch.full((NARROW.heads,), -torch.inf)
    for call in (decode, prefill):
        plain = torch.cat(call(batch, None, None))
        assert torch.equal(torch.cat(call(batch, LENGTH, None)), plain)
        assert torch.equal(torch.cat(call(batch, None, nothing)), plain)
        assert not torch.equal(torch.cat(call(batch, LENGTH - 1, None)), plain)
        assert torch.equal(torch.cat(call(batch, 1, nothing))[0], batch_value(batch))


def batch_value(batch: Batch) -> Tensor:
    """What the first segment's last row sees through a window of 1: its own value, of each head."""
    position = batch.queries.contexts[0] - 1
    block = int(batch.queries.block_tables[batch.queries.table_rows[0], position // batch.pages[1].shape[1]])
    return batch.pages[1][block, position % batch.pages[1].shape[1]].expand(NARROW.heads, -1)


@pytest.mark.parametrize("window", [1, 63, 100])
def test_what_lies_before_the_window_is_not_read(window: int) -> None:
    sequences = [random_sequence(NARROW, torch.float32, LENGTH, seed) for seed in (1, 2)]
    segments = [(0, LENGTH - 1, LENGTH), (1, 250, 290), (1, 280, 283), (0, 380, 385)]
    batch = make_batch(NARROW, sequences, segments, block_tokens=4)
    for call in (decode, prefill):
        assert torch.equal(torch.cat(call(forget(batch, window), window)), torch.cat(call(batch, window)))


def test_a_nan_leaves_the_rows_whose_window_is_past_it() -> None:
    sequences = [random_sequence(NARROW, torch.bfloat16, 90, seed=1)]
    clean = prefill(make_batch(NARROW, sequences, [(0, 60, 90)]), 9)[0]
    sequences[0].cached[70, 1] = torch.nan
    got = prefill(make_batch(NARROW, sequences, [(0, 60, 90)]), 9)[0]
    assert got[10:19].isnan().all()
    assert torch.equal(got[:10], clean[:10])
    assert torch.equal(got[19:], clean[19:])


def test_cost_does_not_grow_with_the_context_past_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "SPLITS", Splits(512, 16, 1024))
    monkeypatch.setattr(flash, "WORKSPACE_TOKENS", 16_384)
    shape = Shape(kv_heads=1, group=1, width=8, window=128)
    for context in (129, 512, 513, 640, 9000, 262_144):
        queries = make_queries([(1, context)] * 3, torch.arange(3), torch.zeros(3, 1, dtype=torch.int32))
        made = split.plan(queries, shape, 3)
        touched = len({split_of(position) for position in (context - 128, context - 1)})
        assert int(made.firsts[-1]) == 3 * touched
        assert made.items[: 3 * touched, 2].tolist() == 3 * [
            *range(split_of(context - 128), split_of(context - 1) + 1)
        ]
        assert 3 * touched <= sum(part.capacity for part in made.rounds) <= 6
        chunk = make_queries([(100, context)], torch.arange(1), torch.zeros(1, 1, dtype=torch.int32))
        (part,) = flash.rounds(chunk, 128)
        assert part.num_tokens <= 100 + 128 + 2 * flash.TOKENS


def split_of(position: int) -> int:
    """Of splits of 512 tokens, and of 1024 from the sixteenth on."""
    return position // 512 if position < 8192 else 8 + position // 1024


def test_bounds_change_nothing_and_the_device_has_the_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a captured graph; then in one round for each tile of rows."""
    sequences = [random_sequence(NARROW, torch.bfloat16, LENGTH, seed) for seed in (1, 2)]
    batch = make_batch(NARROW, sequences, [(0, LENGTH - 1, LENGTH), (1, 199, 200), (1, 160, 200), (1, 0, 0)])
    expected = torch.cat(decode(batch, 100))
    assert expected.isfinite().all()
    queries = batch.queries
    longer = [(length, max(900, context)) for length, context in zip([1, 1, 40, 0], queries.contexts, strict=True)]
    bounds = make_queries(longer, queries.table_rows, queries.block_tables)
    lists = dataclasses.replace(queries, query_lengths=bounds.query_lengths, contexts=bounds.contexts)
    for total in (0, sum(queries.contexts)):
        bounded = dataclasses.replace(batch, queries=dataclasses.replace(lists, total_context=total))
        assert torch.equal(torch.cat(decode(bounded, 100)), expected)
    monkeypatch.setattr(split, "PARTIAL_BYTES", 1)
    for lengths in (queries, lists):
        rounded = dataclasses.replace(batch, queries=dataclasses.replace(lengths))
        assert torch.equal(torch.cat(decode(rounded, 100)), expected)


@pytest.mark.parametrize("fp8", [False, True])
def test_the_sizes_of_a_shard_of_gpt_oss(fp8: bool) -> None:
    form = Form(heads=8, kv_heads=1, width=64)
    sequence = random_sequence(form, torch.bfloat16, 300, seed=8)
    sequence = Sequence(sequence.q * 0.3, sequence.cached)  # as they are, each would attend to one token alone
    segments, sinks = [(0, 299, 300), (0, 240, 268), (0, 0, 1)], torch.linspace(-2, 5, 8)
    batch = make_batch(form, [sequence], segments, block_tokens=32, fp8=fp8)
    expected = segments_near(form, [sequence], segments, fp8=fp8, window=128, sinks=sinks)
    assert_near(torch.cat(decode(batch, 128, sinks)), expected)
    assert_near(torch.cat(prefill(batch, 128, sinks)), expected)
