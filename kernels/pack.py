"""Weights into packed matrices: by the C++ packer where it is built, else by the definition in plain torch.

The bytes are the same on every machine. `unpack` is in formats/definition.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.kernels import registry
from cierzo.kernels.cpu.launch import pack as launch
from cierzo.kernels.formats import definition, nvfp4
from cierzo.kernels.formats.packed import (
    ALIGNMENT,
    PackedMatrix,
    PackError,
    check_packable,
    new_packed,
    packed_bytes,
)


def pack(weight: Tensor, format: str, dtype: torch.dtype | None = None, paired: bool = False) -> PackedMatrix:
    """weight [n,k] or [E,n,k], float32 or bf16, any strides, -> its packed form, in new memory.

    dtype: of the activations that it will meet; the weight's by default. Raises PackError as pack_into does.
    """
    packed = new_packed(weight, format, dtype or weight.dtype, paired)
    pack_into(weight, format, paired, packed.data)
    return packed


def pack_into(weight: Tensor, format: str, paired: bool, target: Tensor) -> None:
    """Write weight's packed form to target, uint8 [E * packed_bytes(format, n, k, paired)], 64-byte aligned.

    Experts may come in slices, each to its part of the whole. Raises PackError if the target has another size, or
    if the format cannot hold a weight: formats with scales take neither NaN nor infinity, nor what is too large for
    their scales.
    """
    check_packable(weight, format, paired)
    weight = weight if weight.dim() == 3 else weight[None]
    experts, n, k = weight.shape
    wanted = experts * packed_bytes(format, n, k, paired)
    if target.dtype != torch.uint8 or target.numel() != wanted or target.data_ptr() % ALIGNMENT:
        raise PackError(f"{format} {list(weight.shape)} takes {wanted} aligned bytes, target has {target.numel()}")
    if registry.has_native():
        refused = launch.pack(weight, format, paired, target)
    else:
        refused = definition.refused(weight, format)
        if refused is None:
            target.copy_(definition.pack(weight, format, paired))
    if refused is not None:
        place = [int(i) for i in torch.unravel_index(torch.tensor(refused), weight.shape)]
        raise PackError(f"{format} cannot hold the weight at {place}: {weight[tuple(place)].item()}")


def pack_nvfp4(codes: Tensor, scales: Tensor, whole: Tensor, paired: bool, target: Tensor) -> None:
    """Pack a checkpoint's own codes and scales to target: uint8 [packed_bytes("nvfp4", n, k, paired)], aligned.

    codes: uint8 [n, k/2]. scales: e4m3 [n, k/16]. whole: the multipliers of rows, float32 [n]. Raises
    PackError if the target has another size.
    """
    shape, scales = (len(codes), 2 * codes.shape[1]), scales.view(torch.uint8)
    if target.numel() != packed_bytes("nvfp4", *shape, paired):
        raise PackError(f"nvfp4 {list(shape)} does not fit {target.numel()} bytes")
    if registry.has_native():
        launch.pack_nvfp4(codes, scales, whole, paired, target)
    else:
        target.copy_(nvfp4.encode_stored(codes, scales, whole, paired))
