"""Woven FP8 weights in Triton's interpreter: their order, how a kernel widens each code, tiles of every size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.formats import fp8
from cierzo.kernels.formats.device import DeviceFormatError, DeviceMatrix, dequantise, in_fp8, quantise, stack
from cierzo.kernels.ref import linear as ref
from cierzo.kernels.triton import heuristics, linear
from cierzo.kernels.triton.eight_bit import woven_values
from cierzo.kernels.triton.heuristics import SIZED, Tile
from cierzo.kernels.triton.launch import Configuration, kernel, launch
from cierzo.kernels.triton.product import Weights

CODES = torch.arange(256, dtype=torch.uint8)
NAN = CODES % 128 == 127
BF16 = torch.bfloat16


@kernel
def _widen(words_ptr, out_ptr):
    words = tl.load(words_ptr + tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :])
    found = woven_values(words.to(tl.uint32, bitcast=True), 4, 64).to(tl.float32)
    tl.store(out_ptr + tl.arange(0, 4)[:, None] * 64 + tl.arange(0, 64)[None, :], found)


def test_every_code_widens_exactly() -> None:
    """Subnormal ones too; those that stand for NaN become 480, as the next number of e4m3 would be."""
    codes, out = CODES.view(4, 64).view(fp8.E4M3), torch.empty(4, 64)
    matrix = fp8.weave(fp8.from_codes(torch.where(NAN, 0, CODES).view(fp8.E4M3).view(4, 64), torch.ones(1), BF16))
    place = fp8.weave(
        fp8.from_codes(torch.arange(64, dtype=torch.uint8).view(1, 64).view(fp8.E4M3), torch.ones(1), BF16)
    )
    order = place.codes[0, 0].view(torch.uint8).long()
    assert torch.equal(matrix.codes.view(torch.uint8)[0], torch.where(NAN, 0, CODES).view(4, 64)[:, order])
    woven = codes.view(torch.uint8)[:, order].contiguous().view(torch.int32)
    launch(Configuration(_widen, {"words_ptr": "*i32", "out_ptr": "*fp32"}, {}), (1,), words_ptr=woven, out_ptr=out)
    expected = torch.where(NAN.view(4, 64), torch.where(CODES < 128, 480.0, -480.0).view(4, 64), codes.float())
    assert torch.equal(out, expected)
    assert torch.equal(out.signbit(), expected.signbit())  # of zeros


def weights(*shape: int, block: tuple[int, int] | None = None) -> DeviceMatrix:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    values *= 2.0 ** (torch.arange(shape[-1]) // 128 % 3)
    return quantise(values, "fp8", BF16, block)


def test_the_order_is_that_of_the_mmas_operand() -> None:
    """Column 16j + 8h + 2c + p lies in place 16c + 4j + 2h + p; values stay."""
    for shape in ((3, 64), (2, 5, 192)):
        matrix = weights(*shape)
        woven = fp8.weave(matrix)
        assert (woven.woven, woven.layout, woven.shape) == (True, "fp8 woven", matrix.shape)
        assert torch.equal(dequantise(woven), dequantise(matrix))
        for column in range(64):
            j, h, c, p = column // 16, column // 8 % 2, column // 2 % 4, column % 2
            stored, natural = woven.codes.view(torch.uint8), matrix.codes.view(torch.uint8)
            assert torch.equal(stored[..., 16 * c + 4 * j + 2 * h + p :: 64], natural[..., column::64])
        assert fp8.weave(woven) is woven
    experts = [fp8.weave(weights(5, 64)), fp8.weave(weights(5, 64))]
    assert stack(experts, 2).woven
    assert torch.equal(dequantise(stack(experts, 2)[1]), dequantise(experts[1]))


def test_what_is_not_woven_stays_and_what_cannot_be_is_refused() -> None:
    for matrix in (weights(3, 96), in_fp8(weights(3, 64)), replace(weights(3, 64), dtype=torch.float32)):
        assert fp8.weave(matrix) is matrix
    for code in (0x7F, 0xFF):
        codes = torch.full((2, 64), code, dtype=torch.uint8).view(fp8.E4M3)
        with pytest.raises(DeviceFormatError, match="fp8: a code is NaN"):
            fp8.weave(fp8.from_codes(codes, torch.ones(1), BF16))
    with pytest.raises(DeviceFormatError, match="activations in fp8 meet codes in their natural order"):
        in_fp8(fp8.weave(weights(3, 64)))
    with pytest.raises(DeviceFormatError, match="matrices that are stacked must be alike"):
        stack([weights(3, 64), fp8.weave(weights(3, 64))], 2)
    with pytest.raises(ArgumentError, match="fp8 weights are woven for activations in bf16, got fp32"):
        linear.linear(torch.zeros(1, 64), fp8.weave(weights(3, 64)))


def rows(tokens: int, k: int) -> Tensor:
    return torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)).to(BF16)


def launched_tiles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Tokens and columns of each tile launched from now on, and its warps."""
    found: list[tuple[int, int, int]] = []
    original = linear.launch

    def launch(configuration: Any, *arguments: Any, **named: Any) -> None:
        get = configuration.constants.get
        if get("BLOCK_T"):
            found.append((get("BLOCK_T"), get("BLOCK_K"), configuration.num_warps))
        original(configuration, *arguments, **named)

    monkeypatch.setattr(linear, "launch", launch)
    return found


@pytest.mark.parametrize(("outputs", "block"), [(70, None), (70, (128, 128)), (200, (70, 256))])
def test_tiles_of_every_size_give_a_row_the_same_bits(
    outputs: int, block: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with parts of k, which few outputs have, and with k that is no multiple of a step."""
    monkeypatch.setattr(heuristics, "WIDTH_KEEPS_BITS", True)
    for weight in (fp8.weave(weights(outputs, 1088, block=block)), in_fp8(weights(outputs, 1088, block=block))):
        x, tiles = rows(130, 1088), launched_tiles(monkeypatch)
        whole = linear.lm_head(x, weight)
        for count in (1, 16, 17, 33, 64, 65, 128):
            assert torch.equal(linear.lm_head(x[:count], weight), whole[:count])
        assert {tokens for tokens, *_ in tiles} >= {16, 32, 128}
        if weight.woven:
            expected = ref.lm_head(x.float(), dequantise(weight))
            torch.testing.assert_close(whole, expected, rtol=0.0, atol=2e-6 * expected.abs().max().item())


def test_gate_and_up_in_tiles_of_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "WIDTH_KEEPS_BITS", True)
    gate_up, down = fp8.weave(weights(256, 192)), fp8.weave(weights(192, 128))
    x = rows(130, 192) / 16
    whole = linear.gated_mlp(x, gate_up, down)
    for count in (1, 16, 17, 33, 64):
        assert torch.equal(linear.gated_mlp(x[:count], gate_up, down), whole[:count])
    expected = ref.gated_mlp(x.float(), dequantise(gate_up), dequantise(down))
    torch.testing.assert_close(whole.float(), expected, rtol=0.0, atol=8e-3 * expected.abs().max().item())


@pytest.mark.parametrize(("kind", "paired"), SIZED, ids=str)
def test_tiles_of_a_row_are_of_one_family(kind: str, paired: bool) -> None:
    """Weights on M; where each step is a chain of its own, steps of one size; parts of k end between steps."""
    sizes = SIZED[kind, paired]
    few = [16, 32, *([] if "blocks" in kind else [64])]
    assert [one.block_t for one in sizes] == [*few, *([] if kind == "mxfp4" else [128])]
    assert not any(one.tokens_on_m for one in sizes)
    if "x fp8" in kind or "blocks" in kind:
        assert {one.block_k for one in sizes} == {128}
    assert all(heuristics.PART_COLUMNS % one.block_k == 0 for one in sizes)
    assert all(one.block_n * one.block_t // (32 * one.num_warps) <= 128 for one in sizes)


def test_the_number_of_tokens_chooses_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = Weights.stored("fp8 woven", 4096, 4096)
    monkeypatch.setattr(heuristics, "WIDTH_KEEPS_BITS", True)

    def chosen(tokens: int, **more: Any) -> Tile:
        return heuristics.tile(replace(matrix, **more), "*bf16", False, tokens)

    assert [chosen(tokens).block_t for tokens in (0, 16, 17, 32, 33, 64, 65, 9999)] == [
        16,
        16,
        32,
        32,
        64,
        64,
        128,
        128,
    ]
    assert (chosen(9999).block_k, chosen(9999, scale_block=(128, 128)).block_k) == (64, 128)
    monkeypatch.setattr(heuristics, "WIDTH_KEEPS_BITS", False)
    assert chosen(1) == chosen(9999)
    assert set(heuristics.thresholds()) >= {16, 32, 64, 128}


def test_a_woven_step_beyond_the_last_column_reads_nothing() -> None:
    """64 columns in a step of 128, whose second half would be the next row, or what lies behind the matrix."""
    weight, x = fp8.weave(weights(40, 64)), rows(3, 64)
    expected = ref.lm_head(x.float(), dequantise(weight))
    bound = 2e-6 * expected.abs().max().item()
    torch.testing.assert_close(linear.lm_head(x, weight), expected, rtol=0.0, atol=bound)
