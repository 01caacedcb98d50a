"""Formats of a GPU's weights: their codes, one by one, in the definition and in a kernel; their errors."""

from __future__ import annotations

import pytest
import torch

from cierzo.kernels.cpu.tensors import as_packed
from cierzo.kernels.formats import e2m1 as e2m1_codes
from cierzo.kernels.formats import fp8, mxfp4, nvfp4
from cierzo.kernels.formats.definition import as_tensor
from cierzo.kernels.formats.device import DeviceFormatError, dequantise, quantise
from cierzo.kernels.formats.number_formats import DEVICE_FORMATS, NUMBER_FORMATS
from cierzo.kernels.formats.packed import PackError
from cierzo.kernels.triton import linear

ALL_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def test_every_e4m3_code_reaches_a_product_exactly() -> None:
    """Each code times one, in bf16 and in fp32; NaN stays NaN."""
    for dtype in (torch.bfloat16, torch.float32):
        matrix = fp8.from_codes(ALL_E4M3.view(256, 1), torch.tensor(1.0), dtype)
        result = linear.linear(torch.ones(1, 1).to(dtype), matrix)[0].float()
        assert torch.equal(result.nan_to_num(1e9), ALL_E4M3.float().nan_to_num(1e9))


def test_every_e2m1_code_with_every_scale_reaches_a_product_exactly() -> None:
    """Row r has the scale r; its columns are all codes, picked one at a time by rows of the identity."""
    scales = torch.arange(127, dtype=torch.uint8)  # of e4m3: no NaN, no negative one
    codes = torch.arange(16, dtype=torch.uint8)
    octets = (codes[0::2] | codes[1::2] << 4).expand(127, 8)
    matrix = nvfp4.from_codes(octets, scales.view(torch.float8_e4m3fn)[:, None], torch.ones(1), torch.bfloat16)
    table = e2m1_codes.SIGNED
    expected = table * scales.view(torch.float8_e4m3fn).float()[:, None]
    assert torch.equal(dequantise(matrix), expected)
    assert torch.equal(linear.lm_head(torch.eye(16).bfloat16(), matrix), expected.T)
    powers = torch.arange(7, 247, dtype=torch.uint8)  # what bf16's normal range holds with any code
    both = torch.cat([octets[:1], octets[:1]], 1)
    matrix = mxfp4.from_codes(both.expand(240, 16), powers[:, None], torch.bfloat16)
    expected = table.repeat(2) * torch.exp2(powers.float() - 127)[:, None]
    assert torch.equal(dequantise(matrix), expected)
    assert torch.equal(linear.lm_head(torch.eye(32).bfloat16(), matrix), expected.T)


@pytest.mark.parametrize("format", DEVICE_FORMATS)
def test_errors_are_within_the_stated_bound(format: str) -> None:
    weight = torch.randn(2, 64, 512, generator=torch.Generator().manual_seed(0))
    for size in (1.0, 1e-6, 3e4):
        error = dequantise(quantise(weight * size, format)) / size - weight
        assert error.square().mean().sqrt() < NUMBER_FORMATS[format].weight_error
        assert error.square().mean().sqrt() > NUMBER_FORMATS[format].weight_error / 2  # nor is the bound generous


@pytest.mark.parametrize("format", DEVICE_FORMATS)
def test_what_a_format_holds_is_kept(format: str) -> None:
    """Quantising what was quantised changes nothing, zeros and tiny rows included."""
    weight = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(1))
    weight[0, 0], weight[1, 1], weight[2, 2, :32] = 0.0, 1e-36, 0.0
    once = dequantise(quantise(weight, format))
    torch.testing.assert_close(dequantise(quantise(once, format)), once, rtol=1e-6, atol=0.0)
    assert torch.equal(once[0, 0], torch.zeros(64))
    matrix = quantise(weight.bfloat16(), format)
    assert matrix.dtype == as_tensor(matrix).dtype == torch.bfloat16
    assert matrix.num_bytes < weight.numel() * 2
    assert torch.equal(dequantise(matrix.to("cpu")), dequantise(matrix))


def test_checkpoints_scales() -> None:
    """One a matrix, one a row, one a half, or one a block, in the shapes that checkpoints have."""
    codes = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(2)).to(torch.float8_e4m3fn)
    one, halves = torch.rand(4, 1, 1).bfloat16(), torch.rand(4, 2, 1)
    assert torch.equal(dequantise(fp8.from_codes(codes, one, torch.bfloat16)), codes.float() * one.float())
    expected = codes.float() * halves.repeat_interleave(3, 1)
    assert torch.equal(dequantise(fp8.from_codes(codes, halves, torch.bfloat16)), expected)
    rows = torch.rand(4, 6)
    assert torch.equal(dequantise(fp8.from_codes(codes, rows, torch.bfloat16)), codes.float() * rows[..., None])
    scalar = fp8.from_codes(codes[0], torch.tensor(0.5), torch.bfloat16)
    assert torch.equal(dequantise(scalar), codes[0].float() * 0.5)
    blocks = torch.rand(2, 3)
    expected = codes[0].float() * blocks.repeat_interleave(4, 0)[:6].repeat_interleave(3, 1)[:, :8]
    assert torch.equal(dequantise(fp8.from_codes(codes[0], blocks, torch.bfloat16, (4, 3))), expected)


def test_what_does_not_fit_is_refused() -> None:
    codes = torch.zeros(4, 32, dtype=torch.uint8)
    with pytest.raises(DeviceFormatError, match=r"nvfp4: codes \[4, 32\] do not fit scales \[4, 2\]"):
        nvfp4.from_codes(codes, torch.zeros(4, 2).to(torch.float8_e4m3fn), torch.ones(1), torch.bfloat16)
    with pytest.raises(DeviceFormatError, match=r"mxfp4 is uint8 and torch\.uint8, got"):
        mxfp4.from_codes(codes, torch.zeros(4, 2), torch.bfloat16)
    with pytest.raises(DeviceFormatError, match=r"fp8: scales \[3\] do not fit \[4, 32\]"):
        fp8.from_codes(codes.view(torch.float8_e4m3fn), torch.zeros(3), torch.bfloat16)
    with pytest.raises(DeviceFormatError, match=r"not \[1, 1, 1\] for blocks \(128, 128\)"):
        fp8.from_codes(codes.view(torch.float8_e4m3fn), torch.zeros(3), torch.bfloat16, (128, 128))
    with pytest.raises(DeviceFormatError, match="unknown number format 'int3'; known: fp8, nvfp4, mxfp4"):
        quantise(torch.zeros(2, 2), "int3")
    with pytest.raises(DeviceFormatError, match="nvfp4: 24 columns are not whole groups of 16"):
        quantise(torch.zeros(2, 24), "nvfp4")
    with pytest.raises(DeviceFormatError, match="fp8 cannot hold weights that are not finite"):
        quantise(torch.full((2, 2), torch.inf), "fp8")
    with pytest.raises(PackError, match="a matrix of format fp8 is for a GPU"):
        as_packed(quantise(torch.zeros(2, 2), "fp8"))


def test_halfway_between_two_codes_the_even_one_is_taken() -> None:
    """Codes 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; a group whose peak is 6 has the scale 1 in mxfp4."""
    halves = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    weight = torch.tensor([[6.0, *halves, *(-half for half in halves), *[0.0] * 17]])
    even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert dequantise(quantise(weight, "mxfp4"))[0, :15].tolist() == [6.0, *even, *(-v for v in even)]
