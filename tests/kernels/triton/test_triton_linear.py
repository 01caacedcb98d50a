"""Dense products in Triton's interpreter, against the reference on the same, dequantised, weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.formats import fp8
from cierzo.kernels.formats.definition import as_tensor
from cierzo.kernels.formats.device import DeviceMatrix, dequantise, quantise
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.pack import pack
from cierzo.kernels.ref import attention as attention_ref
from cierzo.kernels.ref import linear as ref
from cierzo.kernels.triton import heuristics, linear
from cierzo.kernels.triton.launch import POINTER
from cierzo.kernels.triton.product import Weights

FORMATS = ["plain", "fp8", "fp8 woven", "nvfp4", "mxfp4"]
DESCRIBED = ["plain", "fp8", "fp8 woven"]  # what tensor descriptors read
# Relative to the largest output. fp32: another order of addition. bf16: the result is rounded once, by up to 2^-8,
# and so is what lies between the two products of an MLP; weights widen to bf16 without rounding in every format.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


def rows(tokens: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Strided, aligned to 16 bytes, beside NaN."""
    wide = torch.full((tokens, width + 16), torch.nan)
    wide[:, :width] = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return wide.to(dtype)[:, :width]


def weights(format: str, *shape: int, dtype: torch.dtype, seed: int = 1) -> Matrix:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if format == "plain":
        return values
    return fp8.weave(quantise(values, "fp8")) if format == "fp8 woven" else quantise(values, format)


def close(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    bound = TOLERANCE[dtype] * max(expected.abs().max().item(), 1e-30) if expected.numel() else 0.0
    torch.testing.assert_close(result.float(), expected.float(), rtol=0.0, atol=bound)


def wide_of(matrix: Matrix) -> Tensor:
    """Not rounded to bf16: kernels do not."""
    return dequantise(matrix) if isinstance(matrix, DeviceMatrix) else as_tensor(matrix).float()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("tokens", "outputs", "k"), [(0, 5, 32), (1, 1, 32), (2, 131, 96), (67, 40, 160)])
def test_linear_is_the_references(tokens: int, outputs: int, k: int, format: str, dtype: torch.dtype) -> None:
    x, weight = rows(tokens, k, dtype), weights(format, outputs, k, dtype=dtype)
    result = linear.linear(x, weight)
    assert result.dtype == dtype
    close(result, ref.linear(x.float(), wide_of(weight)), dtype)
    logits = linear.lm_head(x, weight)
    assert logits.dtype == torch.float32
    close(logits, ref.lm_head(x.float(), wide_of(weight)), torch.float32)  # not rounded to bf16


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_odd_sizes(dtype: torch.dtype) -> None:
    """Columns that are no whole 16 bytes, in the formats that allow them."""
    for k in (1, 7, 77):
        x = torch.randn(3, k, generator=torch.Generator().manual_seed(k)).to(dtype)
        for format in ("plain", "fp8"):
            weight = weights(format, 9, k, dtype=dtype)
            close(linear.linear(x, weight), ref.linear(x.float(), wide_of(weight)), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block", [(150, 320), (1, 320), (75, 320), (128, 128), (50, 64)])
def test_scales_of_blocks(block: tuple[int, int], dtype: torch.dtype) -> None:
    values = torch.randn(150, 320, generator=torch.Generator().manual_seed(3))
    values *= 10.0 ** torch.arange(-2, 3).repeat_interleave(64)  # so that a block's scale matters
    weight, x = quantise(values, "fp8", dtype, block), rows(3, 320, dtype)
    close(linear.linear(x, weight), ref.linear(x.float(), wide_of(weight)), dtype)


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_alone_and_in_company(format: str) -> None:
    for dtype in TOLERANCE:
        x, weight = rows(70, 96, dtype), weights(format, 40, 96, dtype=dtype)
        together = linear.linear(x, weight)
        assert torch.equal(together, linear.linear(x, weight))
        for row in (0, 1, 63, 64, 69):
            assert torch.equal(linear.linear(x[row : row + 1], weight)[0], together[row])
        assert torch.equal(linear.linear(x[60:], weight), together[60:])


# 4-bit weights in bf16 alone: how they widen does not depend on x, and fp32's small tiles take many steps.
@pytest.mark.parametrize(
    ("format", "dtype"),
    [*((format, torch.bfloat16) for format in FORMATS), ("plain", torch.float32), ("fp8", torch.float32)],
    ids=str,
)
def test_narrow_outputs_are_a_sum_of_parts_in_order(
    format: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whether each part is a program of its own (few tokens) or not; the last has fewer columns."""
    monkeypatch.setattr(heuristics, "APART_TOKENS", 2)
    tokens, k = 3, 1088
    x, weight = rows(tokens, k, dtype), weights(format, 70, k, dtype=dtype)
    known = Weights.of("linear", weight)
    wide = heuristics.tile(known, POINTER[dtype], paired=False)
    chosen, cut = heuristics.narrow(known, wide, tokens)
    assert cut.count >= 2
    assert not cut.apart
    assert k % cut.k
    results = linear.linear(x, weight), linear.lm_head(x, weight)
    for few in (slice(0, 1), slice(0, heuristics.APART_TOKENS), slice(tokens - 1, tokens)):
        assert heuristics.narrow(known, wide, few.stop - few.start)[1].apart
        assert torch.equal(linear.linear(x[few], weight), results[0][few])
        assert torch.equal(linear.lm_head(x[few], weight), results[1][few])
    close(results[1], ref.lm_head(x.float(), wide_of(weight)), torch.float32)
    if format == "plain":
        monkeypatch.setattr(heuristics, "LEAST_COLUMNS", k)  # from here on, one chain
        monkeypatch.setattr(heuristics, "TILES", dict.fromkeys(heuristics.TILES, chosen))
        total = torch.zeros(1, 70)
        for start in range(0, k, cut.k):
            part = slice(start, start + cut.k)
            total += linear.lm_head(x[:1, part].clone(), weight[:, part].clone())
        assert torch.equal(total, results[1][:1])
        assert not torch.equal(linear.lm_head(x[:1], weight), total)  # else it would show nothing


def test_parts_depend_on_the_weights_and_the_card_alone() -> None:
    for format in ("bf16", "fp8", "fp8 woven", "nvfp4"):
        # MLA's latents, the products behind and before attention, and a router.
        for outputs, k, parts in ((1344, 4096, 6), (4096, 4096, 2), (4096, 1024, 2), (128, 4096, 8)):
            matrix = Weights.stored(format, outputs, k)
            wide = heuristics.tile(matrix, "*bf16", paired=False)
            for tokens in (1, 128, 129, 100_000):
                chosen, cut = heuristics.narrow(matrix, wide, tokens)
                assert (cut.count, cut.apart) == (parts, tokens <= 128)
                eight = format == "nvfp4" and not cut.apart
                assert chosen == (replace(wide, num_warps=8) if eight else replace(wide, block_n=64))
                assert (parts - 1) * cut.k < k <= parts * cut.k
                assert cut.k % 128 == 0
            assert parts * -(-outputs // 64) >= 120 or parts == k // 512
            assert heuristics.narrow(matrix, wide, 1, multiprocessors=64)[1].count < parts or parts == k // 512
        for outputs, k in ((8192, 4096), (131_072, 4096), (1344, 1023)):
            other = Weights.stored(format, outputs, k)
            wide = heuristics.tile(other, "*bf16", paired=False)
            few = replace(wide, block_n=64) if outputs < 131_072 else wide
            assert heuristics.narrow(other, wide, 1) == (few, heuristics.Parts(1, k))
            assert heuristics.narrow(other, wide, 65) == (wide, heuristics.Parts(1, k))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_gated_mlp(format: str, dtype: torch.dtype) -> None:
    gate_up, down = weights(format, 128, 96, dtype=dtype), weights(format, 96, 64, dtype=dtype, seed=2)
    for tokens in (0, 1, 5):
        x = rows(tokens, 96, dtype)
        result = linear.gated_mlp(x, gate_up, down)
        assert result.dtype == dtype
        close(result, ref.gated_mlp(x.float(), wide_of(gate_up), wide_of(down)), dtype)


@pytest.mark.parametrize("format", DESCRIBED)
def test_exchanged_operands_compute_the_same(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, gate_up = rows(3, 96, torch.bfloat16), weights(format, 128, 96, dtype=torch.bfloat16)
    down = weights(format, 96, 64, dtype=torch.bfloat16, seed=2)
    expected = ref.gated_mlp(x.float(), wide_of(gate_up), wide_of(down))
    exchanged = {name: replace(tile, tokens_on_m=not tile.tokens_on_m) for name, tile in heuristics.TILES.items()}
    monkeypatch.setattr(heuristics, "TILES", exchanged)
    close(linear.gated_mlp(x, gate_up, down), expected, torch.bfloat16)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("format", DESCRIBED)
@pytest.mark.parametrize(("tokens", "outputs", "k"), [(1, 1, 32), (2, 131, 96), (65, 40, 64)])
def test_descriptors_read_the_same(
    tokens: int, outputs: int, k: int, format: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: rows and columns past the end, gate and up, logits."""
    x, weight = rows(tokens, k, dtype), weights(format, outputs, k, dtype=dtype)
    gate_up, down = weights(format, 2 * 96, k, dtype=dtype), weights(format, k, 96, dtype=dtype, seed=2)

    def results() -> list[Tensor]:
        return [linear.linear(x, weight), linear.lm_head(x, weight), linear.gated_mlp(x, gate_up, down)]

    by_pointers = results()
    blocks = launched_blocks(monkeypatch)
    monkeypatch.setattr(heuristics, "DESCRIBED_TOKENS", tokens + 1)
    results()
    assert not any(blocks)
    monkeypatch.setattr(heuristics, "DESCRIBED_TOKENS", tokens)
    for one, other in zip(by_pointers, results(), strict=True):
        assert torch.equal(one, other)
    assert any(found == {"x_ptr", "codes_ptr"} for found in blocks)


@pytest.mark.parametrize("format", DESCRIBED)
@pytest.mark.parametrize("apart", [True, False])
def test_descriptors_read_the_same_parts(format: str, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = rows(2, 1088, torch.bfloat16), weights(format, 70, 1088, dtype=torch.bfloat16)
    monkeypatch.setattr(heuristics, "APART_TOKENS", 2 if apart else 1)
    by_pointers = linear.lm_head(x, weight)
    blocks = launched_blocks(monkeypatch)
    monkeypatch.setattr(heuristics, "DESCRIBED_TOKENS", 2)
    assert torch.equal(by_pointers, linear.lm_head(x, weight))
    assert blocks == [{"x_ptr", "codes_ptr"}, *([set()] if apart else [])]


def launched_blocks(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The arguments of each launch from now on that are descriptors."""
    found: list[set[str]] = []
    original = linear.launch

    def launch(configuration: Any, *arguments: Any, **named: Any) -> None:
        found.append(set(configuration.blocks))
        original(configuration, *arguments, **named)

    monkeypatch.setattr(linear, "launch", launch)
    return found


def test_what_a_descriptor_cannot_take_in_is_read_by_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = launched_blocks(monkeypatch)
    monkeypatch.setattr(heuristics, "DESCRIBED_TOKENS", 0)
    x, weight = torch.randn(3, 36), torch.randn(9, 36)
    close(linear.linear(x[:, :33], weight[:, :33]), ref.linear(x[:, :33], weight[:, :33]), torch.float32)
    assert blocks.pop() == {"x_ptr", "codes_ptr"}  # rows of 144 bytes
    x, weight = torch.randn(3, 33), torch.randn(9, 33)
    for one, other in ((x, weight), (torch.randn(3, 36)[:, :33], weight), (x, torch.randn(9, 36)[:, :33])):
        close(linear.linear(one, other), ref.linear(one, other), torch.float32)
        assert blocks.pop() == set()
    heads = torch.randn(2, 3, 64), torch.randn(3, 24, 64)
    close(linear.mla_unabsorb(*heads), attention_ref.mla_unabsorb(*heads), torch.float32)
    assert blocks.pop() == set()


def test_intermediates_may_exceed_fp16() -> None:
    x, gate_up = torch.full((1, 32), 100.0).bfloat16(), torch.full((64, 32), 1.0).bfloat16()
    result = linear.gated_mlp(x, gate_up, torch.full((32, 32), 0.5).bfloat16())
    assert torch.equal(result, torch.full((1, 32), 3200.0**2 * 16).bfloat16())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_products_of_heads(format: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(5)
    for tokens in (0, 1, 3):
        q = torch.randn(tokens, 4, 32 + 24, generator=random).to(dtype)[:, :3]
        w_uk_t = weights(format, 3, 40, 32, dtype=dtype)
        result = linear.mla_absorb(q, w_uk_t)
        assert result.shape == (tokens, 3, 64)
        close(result, attention_ref.mla_absorb(q.float(), wide_of(w_uk_t)), dtype)
        assert torch.equal(result[..., 40:], q[..., 32:])
        latents = torch.randn(tokens, 3, 64, generator=random).to(dtype)
        w_uv = weights(format, 3, 24, 64, dtype=dtype)
        result = linear.mla_unabsorb(latents, w_uv)
        close(result, attention_ref.mla_unabsorb(latents.float(), wide_of(w_uv)), dtype)


def test_a_plain_matrix_may_be_a_part_of_another() -> None:
    """W_UV of each head stands between the rows of W_UK."""
    both = torch.randn(3, 5 + 8, 64, generator=torch.Generator().manual_seed(0))
    latents = torch.randn(2, 3, 64)
    result = linear.mla_unabsorb(latents, both[:, 5:])
    close(result, attention_ref.mla_unabsorb(latents, both[:, 5:]), torch.float32)


def test_what_kernels_cannot_read_is_refused() -> None:
    x, weight = torch.zeros(2, 32), torch.zeros(8, 32)
    with pytest.raises(ArgumentError, match="linear: weights of format float32 are packed for a CPU"):
        linear.linear(x, pack(weight, "float32"))
    with pytest.raises(ArgumentError, match=r"linear: weights are .*, got torch.float32 with strides \[1, 8\]"):
        linear.linear(x, torch.zeros(32, 8).T)
    with pytest.raises(ArgumentError, match=r"linear: x has strides \[1, 2\]"):
        linear.linear(torch.zeros(32, 2).T, weight)
    with pytest.raises(ArgumentError, match="fp8 scales of 24 columns: kernels take multiples of 32, or all of k"):
        linear.linear(torch.zeros(2, 96), quantise(torch.ones(8, 96), "fp8", block=(8, 24)))
    with pytest.raises(ArgumentError, match="linear: x_ptr starts 4 bytes past a multiple of 16"):
        linear.linear(torch.zeros(2, 40)[:, 1:33], weight)
