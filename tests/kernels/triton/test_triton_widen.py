"""e4m3 codes of the cache as bf16: a model of the bits over every code, and the PTX that does it."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from torch import Tensor

from cierzo.kernels.triton.launch import Configuration, kernel, launch
from cierzo.kernels.triton.widen import folded, widened

SHAPES = [(16, 16), (4, 64), (2, 128)]  # 4 codes at a time, and 16


@kernel
def _widen(codes_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    places = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + places, widened(tl.load(codes_ptr + places), tl.bfloat16, True))


def widen(codes: Tensor) -> Tensor:
    out = torch.empty(codes.shape, dtype=torch.bfloat16)
    types = {"codes_ptr": "*fp8e4nv", "out_ptr": "*bf16"}
    configuration = Configuration(_widen, types, {"ROWS": codes.shape[0], "COLUMNS": codes.shape[1]})
    launch(configuration, (1,), codes_ptr=codes, out_ptr=out)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_code_is_its_value_times_2_to_the_minus_120(shape: tuple[int, int]) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes & 127 == 127] = 0
    codes = codes[torch.randperm(256)].view(shape).view(torch.float8_e4m3fn)
    got = widen(codes)
    assert torch.equal(got.double() * 2.0**120, codes.double())
    assert torch.equal(got.double().signbit(), codes.double().signbit())  # of zeros too


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_makes_its_token_not_a_number_and_no_other(shape: tuple[int, int], code: int) -> None:
    for place in range(256):
        codes = torch.full((256,), 0x7E, dtype=torch.uint8)
        codes[place] = code
        got = widen(codes.view(shape).view(torch.float8_e4m3fn))
        broken = got.isnan().any(1)
        assert broken.nonzero().flatten().tolist() == [place // shape[1]]


def test_only_bf16_beside_fp8_is_folded() -> None:
    assert folded("*bf16", "*fp8e4nv")
    assert not folded("*fp32", "*fp8e4nv")
    assert not folded("*bf16", "*bf16")
