"""Parameters whose values are computed when they are packed, one matrix or one expert at a time.

A checkpoint is memory-mapped, and a stored parameter only says which of its bytes it is made of: a model of 119 B
weights in 4 or 8 bits is never there in 16. Rows are put into another order when their values are computed, and
scales are looked at then too: a start that maps packed weights reads none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.parameters import Parameter, as_tensor
from cierzo.engine.weights.grids import LARGEST_SCALE, SCALE_LIMIT, SMALLEST_SCALE, GridMatrix
from cierzo.kernels.formats import nvfp4
from cierzo.kernels.formats.device import joined
from cierzo.kernels.formats.packed import PackError, packed_bytes
from cierzo.kernels.pack import pack_into, pack_nvfp4

Range = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class ScaledMatrix:
    """[n,k]: weight = code * scale, or the code itself where there is no scale.

    name: of its tensor. codes: float8_e4m3fn, or floating-point. scale: one number of any floating-point dtype,
    scale_name its tensor. order: int64 [n], which row of `codes` each row is; None: its own. activation_scale: [1],
    the static one of the activations that it is multiplied with in FP8, if the checkpoint has it.
    """

    name: str
    codes: Tensor
    scale: Tensor | None = None
    scale_name: str = ""
    order: Tensor | None = None
    activation_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        return (len(self.codes) if self.order is None else len(self.order), self.codes.shape[1])

    def rows(self, begin: int, end: int) -> ScaledMatrix:
        """Some of its rows."""
        if self.order is None:
            return replace(self, codes=self.codes[begin:end])
        return replace(self, order=self.order[begin:end])

    def columns(self, begin: int, end: int) -> ScaledMatrix:
        """Some of its columns."""
        return replace(self, codes=self.codes[:, begin:end])

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weights [n,k]: float32 products of codes and scale; without a scale, as stored, in `dtype`.

        NaN codes (0x7F, 0xFF) stay NaN: the formats with scales refuse them, bf16 and float32 hold them. Raises
        CheckpointError for a scale that is no positive number.
        """
        codes = self._ordered_codes()
        return codes.to(dtype) if self.scale is None else codes.float() * self._checked_scale()

    def _ordered_codes(self) -> Tensor:
        """[n,k], in order."""
        if self.order is None:
            return self.codes
        codes = self.codes  # by bytes: not every operation knows 8-bit floats
        return (codes.view(torch.uint8) if codes.dtype.itemsize == 1 else codes)[self.order].view(codes.dtype)

    def kept(self, format: str) -> tuple[Tensor, ...] | None:
        """Codes, and the scale of each row, of FP8; None in another format. Raises CheckpointError for a scale that
        is no positive number."""
        if format != "fp8" or self.scale is None:
            return None
        return self._ordered_codes(), torch.full((self.shape[0],), self._checked_scale())

    def _checked_scale(self) -> float:
        """The scale. Raises CheckpointError for one that is no positive number."""
        assert self.scale is not None, self.name
        if self.scale.is_meta:  # as good as any
            return 1.0
        scale = float(self.scale)
        if not SMALLEST_SCALE <= scale <= LARGEST_SCALE:  # NaN is refused too
            raise CheckpointError(
                f"tensor {self.scale_name}: the scale of {self.name} is {scale}, must be in {SCALE_LIMIT}",
                field=self.scale_name,
                limit=SCALE_LIMIT,
                value=scale,
            )
        return scale


@dataclass(frozen=True, slots=True, eq=False)
class Nvfp4Matrix:
    """[n,k] as compressed-tensors stores it (kernels/formats/nvfp4.py). name: "layers.3.experts.7.w1"."""

    name: str
    codes: Tensor
    scales: Tensor
    divisor: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        return len(self.codes), 2 * self.codes.shape[1]

    def rows(self, begin: int, end: int) -> Nvfp4Matrix:
        """Some of its rows."""
        return replace(self, codes=self.codes[begin:end], scales=self.scales[begin:end])

    def columns(self, begin: int, end: int) -> Nvfp4Matrix:
        """Some of its columns. Raises CheckpointError where they would cut a group that has one scale."""
        group = nvfp4.GROUP
        if begin % group or end % group:
            raise CheckpointError(
                f"{self.name}: columns {begin} to {end} of an NVFP4 matrix, must be multiples of {group}",
                field=self.name,
                limit=f"multiples of {group}",
                value=(begin, end),
            )
        codes = self.codes[:, begin // 2 : end // 2]
        return replace(self, codes=codes, scales=self.scales[:, begin // group : end // group])

    def kept(self, format: str) -> tuple[Tensor, ...] | None:
        """Codes, scales, and the multiplier of each row, of NVFP4; None in another format. Raises CheckpointError
        for a scale that is none."""
        if format != "nvfp4":
            return None
        return self.codes, self.scales, torch.full((self.shape[0],), 1 / self._checked_divisor())

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weights, float32 [n,k]. Raises CheckpointError for a scale that is none."""
        return nvfp4.stored_values(self.codes, self.scales, self._checked_divisor())

    def _checked_divisor(self) -> float:
        if self.divisor.is_meta:
            return 1.0
        divisor = float(self.divisor)
        if not SMALLEST_SCALE <= divisor <= LARGEST_SCALE:
            raise CheckpointError(
                f"{self.name}: global scale {divisor}, must be in {SCALE_LIMIT}",
                field=self.name,
                limit=SCALE_LIMIT,
                value=divisor,
            )
        bad = self.scales.view(torch.uint8) > nvfp4.LARGEST_SCALE_CODE
        if bool(bad.any()):
            row, group = (int(index) for index in bad.nonzero()[0])
            value = float(self.scales[row, group])
            raise CheckpointError(
                f"{self.name}: a scale is NaN or negative: {value} at [{row}, {group}], must be in 0 .. 448",
                field=self.name,
                limit="0 .. 448",
                value=value,
            )
        return divisor


StoredMatrix = ScaledMatrix | Nvfp4Matrix | GridMatrix


@dataclass(frozen=True, slots=True, eq=False)
class StoredParameter:
    """A parameter [n,k] or [E,n,k] of which nothing is computed yet.

    experts: each expert's matrices, which lie one above the other; [n,k] is one expert, and not `fused`.
    dtype, device: of `tensor()`.
    """

    experts: tuple[tuple[StoredMatrix, ...], ...]
    fused: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def name(self) -> str:
        """The name of its first tensor."""
        return self.experts[0][0].name

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, k) or (E, n, k)."""
        inner = (sum(part.shape[0] for part in self.experts[0]), self.experts[0][0].shape[1])
        return (len(self.experts), *inner) if self.fused else inner

    def __getitem__(self, rows: slice) -> StoredParameter:
        """A stretch of the first axis."""
        begin, end, _ = rows.indices(self.shape[0])
        return self.cut(0, [(begin, end)])

    def cut(self, axis: int, ranges: Sequence[Range]) -> StoredParameter:
        """The ranges along `axis`, one after the other."""
        axis -= self.fused
        if axis < 0:
            return replace(self, experts=tuple(parts for a, b in ranges for parts in self.experts[a:b]))
        if axis == 0:
            return replace(self, experts=tuple(_rows(parts, ranges) for parts in self.experts))
        ((begin, end),) = ranges
        return replace(
            self, experts=tuple(tuple(part.columns(begin, end) for part in parts) for parts in self.experts)
        )

    def tensor(self) -> Tensor:
        """All values, rounded to `dtype`: for parameters that are no large matrix, and for the reference."""
        experts = [_values(parts, self.dtype).to(self.dtype) for parts in self.experts]
        return (torch.stack(experts) if self.fused else experts[0]).to(self.device)

    def joined(self, parts: Sequence[Parameter]) -> StoredParameter:
        """See LazyParameter."""
        rows = zip(*(_as_stored(part).experts for part in parts), strict=True)
        return replace(self, experts=tuple(tuple(one for each in row for one in each) for row in rows))


def kept_codes(parts: Sequence[StoredMatrix], format: str) -> list[Tensor] | None:
    """Codes and scales of matrices that lie one above the other, if this number format holds all of them as they
    are. FP8's scales are of rows [n], or of blocks of a row [n, blocks], where one part has blocks (of one size).

    Raises CheckpointError for a scale that is none.
    """
    kept = [part.kept(format) for part in parts]
    tensors = [list(one) for one in kept if one is not None]
    if len(tensors) < len(parts):
        return None
    blocks = max((one[1].shape[1] for one in tensors if one[1].dim() == 2), default=0)
    for one in tensors:
        if blocks and one[1].dim() == 1:
            one[1] = one[1][:, None].expand(-1, blocks).contiguous()
    return [joined(each) for each in zip(*tensors, strict=True)]


def fp8_blocks(parts: Sequence[StoredMatrix]) -> set[tuple[int, int]]:
    """Sizes (rows, columns) of the blocks of FP8 matrices that have some."""
    groups = [part.group for part in parts if isinstance(part, GridMatrix)]
    return {(group.rows, group.columns) for group in groups if group.storage == "fp8" and group.columns}


def pack_parameter(weight: Parameter, format: str, paired: bool, target: Tensor) -> None:
    """pack_into, of a stored parameter too: each expert's values in turn. NVFP4 stays NVFP4, code for code.

    Raises PackError naming the matrix whose values the format cannot hold, CheckpointError for a bad scale.
    """
    if not isinstance(weight, StoredParameter):
        pack_into(as_tensor(weight), format, paired, target)
        return
    *_, n, k = weight.shape
    each = packed_bytes(format, n, k, paired)
    for number, parts in enumerate(weight.experts):
        part = target[number * each : (number + 1) * each]
        kept = kept_codes(parts, format)
        try:
            if kept is not None:
                codes, scales, multipliers = kept
                pack_nvfp4(codes, scales, multipliers, paired, part)
            else:
                pack_into(_values(parts, weight.dtype), format, paired, part)
        except PackError as error:
            raise PackError(f"{' + '.join(one.name for one in parts)}: {error}") from error


def _values(parts: Sequence[StoredMatrix], dtype: torch.dtype) -> Tensor:
    values = [part.values(dtype) for part in parts]
    return values[0] if len(values) == 1 else torch.cat(values)


def _rows(parts: Sequence[StoredMatrix], ranges: Sequence[Range]) -> tuple[StoredMatrix, ...]:
    """The ranges of rows of matrices that lie one above the other."""
    found: list[StoredMatrix] = []
    for begin, end in ranges:
        top = 0  # of the part, among all rows
        for part in parts:
            low, high = max(begin - top, 0), min(end - top, part.shape[0])
            if low < high:
                found.append(part.rows(low, high))
            top += part.shape[0]
    return tuple(found)


def _as_stored(part: Parameter) -> StoredParameter:
    if isinstance(part, StoredParameter):
        return part
    values = as_tensor(part)
    experts = values if values.dim() == 3 else values[None]
    matrices = tuple((ScaledMatrix("a plain tensor", one),) for one in experts)
    return StoredParameter(matrices, values.dim() == 3, values.dtype, values.device)
