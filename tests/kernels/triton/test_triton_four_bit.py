"""4-bit weights: their order in memory and in k, every code under every scale, tiles of every width."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import ptx
import pytest
import torch
import triton.language as tl
from torch import Tensor

from cierzo.kernels.formats import e2m1, four_bit, mxfp4, nvfp4
from cierzo.kernels.formats.device import DeviceFormatError, DeviceMatrix, dequantise, quantise, stack
from cierzo.kernels.triton import four_bit as kernels
from cierzo.kernels.triton import heuristics, linear
from cierzo.kernels.triton.launch import POINTER, Configuration, kernel, launch
from cierzo.kernels.triton.product import Weights

FORMATS = ("nvfp4", "mxfp4")
E4M3 = torch.float8_e4m3fn
STRETCH = four_bit.STRETCH


@kernel
def _widen(codes_ptr, scales_ptr, out_ptr, FORMAT: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows = tl.arange(0, N)[:, None]
    codes = tl.load(codes_ptr + rows * (K // 8) + tl.arange(0, K // 8)[None, :])
    scales = tl.load(scales_ptr + rows * (K // 32) + tl.arange(0, K // 32)[None, :])
    weights = kernels.weights_in_order(codes.to(tl.uint32, bitcast=True), scales, FORMAT, N, K)
    tl.store(out_ptr + rows * K + kernels.columns_in_order(K)[None, :], weights)


def widened(matrix: DeviceMatrix) -> Tensor:
    """Weights of a [n,k] matrix, n a power of two and k whole stretches, as a kernel has them in registers, put at
    their columns; but for the rows' multipliers."""
    n, k = matrix.shape
    out = torch.empty(n, k, dtype=torch.bfloat16)
    types = {"codes_ptr": "*i32", "scales_ptr": POINTER[matrix.scales.dtype], "out_ptr": "*bf16"}
    configuration = Configuration(_widen, types, {"FORMAT": matrix.format, "N": n, "K": k})
    launch(configuration, (1,), codes_ptr=matrix.codes, scales_ptr=matrix.scales, out_ptr=out)
    return out


def every_code(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Codes in pairs, uint8 [rows, columns / 2], in every column of a row another."""
    codes = torch.arange(columns, dtype=torch.uint8) % 16
    random = torch.Generator().manual_seed(seed)
    return e2m1.join(torch.stack([codes[torch.randperm(columns, generator=random)] for _ in range(rows)]))


def test_every_pair_of_codes_comes_back_from_every_place() -> None:
    """256 pairs in each of the four places of a word; rows that are filled up."""
    octets = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 4)
    shuffled = torch.stack([octets[(torch.arange(256) * (2 * place + 1)) % 256, place] for place in range(4)], 1)
    for some in (octets, shuffled, shuffled[:, :, None].expand(256, 4, 20).flatten(1)):
        words = four_bit.to_words(some)
        assert words.dtype == torch.int32
        assert words.shape == (256, four_bit.stretched(2 * some.shape[1]) // 8)
        assert torch.equal(four_bit.to_octets(words, 2 * some.shape[1]), some)
        assert not words[:, some.shape[1] // 4 :].any()


def test_the_assembly_finds_the_columns_of_a_word_in_order() -> None:
    """Every code in every place, among random others, under a scale of 2^126: as e2m1 has them."""
    octets = torch.randint(256, (4096, 64), generator=torch.Generator().manual_seed(0)).byte()
    words = four_bit.to_words(octets).numpy().view(np.uint32)
    found = ptx.run(kernels.PAIRS.value, [words, np.full_like(words, 0x7E807E80)], [np.dtype(np.uint32)] * 4, 1)
    pairs = torch.from_numpy(np.stack(found, -1).view(np.int16).copy()).view(torch.bfloat16).float()
    assert torch.equal(pairs.view(4096, 128), e2m1.widen(octets))


@pytest.mark.parametrize("seed", range(3))
def test_every_code_under_every_scale_of_nvfp4_is_exact_in_a_kernel(seed: int) -> None:
    """Row r has scale r in all of its groups, and each of its groups all codes."""
    octets = torch.cat([every_code(128, 16, seed + group) for group in range(8)], 1)
    scales = (torch.arange(128, dtype=torch.uint8) % 127).view(E4M3)  # no NaN, no negative one
    of_groups = scales.view(torch.uint8)[:, None].expand(128, 8).contiguous().view(E4M3)
    matrix = nvfp4.from_codes(octets, of_groups, torch.full((1,), 3.0), torch.bfloat16)
    wanted = e2m1.widen(octets) * scales.float()[:, None]
    assert torch.equal(widened(matrix).float() * 2.0**7, wanted)
    assert torch.equal(dequantise(matrix), wanted * 3.0)


def test_every_code_under_every_scale_of_mxfp4_is_exact_in_a_kernel() -> None:
    """Scales of a row from its largest down to 2^-126 of it; and rows whose largest is any."""
    octets = torch.cat([every_code(128, 32, group) for group in range(4)], 1)
    for low in range(0, 127, 3):
        scales = torch.tensor([[126 + 127, 127 + low, 127 + low + 1, 127 + low + 2]]).clamp_max(253)
        one = mxfp4.from_codes(octets, scales.byte().expand(128, 4), torch.bfloat16)
        wanted = e2m1.widen(octets).unflatten(1, (4, 32)).double() * 2.0 ** (scales.double() - 127)[..., None]
        assert one.row_scales is not None
        assert torch.equal(widened(one).double() * one.row_scales.double().T, wanted.flatten(1))
    tops = torch.arange(0, 254, 2)
    tops = torch.cat([tops, torch.tensor([254])]).byte()
    one = mxfp4.from_codes(octets, tops[:, None].expand(128, 4), torch.bfloat16)
    assert one.row_scales is not None
    assert one.row_scales.min() >= 2.0**-126  # no subnormal number, which a device might take for zero
    wanted = e2m1.widen(octets).double() * 2.0 ** (tops.double() - 127)[:, None]
    assert torch.equal(widened(one).double() * one.row_scales.double().T, wanted)
    finite = wanted.abs() < 2.0**128
    assert torch.equal(dequantise(one).double()[finite], wanted.float().double()[finite])


def test_a_group_of_zeros_has_no_scale_of_its_own() -> None:
    """Zero scales of NVFP4 make zeros, and no number on a GPU is zero; MXFP4's are as large as the row's."""
    octets = every_code(1, 32)
    matrix = nvfp4.from_codes(octets, torch.tensor([[0.0, 2.0]]).to(E4M3), torch.ones(1), torch.bfloat16)
    assert torch.equal(dequantise(matrix)[0, :16], torch.zeros(16))
    assert torch.equal(dequantise(matrix)[0, 16:], e2m1.widen(octets)[0, 16:] * 2)
    octets = torch.cat([torch.full((1, 16), 0x80, dtype=torch.uint8), every_code(1, 32)], 1)
    matrix = mxfp4.from_codes(octets, torch.tensor([[0, 250]], dtype=torch.uint8), torch.bfloat16)
    assert torch.equal(dequantise(matrix)[0, 32:], e2m1.widen(octets)[0, 32:] * 2.0**123)
    matrix = mxfp4.from_codes(octets[:, :16], torch.tensor([[0]], dtype=torch.uint8), torch.bfloat16)
    assert torch.equal(dequantise(matrix), torch.zeros(1, 32))


def test_scales_that_are_none_are_refused() -> None:
    octets = every_code(1, 64)
    for scale in (0x7F, 0x80, 0xB8, 0xFF):
        scales = torch.tensor([[0x38, 0x38, scale, 0x38]], dtype=torch.uint8).view(E4M3)
        with pytest.raises(DeviceFormatError, match=r"nvfp4: a scale is NaN or negative, must be in 0 \.\. 448"):
            nvfp4.from_codes(octets, scales, torch.ones(1), torch.bfloat16)
    with pytest.raises(DeviceFormatError, match="mxfp4: a scale is NaN"):
        mxfp4.from_codes(octets, torch.tensor([[127, 255]], dtype=torch.uint8), torch.bfloat16)
    mxfp4.from_codes(octets, torch.tensor([[200, 74]], dtype=torch.uint8), torch.bfloat16)
    with pytest.raises(DeviceFormatError, match=r"mxfp4: a row's scales differ by more than 2\^126"):
        mxfp4.from_codes(octets, torch.tensor([[200, 73]], dtype=torch.uint8), torch.bfloat16)


@pytest.mark.parametrize("format", FORMATS)
def test_a_product_picks_every_column_once(format: str) -> None:
    """Rows of the identity, over more than one stretch of k, the last of which is filled up."""
    k = 2 * STRETCH + 32
    weight = torch.randn(5, k, generator=torch.Generator().manual_seed(4))
    matrix = quantise(weight, format, torch.bfloat16)
    found = linear.lm_head(torch.eye(k).bfloat16(), matrix)
    torch.testing.assert_close(
        found.T, dequantise(matrix), rtol=2**-22, atol=0.0
    )  # fp32 times the row's multiplier


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("paired", [False, True])
def test_tiles_of_every_width_have_the_same_bits(format: str, paired: bool) -> None:
    random = torch.Generator().manual_seed(5)
    x = torch.randn(130, 2 * STRETCH, generator=random).bfloat16()
    matrix, down = (
        quantise(torch.randn(rows, 2 * STRETCH, generator=random), format, torch.bfloat16)
        for rows in (4 * STRETCH if paired else 200, 2 * STRETCH)
    )

    def run(rows: Tensor) -> Tensor:
        return linear.gated_mlp(rows, matrix, down) if paired else linear.lm_head(rows, matrix)

    sizes = heuristics.sizes(Weights.of("test", matrix), "*bf16", paired)
    assert [one.block_t for one in sizes] == [16, 32, 64, *([128] if format == "nvfp4" else [])]
    deep = replace(sizes[0], block_n=sizes[0].block_n // 2, block_k=2 * sizes[0].block_k)
    together = run(x)
    for one in (*sizes, deep):
        with heuristics.forced(one):
            assert torch.equal(run(x), together)
    for row in (0, 15, 16, 129):
        assert torch.equal(run(x[row : row + 1])[0], together[row])


def test_the_number_of_rows_chooses_the_width() -> None:
    weights = Weights.stored("nvfp4", 4096, 4096)
    found = {
        tokens: heuristics.tile(weights, "*bf16", False, tokens).block_t for tokens in (0, 16, 17, 64, 65, 9999)
    }
    assert found == {0: 16, 16: 16, 17: 32, 64: 64, 65: 128, 9999: 128}


def test_experts_so_few_that_the_card_would_idle_have_narrow_deep_tiles() -> None:
    """A token's four experts and the shared one: 160 programs of gate and up on 132 multiprocessors become 320."""
    weights = Weights.stored("nvfp4", 4096, 4096)
    chosen = heuristics.tile(weights, "*bf16", True, 1)
    alone = heuristics.spread(chosen, weights, 2048, 5, 132)
    assert (alone.block_n, alone.block_k) == (32, 256)
    assert heuristics.spread(chosen, weights, 2048, 17, 132) == chosen
    odd = Weights.stored("nvfp4", 4096, 4096 + 128)
    assert heuristics.spread(chosen, odd, 2048, 5, 132) == chosen
    assert heuristics.spread(chosen, Weights.stored("fp8", 4096, 4096), 2048, 5, 132) == chosen


@pytest.mark.parametrize("format", FORMATS)
def test_experts_are_stacked_one_at_a_time(format: str) -> None:
    """While one is made, the one before it is kept, and no other."""
    weight = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(6))
    alive, most = weakref.WeakSet[Tensor](), list[int]()

    def made() -> Iterator[DeviceMatrix]:
        for one in weight:
            matrix = quantise(one, format)
            alive.add(matrix.codes)
            yield matrix
            most.append(len(alive))
            del matrix

    whole = stack(made(), 3)
    assert whole.shape == (3, 4, 64)
    assert torch.equal(dequantise(whole), dequantise(quantise(weight, format)))
    assert len(most) == 3
    assert max(most) <= 2
