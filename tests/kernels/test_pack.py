"""Packed weights: their layout, their errors, and the C++ packer against the definition in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cierzo.kernels.formats import definition
from cierzo.kernels.formats.pack import PackError, as_packed, as_tensor, pack, pack_into, unpack
from cierzo.kernels.formats.packed import GROUP_K, empty_packed, packed_bytes

FORMATS = list(GROUP_K)
QUANTISED = ["int8", "int4", "nvfp4"]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(format: str, paired: bool) -> None:
    weight = normal(3, 70, 70)
    packed = pack(weight, format, paired=paired)
    back = unpack(packed)
    assert back.shape == weight.shape
    torch.testing.assert_close(unpack(pack(back, format, paired=paired)), back)
    assert packed.num_bytes == 3 * packed_bytes(format, 70, 70, paired)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plain_tensor_is_kept_exactly(dtype: torch.dtype) -> None:
    weight = normal(33, 5, dtype=dtype)
    weight[3, 2], weight[4, 1] = float("nan"), float("inf")
    torch.testing.assert_close(as_tensor(as_packed(weight)), weight, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("format", FORMATS)
def test_experts_may_come_in_slices(format: str) -> None:
    weight = normal(5, 34, 65)
    whole = pack(weight, format, paired=True).data
    size = packed_bytes(format, 34, 65, paired=True)
    target = empty_packed(5 * size)
    pack_into(weight[:2], format, True, target[: 2 * size])
    pack_into(weight[2:], format, True, target[2 * size :])
    assert torch.equal(target, whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -3e38])
@pytest.mark.parametrize("format", QUANTISED)
def test_a_weight_that_does_not_fit_is_named(format: str, bad: float) -> None:
    weight = normal(2, 40, 70)
    weight[1, 33, 65] = bad
    weight[1, 34, 2] = bad
    with pytest.raises(PackError, match=rf"{format} cannot hold the weight at \[1, 33, 65\]"):
        pack(weight, format)


def test_misuse_is_named() -> None:
    with pytest.raises(PackError, match="unknown number format 'int3'; known: float32"):
        pack(normal(2, 2), "int3")
    with pytest.raises(PackError, match="float16"):
        pack(normal(2, 2).half(), "int8")
    with pytest.raises(PackError, match="even number of rows, got 3"):
        pack(normal(3, 2), "int8", paired=True)
    with pytest.raises(PackError, match="takes 2112 aligned bytes, target has 64"):
        pack_into(normal(3, 2), "int8", False, empty_packed(64))


@pytest.mark.parametrize("format", FORMATS)
def test_errors_are_within_the_stated_bound(format: str) -> None:
    weight = normal(64, 4096)
    relative = (unpack(pack(weight, format)) - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    bound = definition.FORMATS[format].relative_rms
    assert bound * 0.75 <= relative <= bound
