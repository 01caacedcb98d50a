"""Packed weights: their layout, their errors, and the C++ packer against the definition in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cierzo.kernels.cpu.launch import pack as launch
from cierzo.kernels.formats import definition, int4, int8, nvfp4
from cierzo.kernels.formats.definition import as_tensor, unpack
from cierzo.kernels.formats.number_formats import NUMBER_FORMATS, PACKED_FORMATS
from cierzo.kernels.formats.packed import PLAIN_FORMATS, PackError, empty_packed, packed_bytes
from cierzo.kernels.pack import pack, pack_into, pack_nvfp4

FORMATS = list(PACKED_FORMATS)
QUANTISED = ["int8", "int4", "nvfp4"]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(format: str, paired: bool) -> None:
    weight = normal(3, 70, 128)
    packed = pack(weight, format, paired=paired)
    back = unpack(packed)
    assert back.shape == weight.shape
    torch.testing.assert_close(unpack(pack(back, format, paired=paired)), back)
    assert packed.num_bytes == 3 * packed_bytes(format, 70, 128, paired)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plain_tensor_is_kept_exactly(dtype: torch.dtype) -> None:
    weight = normal(33, 5, dtype=dtype)
    weight[3, 2], weight[4, 1] = float("nan"), float("inf")
    torch.testing.assert_close(
        as_tensor(pack(weight, PLAIN_FORMATS[dtype])), weight, rtol=0.0, atol=0.0, equal_nan=True
    )


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
    bound = NUMBER_FORMATS[format].weight_error
    assert bound * 0.8 <= relative <= bound


def hostile_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """Odd sizes, any strides; rows of zeros, of tiny and of large values, on grids and beside them."""
    rows = normal(2, 70, 131)
    rows[0, 3], rows[0, 4, :64] = 0.0, -0.0
    rows[0, 5], rows[0, 6, ::3], rows[0, 7, ::2] = 0.1, 0.5, -0.0
    for row, exponent in enumerate(range(-150, 14, 4), start=10):
        rows[0, row] *= 2.0**exponent
    rows[1, :20] = (rows[1, :20] * 4).round() / 4
    rows[1, 20:40] = unpack(pack(rows[1, 20:40], "int4"))
    rows[1, 40:50] = torch.randint(0, 4, (10, 131), generator=torch.Generator().manual_seed(1)) * 0.25 + 1
    rows = rows.to(dtype)
    wide = torch.zeros(2, 70, 140, dtype=dtype)
    wide[..., 3:134] = rows
    return {
        "plain": rows,
        "view": wide[..., 3:134],
        "transposed": rows.transpose(1, 2).contiguous().transpose(1, 2),
        "strided": torch.stack([rows, -rows], -1)[..., 0],
        "few": rows[:1, :2, :1],
        "one expert for all": rows[:1].expand(3, -1, -1),
        "whole groups": rows[:, :64, :128],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_native_packer_equals_the_definition(instruction_set: str, dtype: torch.dtype) -> None:
    for name, weight in hostile_weights(dtype).items():
        for format in FORMATS:
            for paired in (False, True):
                target = empty_packed(weight.shape[0] * packed_bytes(format, *weight.shape[1:], paired)).fill_(0x55)
                assert launch.pack(weight, format, paired, target) is None
                wrong = (target != definition.pack(weight, format, paired)).nonzero()
                assert not len(wrong), f"{name} {format} {paired}: {len(wrong)} of {len(target)}, first {wrong[0]}"


def test_the_native_packer_keeps_nan_and_rounds_as_the_definition(instruction_set: str) -> None:
    """Float32 that bf16 cannot hold: every kind of NaN, infinities, halfway cases, subnormals."""
    patterns = [0x7F800001, 0xFFC12345, 0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00008001]
    weight = torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32).expand(1, 3, -1)
    for format in ("float32", "bf16"):
        target = empty_packed(packed_bytes(format, 3, len(patterns)))
        launch.pack(weight, format, False, target)
        assert torch.equal(target, definition.pack(weight, format, False))


@pytest.mark.parametrize("format", QUANTISED)
def test_the_native_packer_names_the_first_weight_that_does_not_fit(format: str, instruction_set: str) -> None:
    target = empty_packed(2 * packed_bytes(format, 130, 70))
    for bad in (float("nan"), float("-inf"), NUMBER_FORMATS[format].codec().LARGEST * 1.01):
        weight = normal(2, 130, 70)
        weight[1, 66, 69] = weight[1, 67, 2] = weight[1, 129, 0] = bad
        assert launch.pack(weight, format, False, target) == definition.refused(weight, format)
        weight[0, 129, 69] = bad
        assert launch.pack(weight, format, False, target) == 130 * 70 - 1


@pytest.mark.parametrize(("n", "k"), [(2, 16), (70, 48), (64, 96)])
def test_the_native_packer_of_stored_codes_equals_the_definition(instruction_set: str, n: int, k: int) -> None:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (n, k // 2), generator=random, dtype=torch.uint8)
    scales = torch.randint(0, 0x7F, (n, k // 16), generator=random, dtype=torch.uint8)
    whole = torch.rand(n, generator=random)
    for paired in (False, True):
        target = empty_packed(packed_bytes("nvfp4", n, k, paired)).fill_(0x55)
        launch.pack_nvfp4(codes, scales, whole, paired, target)
        assert torch.equal(target, nvfp4.encode_stored(codes, scales, whole, paired))
    with pytest.raises(PackError, match=rf"nvfp4 \[{n}, {k}\] does not fit 1 bytes"):
        pack_nvfp4(codes, scales, whole, False, empty_packed(1))


@pytest.mark.parametrize("bits", [2, 15])
def test_weights_on_an_int4_grid_are_kept(bits: int) -> None:
    """As GGUF's Q4_1 has them: code * scale + minimum, both halves."""
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, bits + 1, (32, 8, 32), generator=random).float() + (3 if bits == 2 else 0)
    scale = (torch.rand(32, 8, 1, generator=random) * 0.1).half().float()
    minimum = torch.randn(32, 8, 1, generator=random).half().float()
    weight = (codes * scale + minimum).flatten(1)
    assert torch.equal(unpack(pack(weight, "int4")), weight)


def test_int8_and_int4_bounds_of_each_group() -> None:
    """As their files state them, from the largest to the tiniest weights."""
    weight = normal(40, 256) * 2.0 ** torch.arange(-30, 10)[:, None]
    error = (unpack(pack(weight, "int8")) - weight).unflatten(1, (-1, 64)).square().mean(-1).sqrt()
    largest = int8.rotate(weight.unflatten(1, (-1, 64))).abs().amax(-1)
    assert (error <= largest / 254 * 1.001 + 2.0**-25).all()
    groups = weight.unflatten(1, (-1, 32))
    squares = (unpack(pack(weight, "int4")).unflatten(1, (-1, 32)) - groups).square().mean(-1)
    spread = groups.amax(-1) - groups.amin(-1)
    plain = ((spread / 30).square() + (groups.abs().amax(-1) * 2.0**-11).square()).clamp_min(2.0**-48)
    assert (squares <= plain).all()
    assert int4.SMALLEST_SCALE == 2.0**-24
