"""Activations in FP8, in Triton's interpreter: rows into codes, bit for bit; products of codes, as in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.formats import fp8
from cierzo.kernels.formats.activations import QuantisedRows, quantise_rows
from cierzo.kernels.formats.device import (
    DeviceFormatError,
    DeviceMatrix,
    dequantise,
    in_fp8,
    quantise,
    stack,
)
from cierzo.kernels.ops import linear as door
from cierzo.kernels.ref import linear as ref
from cierzo.kernels.ref import moe as moe_ref
from cierzo.kernels.ref import norm as norm_ref
from cierzo.kernels.triton import activations, heuristics, linear, moe, norm
from cierzo.kernels.triton.product import Weights

DTYPES = [torch.float32, torch.bfloat16]
STATIC = [None, 0.0625]
# Of products of the same codes, relative to the largest: another order of addition; bf16 rounds the result once.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
# Of an MLP: the last bit of a value between both products turns the rounding of some codes, by up to a sixteenth.
TOLERANCE_MLP = {torch.float32: 6e-3, torch.bfloat16: 3e-2}


def scale_of(static: float | None, experts: int = 1) -> Tensor | None:
    return None if static is None else torch.full((experts,), static)


def hostile(dtype: torch.dtype, width: int = 200) -> Tensor:
    """Strided rows, beside NaN: zeros, ties, tiny and large values, infinities, NaN."""
    random = torch.Generator().manual_seed(width)
    wide = torch.full((10, width + 16), torch.nan)
    x = wide[:, :width]
    x[:] = torch.randn(10, width, generator=random)
    x[0] = 0.0
    x[1] = torch.arange(width) * 0.5 * 0.0625  # halves of codes' steps, under the static scale
    x[1, 0] = 448 * 0.0625  # and under its own, which is the same
    x[2] *= 1e-36
    x[3] *= 1e30
    x[4, 3], x[5, 4], x[5, 5], x[6, 7] = torch.inf, -torch.inf, torch.inf, torch.nan
    x[7] *= 2.0 ** torch.arange(-20, width - 20).clamp(max=20)
    x[8, 1:] = 0.0
    return wide.to(dtype)[:, :width]


def same(got: QuantisedRows, wanted: QuantisedRows) -> None:
    """Bit for bit; any NaN is like any other."""
    assert got.codes.dtype == wanted.codes.dtype == torch.float8_e4m3fn
    assert got.dtype == wanted.dtype
    nan = wanted.codes.float().isnan()
    assert torch.equal(got.codes.float().isnan(), nan)
    codes = (rows.codes.view(torch.uint8).masked_fill(nan, 0) for rows in (got, wanted))
    assert torch.equal(*codes)
    assert torch.equal(got.scales, wanted.scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("static", STATIC)
def test_rows_become_the_definitions_codes(static: float | None, dtype: torch.dtype) -> None:
    for width in (200, 1, 37):
        x = hostile(dtype, width=200)[:, :width]
        same(activations.quantise_rows(x, scale_of(static)), quantise_rows(x, scale_of(static)))
        one = activations.quantise_rows(x[7:8], scale_of(static))
        assert torch.equal(one.codes.float(), quantise_rows(x, scale_of(static)).codes[7:8].float())
    assert activations.quantise_rows(torch.empty(0, 8, dtype=dtype), scale_of(static)).shape == (0, 8)


def test_the_definition_is_division_clamp_and_rounding_to_even() -> None:
    """Of the published formula, in float64, for every value halfway between two codes and those next to it."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([codes, halves, halves * (1 + 2**-20), halves * (1 - 2**-20), codes * 2 + 448])
    scale = torch.tensor([0.75])
    rows = quantise_rows((near.double() * 0.75).float()[None], scale)
    even = torch.where(torch.arange(126) % 2 == 0, codes[:-1], codes[1:])  # of two neighbours
    assert torch.equal(rows.codes[0, 127 : 127 + 126].float(), even)
    quotients = ((near.double() * 0.75).float().double() / 0.75).clamp(-448, 448)
    distance = (rows.codes[0].double() - quotients).abs()
    nearest = (codes.double() - quotients[:, None]).abs().amin(1)
    assert torch.equal(distance, nearest)
    own = quantise_rows(torch.tensor([[0.0, 7.0, -14.0]]), None)
    assert own.scales.tolist() == [14.0 / 448]
    assert own.codes.float().tolist() == [[0.0, 224.0, -448.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("static", STATIC)
def test_a_norm_that_writes_codes_has_the_bits_of_both_in_turn(static: float | None, dtype: torch.dtype) -> None:
    scale, x = scale_of(static), hostile(dtype)
    weight = torch.randn(200, generator=torch.Generator().manual_seed(0)).to(dtype)
    same(
        norm.rms_norm_fp8(x, weight, 1e-5, scale),
        activations.quantise_rows(norm.rms_norm(x, weight, 1e-5), scale),
    )
    residuals = [torch.ones(10, 200).to(dtype) for _ in range(2)]
    got = norm.add_rms_norm_fp8(x, residuals[0], weight, 1e-5, scale)
    wanted = norm.add_rms_norm(x, residuals[1], weight, 1e-5)
    same(got, activations.quantise_rows(wanted, scale))
    assert torch.equal(residuals[0].nan_to_num(), residuals[1].nan_to_num())
    definition = norm_ref.rms_norm_fp8(x[7:], weight, 1e-5, scale)  # another sum of squares: a code may turn
    share = (definition.codes.float() != norm.rms_norm_fp8(x[7:], weight, 1e-5, scale).codes.float()).float().mean()
    assert share < 0.05


def weights(
    n: int, k: int, static: float | None, block: tuple[int, int] | None = None, dtype: torch.dtype = torch.bfloat16
) -> DeviceMatrix:
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    values *= 2.0 ** (torch.arange(k) // 128 % 3)  # so that a block's scale matters
    return in_fp8(quantise(values, "fp8", dtype, block), scale_of(static))


def close(result: Tensor, expected: Tensor, tolerance: float) -> None:
    bound = tolerance * expected.float().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(result.float(), expected.float(), rtol=0.0, atol=bound)


def exactly(x: Tensor, weight: DeviceMatrix) -> Tensor:
    """q = e4m3(clamp(x / scale)); y = (q . codes) * scale * weight scale: in float64."""
    rows = quantise_rows(x, weight.activation_scales)
    return (rows.codes.double() * rows.scales.double()[:, None]) @ dequantise(weight).double().T


# Rows of several tiles in bf16 alone: they are slow, and a tile's codes are the same whatever they were made of.
@pytest.mark.parametrize(("tokens", "dtype"), [*product((0, 1, 2), DTYPES), (130, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("static", STATIC)
@pytest.mark.parametrize("block", [None, (131, 512), (128, 128), (1, 256)])
def test_products_of_codes(
    tokens: int, block: tuple[int, int] | None, static: float | None, dtype: torch.dtype
) -> None:
    x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    weight = weights(131, 512, static, block, dtype)
    expected = exactly(x, weight)
    close(ref.lm_head(x.float(), replace(weight, dtype=torch.float32)), expected, TOLERANCE[torch.float32])
    close(linear.lm_head(x, weight), expected, TOLERANCE[torch.float32])
    result = linear.linear(x, weight)
    assert result.dtype == dtype
    close(result, expected, TOLERANCE[dtype])
    assert torch.equal(linear.linear(activations.quantise_rows(x, scale_of(static)), weight), result)


@pytest.mark.parametrize("static", STATIC)
@pytest.mark.parametrize("k", [1, 77, 160, 384])
def test_odd_sizes(k: int, static: float | None) -> None:
    """Columns that are no whole step of a tile, nor 16 bytes."""
    x, weight = torch.randn(3, k, generator=torch.Generator().manual_seed(k)), weights(9, k, static)
    weight = replace(weight, dtype=torch.float32)
    close(linear.linear(x, weight), exactly(x, weight), TOLERANCE[torch.float32])


@pytest.mark.parametrize("static", STATIC)
def test_a_row_has_the_same_bits_alone_and_in_company(static: float | None) -> None:
    """A row of NaN and one of huge values beside it, too."""
    x = torch.randn(140, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[5], x[6] = torch.nan, 1e30
    weight = weights(40, 256, static)
    together = linear.linear(x, weight)
    assert together[5].isnan().all()
    for row in (0, 6, 64, 127, 128, 139):
        assert torch.equal(linear.linear(x[row : row + 1], weight)[0], together[row])
    assert torch.equal(linear.linear(x[100:].clone(), weight), together[100:])


def test_narrow_outputs_and_descriptors_keep_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of k in programs of their own or in one, read by pointers or through descriptors."""
    x, weight = hostile(torch.bfloat16, 1152)[7:9], weights(70, 1152, None)
    known = Weights.of("linear", weight)
    monkeypatch.setattr(heuristics, "APART_TOKENS", 2)
    assert heuristics.narrow(known, heuristics.tile(known, "*fp8e4nv", paired=False), 2)[1].apart
    expected = linear.linear(x, weight)
    for apart, described in ((1, None), (2, 0), (1, 0)):
        monkeypatch.setattr(heuristics, "APART_TOKENS", apart)
        monkeypatch.setattr(heuristics, "DESCRIBED_TOKENS", described)
        assert torch.equal(linear.linear(x, weight), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("static", STATIC)
def test_gated_mlp(static: float | None, dtype: torch.dtype) -> None:
    gate_up, down = weights(128, 96, static, dtype=dtype), weights(96, 64, static, dtype=dtype)
    for tokens in (0, 1, 131):
        x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(tokens)).to(dtype) / 10
        result = linear.gated_mlp(x, gate_up, down)
        assert result.dtype == dtype
        inner = torch.cat([exactly(x, gate_up)[:, :64], exactly(x, gate_up)[:, 64:]], 1)
        between = (functional.silu(inner[:, :64]) * inner[:, 64:]).float()
        close(result, exactly(between, down), TOLERANCE_MLP[dtype])
        as_fp32 = [replace(matrix, dtype=torch.float32) for matrix in (gate_up, down)]
        close(ref.gated_mlp(x.float(), *as_fp32), exactly(between, down), TOLERANCE_MLP[torch.float32])
        assert torch.equal(result[-1:], linear.gated_mlp(x[-1:], gate_up, down))


def test_a_static_scale_between_the_products_is_the_downs() -> None:
    """Values beyond it saturate, which no other scale would have them do."""
    x = torch.full((1, 32), 4.0)
    ones, one = torch.ones(64, 32).to(torch.float8_e4m3fn), torch.ones(1)
    gate_up = in_fp8(fp8.from_codes(ones, one, torch.float32), one)
    down = in_fp8(fp8.from_codes(torch.eye(32).to(torch.float8_e4m3fn), one, torch.float32), 2 * one)
    assert torch.equal(linear.gated_mlp(x, gate_up, down), torch.full((1, 32), 2.0 * 448))
    assert torch.equal(ref.gated_mlp(x, gate_up, down), torch.full((1, 32), 2.0 * 448))


D, F, E = 160, 64, 5


def experts(static: bool, dtype: torch.dtype, poisoned: tuple[int, ...] = ()) -> list[DeviceMatrix]:
    """gate_up, down and the shared expert's, each expert with a scale of its own; what is poisoned is NaN."""
    random = torch.Generator().manual_seed(1)
    found = []
    for shape in ((E, 2 * F, D), (E, D, F), (2 * F, D), (D, F)):
        matrix = quantise(torch.randn(*shape, generator=random) / 8, "fp8", dtype)
        count = shape[0] if len(shape) == 3 else 1
        scales = 2.0 ** -(torch.arange(count) + 5) * (1.5 if len(shape) == 3 else 1) if static else None
        made = in_fp8(matrix, scales)
        for expert in poisoned if len(shape) == 3 else ():
            made.codes[expert].view(torch.uint8).fill_(0x7F)
            made.scales[expert] = torch.nan
            if made.activation_scales is not None:
                made.activation_scales[expert] = torch.nan
        found.append(made)
    return found


def mixed(x: Tensor, ids: Tensor, shares: Tensor, matrices: list[DeviceMatrix], shared: bool) -> Tensor:
    order, starts = moe_ref.group_by_expert(ids, E)
    return moe.expert_mlp(x, *matrices[:2], shares, order, starts, *(matrices[2:] if shared else (None, None)))


@pytest.mark.parametrize(
    ("tokens", "slots", "shared", "dtype"),
    [
        *((*sizes, dtype) for sizes in ((0, 2, True), (1, 3, False), (2, 1, True)) for dtype in DTYPES),
        (150, 3, True, torch.bfloat16),  # several tiles
    ],
    ids=str,
)
@pytest.mark.parametrize("static", [True, False])
def test_experts(tokens: int, slots: int, shared: bool, static: bool, dtype: torch.dtype) -> None:
    """By hand, expert by expert, in float64; and the reference in fp32."""
    random = torch.Generator().manual_seed(tokens)
    wide = torch.randn(tokens, D + 16, generator=random).to(dtype)
    x, shares = wide[:, :D], torch.rand(tokens, slots, generator=random)
    ids = torch.stack(
        [torch.randperm(3, generator=random)[:slots] for _ in range(tokens)] or [torch.zeros(0, slots)]
    )
    ids = torch.tensor([0, 2, 3])[ids.long()].reshape(tokens, slots)
    matrices = experts(static, dtype, poisoned=(1, 4))
    result = mixed(x, ids, shares, matrices, shared)
    assert result.dtype == dtype
    expected = torch.zeros(tokens, D, dtype=torch.float64)
    for token in range(tokens):
        for slot in range(slots):
            expert = int(ids[token, slot])
            one = _mlp(x[token : token + 1], matrices[0][expert], matrices[1][expert])
            expected[token] += one[0] * shares[token, slot].double()
        if shared:
            expected[token] += _mlp(x[token : token + 1], matrices[2], matrices[3])[0]
    close(result, expected, TOLERANCE_MLP[dtype])
    order, starts = moe_ref.group_by_expert(ids, E)
    as_fp32 = [replace(matrix, dtype=torch.float32) for matrix in matrices]
    defined = moe_ref.expert_mlp(
        x.float(), *as_fp32[:2], shares, order, starts, *(as_fp32[2:] if shared else (None, None))
    )
    close(defined, expected, TOLERANCE_MLP[torch.float32])


def _mlp(x: Tensor, gate_up: DeviceMatrix, down: DeviceMatrix) -> Tensor:
    both = exactly(x, gate_up)
    width = both.shape[1] // 2
    return exactly((functional.silu(both[:, :width]) * both[:, width:]).float(), down)


@pytest.mark.parametrize("static", [True, False])
def test_a_token_has_the_same_bits_alone_and_in_company(static: bool) -> None:
    random = torch.Generator().manual_seed(3)
    x, shares = torch.randn(140, D, generator=random).bfloat16(), torch.rand(140, 2, generator=random)
    ids = torch.stack([torch.randperm(E, generator=random)[:2] for _ in range(140)])
    matrices = experts(static, torch.bfloat16)
    together = mixed(x, ids, shares, matrices, True)
    for row in (0, 70, 139):
        one = slice(row, row + 1)
        alone = mixed(x[one].clone(), ids[one], shares[one].clone(), matrices, True)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("static", [True, False])
def test_experts_read_codes_through_descriptors(static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of x too: its rows lie in the order of the pairs."""
    matrices, x = experts(static, torch.bfloat16), hostile(torch.bfloat16)[7:, :D]
    ids, shares = torch.tensor([[0, 2], [2, 1], [1, 0]]), torch.full((3, 2), 0.5)
    expected = mixed(x, ids, shares, matrices, shared=True)
    found: list[set[str]] = []
    original = moe.launch

    def launch(configuration: Any, *arguments: Any, **named: Any) -> None:
        found.append(set(configuration.blocks))
        original(configuration, *arguments, **named)

    monkeypatch.setattr(moe, "launch", launch)
    monkeypatch.setattr(heuristics, "DESCRIBED_TOKENS", 0)
    assert torch.equal(mixed(x, ids, shares, matrices, shared=True), expected)
    both = {"codes_ptr", "shared_codes_ptr"}
    assert found == [both | {"x_ptr"}, both | {"inner_ptr"}]


def test_a_shared_expert_of_its_own_kind() -> None:
    """Activations in 16 bits, or by row beside static ones: launches of its own."""
    x, ids, shares = torch.randn(5, D).bfloat16(), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    routed = experts(True, torch.bfloat16)
    for other in (experts(False, torch.bfloat16), [replace(m, activations="plain") for m in routed]):
        result = mixed(x, ids, shares, [*routed[:2], *other[2:]], True)
        apart = mixed(x, ids, shares, routed, False).double() + linear.gated_mlp(x, other[2], other[3]).double()
        close(result, apart, 1e-2)  # both parts and the sum are rounded to bf16, each by up to 2^-8 of itself


def test_what_cannot_be_is_refused() -> None:
    weight = weights(8, 32, None)
    heads = in_fp8(quantise(torch.ones(2, 8, 32), "fp8", torch.bfloat16))
    with pytest.raises(ArgumentError, match="mla_absorb: heads are multiplied in 16 bits, the matrix takes FP8"):
        linear.mla_absorb(torch.zeros(1, 2, 40).bfloat16(), heads)
    with pytest.raises(ArgumentError, match="linear: x is quantised, and the weights take it as it is"):
        door.linear(quantise_rows(torch.zeros(1, 32).bfloat16(), None), torch.zeros(8, 32).bfloat16())
    with pytest.raises(ArgumentError, match="fp8 scales of 64 columns: kernels take multiples of 128, or all of k"):
        linear.linear(torch.zeros(2, 256), replace(weights(8, 256, None, (8, 64)), dtype=torch.float32))
    with pytest.raises(DeviceFormatError, match="activations in fp8 meet weights in fp8 alone, got nvfp4"):
        in_fp8(quantise(torch.ones(2, 32), "nvfp4"))
    with pytest.raises(DeviceFormatError, match=r"activation scales \[3\] do not fit \[8, 32\]"):
        in_fp8(weight, torch.ones(3))
    for wrong in (0.0, -1.0, torch.nan, torch.inf):
        with pytest.raises(DeviceFormatError, match=r"an activation scale is not in 2\^-100"):
            in_fp8(weight, torch.tensor([wrong]))
    with pytest.raises(DeviceFormatError, match="stacked before their activations are said to be in fp8"):
        stack([weight, weight], 2)


def test_a_copy_and_one_expert_keep_their_scales() -> None:
    codes = torch.zeros(3, 4, 8).to(torch.float8_e4m3fn)
    matrix = in_fp8(fp8.from_codes(codes, torch.ones(3), torch.bfloat16), torch.tensor([[1.0], [2.0], [4.0]]))
    assert matrix[1].activation_scales is not None
    assert matrix[1].activation_scales.tolist() == [2.0]
    copied = matrix.to("cpu")
    assert copied.activations == "fp8"
    assert copied.activation_scales is not None
    assert copied.activation_scales.tolist() == [1.0, 2.0, 4.0]
    assert matrix[2].shape == (4, 8)
