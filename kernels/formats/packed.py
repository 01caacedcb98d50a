"""`PackedMatrix`: weights in the order in which the CPU kernels read them.

A matrix [n, k] is cut into panels of 32 outputs; the kernels compute one panel for several rows of activations at a
time, so that 32 consecutive weights of one k feed two vectors. n is padded to whole panels and k to whole groups,
with zeros; only int4 repeats the last column, for a zero would stretch the last group's range. The activations that
meet the padding are zero. Experts follow each other, `expert_bytes` apart.

    panel 0                                    panel 1
    +-------------------------------------+    +-----
    | group 0 of k | group 1 | ... |      |    | ...       [experts][panels][groups] of

    format   group of k   bytes of a group of a panel
    float32      1        32 floats
    bf16         2        [32 outputs][2 k]
    int8        64        codes uint8 [16][32 outputs][4 k], value + 128; then scales half[32]
    int4        32        codes [4][32 outputs][4 bytes]: byte b of octet o holds k = 8 o + b in its low half, and
                          k = 8 o + 4 + b in its high half; then scales half[32], minima half[32]
    nvfp4       32        codes as int4's, two groups of 16 in one; then e4m3 scales [2 groups][32 outputs]. Before
                          the first group, a panel has 32 floats: the global scale of each output

    value    float32, bf16: as it is.  int8: (code - 128) * scale, rotated (int8.py).  int4: code * scale + minimum.
             nvfp4: e2m1(code) * scale * global scale

`paired`: n = 2F, gate above up. Panel p then holds the gate rows 16p .. 16p+15 and the up rows 16p .. 16p+15, so
that both factors of silu(gate) * up meet in one thread; F is padded to 16.

A panel is a multiple of 64 bytes, and starts at one, in every format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cierzo.kernels.formats.device import DeviceMatrix
from cierzo.kernels.formats.number_formats import PACKED_FORMATS, plain_format

PANEL = 32  # outputs
ALIGNMENT = 64  # bytes
PLAIN_FORMATS = {torch.float32: plain_format("float32"), torch.bfloat16: plain_format("bfloat16")}


class PackError(ValueError):
    """A weight cannot be packed: a format, shape or dtype that does not exist, or a value that does not fit."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """Weights [n, k] or [experts, n, k] in one of the formats above. Never written after it is made.

    data: uint8 [experts * expert_bytes], 64-byte aligned, often a view of a mapped file. dtype: of the activations
    that it is multiplied with. `shape`, `dtype` and `dim` are there so that a door can check it like a tensor.
    """

    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    paired: bool
    data: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self.data.numel()


Matrix = Tensor | PackedMatrix | DeviceMatrix  # what an operation takes as weights


def to_panels(weight: Tensor, paired: bool) -> Tensor:
    """[E,n,k] -> new [E * panels, 32, k], in the order of outputs in a packed matrix; outputs past n are zero."""
    experts, n, k = weight.shape
    sections = 2 if paired else 1
    count, height = num_panels(n, paired), PANEL // sections
    padded = torch.zeros(experts, sections, count * height, k, dtype=weight.dtype)
    padded[:, :, : n // sections] = weight.unflatten(1, (sections, n // sections))
    return padded.unflatten(2, (count, height)).transpose(1, 2).reshape(experts * count, PANEL, k)


def from_panels(panels: Tensor, n: int, paired: bool) -> Tensor:
    """The reverse of to_panels: [E * panels, 32, k] -> [E,n,k]."""
    sections = 2 if paired else 1
    count, height = num_panels(n, paired), PANEL // sections
    halves = panels.unflatten(0, (-1, count)).unflatten(2, (sections, height)).transpose(1, 2)
    return halves.flatten(2, 3)[:, :, : n // sections].flatten(1, 2)


def num_panels(n: int, paired: bool) -> int:
    """Panels of n outputs; a paired matrix pads its two halves apart."""
    return -(-(n // 2) // (PANEL // 2)) if paired else -(-n // PANEL)


def panel_bytes(format: str, k: int) -> int:
    """Bytes of one panel: 32 outputs, all of k."""
    panels = PACKED_FORMATS[format]
    return panels.header_bytes + -(-k // panels.group_k) * panels.group_bytes


def packed_bytes(format: str, n: int, k: int, paired: bool = False) -> int:
    """Bytes of one expert's [n, k]."""
    return num_panels(n, paired) * panel_bytes(format, k)


def view_packed(
    format: str, shape: tuple[int, ...], dtype: torch.dtype, paired: bool, data: Tensor
) -> PackedMatrix:
    """Describe packed bytes that lie in `data`, uint8. Raises ValueError where they cannot be that matrix."""
    *experts, n, k = shape
    num_experts = experts[0] if experts else 1
    each = packed_bytes(format, n, k, paired)
    if data.numel() != num_experts * each or data.data_ptr() % ALIGNMENT:
        raise ValueError(
            f"{format} {list(shape)} takes {num_experts * each} bytes at a multiple of {ALIGNMENT}, "
            f"got {data.numel()} at {data.data_ptr() % ALIGNMENT}"
        )
    return PackedMatrix(format, tuple(shape), dtype, paired, data)


def new_packed(weight: Tensor, format: str, dtype: torch.dtype, paired: bool) -> PackedMatrix:
    """Memory for the packed form of weight, [n,k] or [E,n,k], whose values are to be written yet.

    Raises PackError for a format, shape or dtype that cannot be packed.
    """
    check_packable(weight, format, paired)
    *experts, n, k = weight.shape
    data = empty_packed((experts[0] if experts else 1) * packed_bytes(format, n, k, paired))
    return view_packed(format, tuple(weight.shape), dtype, paired, data)


def check_packable(weight: Tensor, format: str, paired: bool) -> None:
    """Raise PackError for a format, shape or dtype that cannot be packed."""
    if weight.dtype not in PLAIN_FORMATS:
        raise PackError(f"weights are float32 or bfloat16, got {weight.dtype}")
    if format not in PACKED_FORMATS:
        raise PackError(f"unknown number format {format!r}; known: {', '.join(PACKED_FORMATS)}")
    if weight.dim() not in (2, 3) or 0 in weight.shape:
        raise PackError(f"weights are [n,k] or [experts,n,k], got {list(weight.shape)}")
    if paired and weight.shape[-2] % 2:
        raise PackError(f"a paired matrix has an even number of rows, got {weight.shape[-2]}")


def empty_packed(num_bytes: int) -> Tensor:
    """uint8 [num_bytes], aligned as the kernels want it."""
    memory = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8)
    return memory[-memory.data_ptr() % ALIGNMENT :][:num_bytes]
