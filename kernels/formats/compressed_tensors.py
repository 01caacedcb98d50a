"""NVFP4 matrices of a checkpoint as the library compressed-tensors writes them ("nvfp4-pack-quantized"), packed.

A matrix X, [n,k], is stored as three tensors. Codes and scales are taken over as they are, in another order.

    X.weight_packed         uint8 [n, k/2]: column 2j in the low half of byte j, column 2j + 1 in the high half
    X.weight_scale          e4m3 [n, k/16]
    X.weight_global_scale   float32 [1], a divisor: weight = e2m1(code) * scale / global scale

(X.input_global_scale, for activations in 4 bits, is not used: ours have 8.) Each of an expert's gate, up and down
has a global scale of its own; packed, every row has one, so that gate and up may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from cierzo.kernels.formats import nvfp4
from cierzo.kernels.formats.packed import PackError, to_panels

SCALE_GROUP = 16  # of k
LARGEST_CODE = 0x7E  # of e4m3 scales: NaN is above, as are negative numbers


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """The three tensors of one matrix, checked."""

    name: str
    codes: Tensor
    scales: Tensor
    divisor: float

    @classmethod
    def read(cls, name: str, tensor: Callable[[str], Tensor]) -> StoredMatrix:
        """`tensor` gives a tensor of the checkpoint by its name. Raises PackError if they do not fit together."""
        codes, scales, divisor = (tensor(f"{name}.{suffix}") for suffix in SUFFIXES)
        if codes.dtype != torch.uint8 or scales.dtype != torch.float8_e4m3fn or divisor.numel() != 1:
            raise PackError(
                f"{name}: NVFP4 is uint8, float8_e4m3fn and one divisor, got {codes.dtype}, {scales.dtype}"
            )
        n, half_k = codes.shape
        if 2 * half_k % SCALE_GROUP or list(scales.shape) != [n, 2 * half_k // SCALE_GROUP]:
            raise PackError(f"{name}: codes {list(codes.shape)} do not fit scales {list(scales.shape)}")
        if not 2.0**-100 <= float(divisor) <= 2.0**100:
            raise PackError(f"{name}: global scale {float(divisor)}, must be in 2^-100 .. 2^100")
        if (scales.view(torch.uint8) > LARGEST_CODE).any():
            raise PackError(f"{name}: a scale is NaN or negative")
        return cls(name, codes, scales, float(divisor))


SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale")


def define(codes: Tensor, scales: Tensor, whole: Tensor, paired: bool) -> Tensor:
    """Pack stored codes: uint8 [n, k/2], scales uint8 [n, k/16] and global multipliers float32 [n] -> uint8."""
    missing = -2 * codes.shape[1] % nvfp4.GROUP
    columns = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
    rows = to_panels(pad(columns, (0, missing))[None], paired)
    scale_rows = to_panels(pad(scales, (0, missing // SCALE_GROUP))[None], paired)
    return nvfp4.assemble(rows, scale_rows, to_panels(whole[None, :, None], paired)[..., 0]).flatten()


def dequantise(part: StoredMatrix) -> Tensor:
    """The weights, float32 [n,k]: exactly those that the packed form of the same codes and scales has."""
    n, half_k = part.codes.shape
    columns = _VALUES_OF_BYTE.index_select(0, part.codes.flatten().int()).view(n, -1, SCALE_GROUP)
    return (columns * (part.scales.float() * (1 / part.divisor))[..., None]).view(n, 2 * half_k)


_SIGNED = torch.cat([nvfp4.VALUES, -nvfp4.VALUES])
_VALUES_OF_BYTE = torch.stack([_SIGNED.repeat(16), _SIGNED.repeat_interleave(16)], 1)  # [byte, low and high half]
