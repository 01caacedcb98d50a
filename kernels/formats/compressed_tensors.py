"""NVFP4 matrices of a checkpoint as the library compressed-tensors writes them ("nvfp4-pack-quantized"), packed.

A matrix X, [n,k], is stored as three tensors. Codes and scales are taken over as they are, in another order.

    X.weight_packed         uint8 [n, k/2]: column 2j in the low half of byte j, column 2j + 1 in the high half
    X.weight_scale          e4m3 [n, k/16]
    X.weight_global_scale   float32 [1], a divisor: weight = e2m1(code) * scale / global scale

(X.input_global_scale, for activations in 4 bits, is not used: ours have 8.) Each of an expert's gate, up and down
has a global scale of its own; packed, every row has one, so that gate and up may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from cierzo.kernels import registry
from cierzo.kernels.cpu.launch import pack as launch
from cierzo.kernels.formats import nvfp4
from cierzo.kernels.formats.pack import PackError
from cierzo.kernels.formats.packed import PackedMatrix, empty_packed, packed_bytes, view_packed
from cierzo.kernels.formats.panels import to_panels

SCALE_GROUP = 16  # of k
LARGEST_CODE = 0x7E  # of e4m3 scales: NaN is above, as are negative numbers


def is_stored(name: str, tensors: Container[str]) -> bool:
    """Whether a checkpoint with these tensors has the matrix `name` ("layers.3.experts.7.w1") in this form."""
    return f"{name}.weight_packed" in tensors


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


def load_into(parts: Sequence[StoredMatrix], paired: bool, target: Tensor) -> None:
    """Pack one expert, or a plain matrix, to target: uint8 [packed_bytes("nvfp4", n, k, paired)], 64-byte aligned.

    parts: stacked by rows to [n,k]: gate and up, which are `paired`, or one matrix alone. Raises PackError if their
    k, or the target's size, does not fit.
    """
    n, k = _stacked_shape(parts)
    if target.numel() != packed_bytes("nvfp4", n, k, paired):
        raise PackError(f"{parts[0].name}: {[n, k]} does not fit {target.numel()} bytes")
    codes = torch.cat([part.codes for part in parts])
    scales = torch.cat([part.scales.view(torch.uint8) for part in parts])
    whole = torch.cat([torch.full((len(part.codes),), 1 / part.divisor) for part in parts])
    if registry.has_native():
        launch.pack_nvfp4(codes, scales, whole, paired, target)
    else:
        target.copy_(define(codes, scales, whole, paired))


def define(codes: Tensor, scales: Tensor, whole: Tensor, paired: bool) -> Tensor:
    """What load_into writes, in plain torch. codes uint8 [n, k/2], scales uint8 [n, k/16], whole float32 [n]."""
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


def load(experts: Sequence[Sequence[StoredMatrix]], dtype: torch.dtype, paired: bool = False) -> PackedMatrix:
    """Pack [experts,n,k], each as load_into does, for activations of `dtype`."""
    n, k = _stacked_shape(experts[0])
    size = packed_bytes("nvfp4", n, k, paired)
    data = empty_packed(len(experts) * size)
    for number, parts in enumerate(experts):
        if _stacked_shape(parts) != (n, k):
            raise PackError(f"{parts[0].name}: {list(_stacked_shape(parts))}, the first expert is {[n, k]}")
        load_into(parts, paired, data[number * size : (number + 1) * size])
    return view_packed("nvfp4", (len(experts), n, k), dtype, paired, data)


def _stacked_shape(parts: Sequence[StoredMatrix]) -> tuple[int, int]:
    widths = {2 * part.codes.shape[1] for part in parts}
    if len(widths) != 1:
        raise PackError(f"{', '.join(part.name for part in parts)}: rows of {sorted(widths)} weights")
    return sum(len(part.codes) for part in parts), widths.pop()
