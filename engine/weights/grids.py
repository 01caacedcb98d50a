"""Matrices of codes under a grid of scales: one scale for each row, block or group of columns.

    weight = (code - zero point) * scale

    storage   codes [n,k]                                             zero points, where there are any
    fp8       float8_e4m3fn [n,k]                                     none
    int8      int8 [n,k]                                              int8, as the scales
    packed    int32 words [n, ceil(k bits / 32)] of integers of 4     int32 words [ceil(n bits / 32), groups],
              or 8 bits, the first in the lowest bits, stored with    packed along n
              2^(bits-1) added
    mxfp4     uint8 [n, k/2], e2m1 pairs; scales: 2^(uint8 - 127)     none

Values are float32 products of two exact numbers, as compressed-tensors computes them where scales are float32.
Where these are bfloat16 it rounds the product to bfloat16, which gives the same bits as rounding ours does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.quantisation import WeightGroup
from cierzo.kernels.formats import e2m1, nvfp4

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-100, 2.0**100  # far beyond any model's; a product stays a float32
SCALE_LIMIT = "2^-100 .. 2^100"
_MX_BIAS, _MX_LARGEST = 127, 227  # of a power of two's code: 2^100
_MX_STEPS = 17  # powers of two below 2^8 that e4m3 holds: the least is 2^-9
_MX_TOP = 8


@dataclass(frozen=True, slots=True, eq=False)
class GridMatrix:
    """[n,k] of one of the storages above, in any order of rows; some of its columns.

    name: of its tensor; scale_name: of its scales. picked: int64 [n], which stored row each row is. window: the
    columns [begin, end). stated_shape: the checkpoint's own word on the shape of all of it, None where it has none.
    activation_scale: see ScaledMatrix.
    """

    name: str
    group: WeightGroup
    shape_stored: tuple[int, int]
    codes: Tensor
    scales: Tensor
    scale_name: str
    picked: Tensor
    window: tuple[int, int]
    zero_points: Tensor | None = None
    stated_shape: Tensor | None = None
    activation_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        return len(self.picked), self.window[1] - self.window[0]

    def rows(self, begin: int, end: int) -> GridMatrix:
        """Some of its rows."""
        return replace(self, picked=self.picked[begin:end])

    def columns(self, begin: int, end: int) -> GridMatrix:
        """Some of its columns."""
        return replace(self, window=(self.window[0] + begin, self.window[0] + end))

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weights, float32 [n,k]. Raises CheckpointError for a scale that is none, and for a stated shape that
        is another."""
        self._check_shape()
        values = self._integers_or_floats()
        if self.zero_points is not None:
            values -= self._spread(self._zero_points().float())
        values *= self._spread(self._checked_scales())
        return values[:, self.window[0] : self.window[1]]

    def kept(self, format: str) -> tuple[Tensor, ...] | None:
        """Codes and scales as this number format takes them; None where it cannot hold them as they are.

        fp8: codes, and scales of rows [n], or of blocks of one row and `group.columns` columns. nvfp4, of MXFP4:
        codes, scales and row multipliers, if the powers of two of a row lie close enough to each other.
        """
        begin, end = self.window
        aligned = begin % max(self.group.columns, 1) == 0
        if self.group.storage == "fp8" and format == "fp8" and aligned:
            codes = self._rows(self.codes)[:, begin:end]
            scales = self._grid(self._checked_scales())
            if self.group.columns == 0:
                return codes, scales.flatten()
            columns = self.group.columns
            return codes, scales[:, begin // columns : -(-end // columns)].contiguous()
        if self.group.storage == "mxfp4" and format == "nvfp4" and aligned and end % self.group.columns == 0:
            return self._as_nvfp4()
        return None

    def _as_nvfp4(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """An e4m3 scale for each 16 columns holds any power of two from 2^-9 to 2^8 times the row's multiplier."""
        (begin, end), size = self.window, self.group.columns
        codes = self._rows(self.codes)[:, begin // 2 : end // 2]
        self._checked_scales()
        exponents = self._rows(self.scales.view(torch.uint8))[:, begin // size : end // size].int()
        occupied = (codes.unflatten(1, (-1, size // 2)) & 0x77).amax(2) > 0  # a group of zeros has any exponent
        highest = torch.where(occupied, exponents, 0).amax(1)
        highest = torch.where(highest > 0, highest, _MX_BIAS)
        below = torch.where(occupied, highest[:, None] - exponents, 0)
        if int(below.max()) > _MX_STEPS or int(highest.min()) < 2 * _MX_BIAS - _MX_LARGEST:
            return None
        steps = torch.exp2((_MX_TOP - below).float()).to(torch.float8_e4m3fn).view(torch.uint8)
        scales = steps.repeat_interleave(size // nvfp4.GROUP, 1).view(torch.float8_e4m3fn)
        return codes, scales, torch.exp2((highest - _MX_BIAS - _MX_TOP).float())

    def _integers_or_floats(self) -> Tensor:
        """The codes, float32, all columns of the rows that are picked."""
        columns = self.shape_stored[1]
        match self.group.storage:
            case "packed":
                return unpacked(self._rows(self.codes), self.group.bits)[:, :columns].float()
            case "mxfp4":
                return e2m1.widen(self._rows(self.codes))
        return self._rows(self.codes).float()

    def _rows(self, stored: Tensor) -> Tensor:
        """The rows that are picked; a stretch of them is not copied. By bytes: torch picks no 8-bit floats."""
        begin, end = int(self.picked[0]), int(self.picked[-1]) + 1
        if torch.equal(self.picked, torch.arange(begin, end)):
            return stored[begin:end]
        return stored.view(torch.uint8)[self.picked].view(stored.dtype)

    def _zero_points(self) -> Tensor:
        """The grid of zero points, as the scales'."""
        assert self.zero_points is not None
        if self.zero_points.dtype != torch.int32:
            return self.zero_points
        return unpacked(self.zero_points.T, self.group.bits)[:, : self.shape_stored[0]].T

    def _grid(self, grid: Tensor) -> Tensor:
        """[n or fewer, columns or fewer] as stored -> the rows that are picked, [n, columns or fewer]."""
        n = self.shape_stored[0]
        grid = grid.reshape(1 if self.group.strategy == "tensor" else -(-n // self.group.rows), -1)
        return grid[self.picked // (self.group.rows or n)]

    def _spread(self, grid: Tensor) -> Tensor:
        """A number for each weight, or for each row."""
        grid = self._grid(grid)
        if self.group.columns == 0:
            return grid
        return grid.repeat_interleave(self.group.columns, 1)[:, : self.shape_stored[1]]

    def _checked_scales(self) -> Tensor:
        """The scales, float32, as stored. Raises CheckpointError for one that is no number, negative or too large;
        zero is for a part of a matrix alone."""
        if self.scales.is_meta:
            return torch.ones_like(self.scales, dtype=torch.float32)  # as good as any
        if self.group.storage == "mxfp4":
            codes = self.scales.view(torch.uint8)
            scales = torch.exp2(codes.float() - _MX_BIAS)
            bad = codes > _MX_LARGEST
        else:
            scales = self.scales.float()
            bad = ~((scales >= SMALLEST_SCALE) & (scales <= LARGEST_SCALE))
            if scales.numel() > 1:
                bad &= scales != 0
        if bool(bad.any()):
            place = [int(index) for index in bad.nonzero()[0]]
            value = float("nan") if self.group.storage == "mxfp4" else float(scales[tuple(place)])
            where = f"the scale of {self.name} at {place}"
            raise CheckpointError(
                f"tensor {self.scale_name}: {where} is {value}, must be in {SCALE_LIMIT}",
                field=self.scale_name,
                limit=SCALE_LIMIT,
                value=value,
            )
        return scales

    def _check_shape(self) -> None:
        """Raise CheckpointError where the checkpoint states another shape than the model needs."""
        stated = self.stated_shape
        if stated is not None and not stated.is_meta and stated.tolist()[-2:] != list(self.shape_stored):
            raise CheckpointError(
                f"{self.name}: weight_shape says {stated.tolist()}, the model needs {list(self.shape_stored)}",
                field=self.name,
                limit=list(self.shape_stored),
                value=stated.tolist(),
            )


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, words] -> the signed integers in them, int8 [rows, words * 32 / bits]: 4 or 8 bits each."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 4:
        octets = e2m1.split(octets)
    return (octets.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
