"""Sources of a model's matrices in the order of the kernels and in a number format, on a GPU and on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.parameters import MatrixRequest, Parameter, as_tensor
from cierzo.engine.weights.grids import GridMatrix
from cierzo.engine.weights.loader import Progress
from cierzo.engine.weights.packed import PackedStore
from cierzo.engine.weights.quantised import ScaledMatrix, StoredMatrix, StoredParameter, fp8_blocks, kept_codes
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.kernels.formats import fp8
from cierzo.kernels.formats.device import DeviceFormatError, DeviceMatrix, in_fp8, joined, quantise, stack
from cierzo.kernels.formats.number_formats import NUMBER_FORMATS, MatrixRole
from cierzo.kernels.formats.packed import PLAIN_FORMATS, Matrix, PackedMatrix

ROWS = 16_384  # of an FP8 matrix that are quantised at a time
BLOCK_COLUMNS = 128  # GPU kernels read whole multiples under one FP8 scale


class _Anew(Exception):
    """Codes are of another format, or their values in that of the matrix are others."""


class PackedMatrices:
    """Gives matrices in the order of the CPU kernels, whose values are there after `fill`."""

    def __init__(self, reader: CheckpointReader, weights: str, dtype: torch.dtype, cache_dir: Path) -> None:
        self._weights = NUMBER_FORMATS[weights]
        self._plain = PLAIN_FORMATS[dtype]
        variant = weights if dtype == torch.bfloat16 else f"{weights}-{self._plain}"
        self._store = PackedStore(reader, variant, cache_dir, dtype=dtype)
        self._tower = PackedStore(reader, f"vision-{self._plain}", cache_dir, dtype=dtype)  # alike for all formats

    def tensor(self, stored: Parameter) -> Tensor:
        """The tensor itself: it lies where the kernels read it."""
        return as_tensor(stored)

    def matrix(self, request: MatrixRequest) -> PackedMatrix:
        """See MatrixSource."""
        store = self._tower if request.role == "vision" else self._store
        return store.matrix(request, self._weights.of(request.role, "cpu", self._plain))

    def fill(self, progress: Progress | None = None) -> str:
        """Map the packed weights, or pack them first; says in a line what was done. Raises CheckpointError."""
        tower = self._tower.num_bytes > 0
        told = self._store.fill(progress)
        return f"{told}; vision tower: {self._tower.fill(progress)}" if tower else told


class DeviceMatrices:
    """Gives matrices in the memory of a GPU: a checkpoint's own codes and scales, where they are of the format.

    weights: a number format that computes there. activations: the format of the activations that matrices are
    multiplied with, where their own takes them. head: the format of lm_head, if not what follows from `weights`.
    """

    def __init__(
        self, weights: str, dtype: torch.dtype, device: torch.device, activations: str = "bf16", head: str = ""
    ) -> None:
        self._weights = NUMBER_FORMATS[weights]
        self._plain = PLAIN_FORMATS[dtype]
        self._device = device
        self._activations = activations
        self._head = head

    def format_of(self, role: MatrixRole) -> str:
        """The number format of matrices of a role."""
        if role == "head" and self._head:
            return self._head
        return self._weights.of(role, "cuda", self._plain)

    def takes_fp8(self, role: MatrixRole, format: str) -> bool:
        """Whether matrices of a role are multiplied with activations in FP8; logits are of what dtype holds."""
        return role != "head" and self._activations in NUMBER_FORMATS[format].activations

    def tensor(self, stored: Parameter) -> Tensor:
        """See MatrixSource."""
        return as_tensor(stored).to(self._device, copy=True)  # a mapped tensor may start anywhere

    def matrix(self, request: MatrixRequest) -> Matrix:
        """See MatrixSource. Codes of another format, or plain weights, are quantised there, an expert at a time.

        Raises CheckpointError for a bad scale, and for weights that the format cannot hold.
        """
        parameter, format = request.make(), self.format_of(request.role)
        if format == self._plain:
            return as_tensor(parameter).to(self._device, copy=True)
        try:
            woven = not self.takes_fp8(request.role, format)
            kept = _kept(parameter, format, self._device, woven)
            matrix = kept if kept is not None else _quantised(parameter, format, self._device, woven)
            if woven:
                return matrix
            scales = _activation_scales(parameter)
            return in_fp8(matrix, None if scales is None else scales.to(self._device))
        except DeviceFormatError as error:
            name = parameter.name if isinstance(parameter, StoredParameter) else "a plain tensor"
            raise CheckpointError(f"{name}: {error}", field=name) from error


def _kept(parameter: Parameter, format: str, device: torch.device, woven: bool) -> DeviceMatrix | None:
    """The stored codes, if the format holds all of them; scales of matrices above one another stay their own.
    An expert at a time is put into the kernels' order there; woven: of FP8, that of fp8.weave."""
    if not isinstance(parameter, StoredParameter):
        return None
    blocks = set[tuple[int, int]]().union(*(fp8_blocks(parts) for parts in parameter.experts))
    rows, columns = max(blocks, default=(0, 0))
    if len(blocks) > 1 or (columns % BLOCK_COLUMNS and columns < parameter.shape[-1]):
        return None
    codec, block = NUMBER_FORMATS[format].codec(), [(1, columns)] if columns else []

    def experts() -> Iterator[DeviceMatrix]:
        for parts in parameter.experts:
            kept = kept_codes(parts, format)
            if kept is None:
                raise _Anew
            one = codec.from_codes(*(tensor.to(device) for tensor in kept), parameter.dtype, *block)
            yield fp8.weave(one) if woven else one

    try:
        matrix = stack(experts(), len(parameter.experts)) if parameter.fused else next(experts())
    except _Anew:
        return None
    if not columns:
        return matrix
    scales, rows = _of_blocks(matrix.scales, rows)
    return replace(matrix, scales=scales.contiguous(), block=(rows, columns))


def _of_blocks(scales: Tensor, rows: int) -> tuple[Tensor, int]:
    """Scales [..., n, blocks] of each row -> one for `rows` rows, where these have the same, and how many rows that
    is; 1 where matrices that lie above one another begin within a block."""
    if scales.shape[-2] % rows == 0:
        blocks = scales.unflatten(-2, (-1, rows))
        if torch.equal(blocks, blocks[..., :1, :].expand_as(blocks)):
            return blocks[..., 0, :], rows
    return scales, 1


def _activation_scales(parameter: Parameter) -> Tensor | None:
    """Static scales of activations, fp32 [E], or [1] of [n,k]; None where the checkpoint has none.

    Matrices that lie above one another meet the same activations: where their scales differ, the largest holds them
    all. Raises CheckpointError where one has none and another has.
    """
    if not isinstance(parameter, StoredParameter):
        return None
    without, largest = "", []
    for expert in parameter.experts:
        found = {part.name: _activation_scale(part) for part in expert}
        without = without or next((name for name, scale in found.items() if scale is None), "")
        present = [scale.float().reshape(1) for scale in found.values() if scale is not None]
        largest += [torch.cat(present).amax(0, keepdim=True)] if present else []
    if largest and without:
        raise CheckpointError(
            f"{without} has no scale of its activations, and what lies beside it has", field=without
        )
    return torch.cat(largest) if largest else None


def _activation_scale(part: StoredMatrix) -> Tensor | None:
    return part.activation_scale if isinstance(part, ScaledMatrix | GridMatrix) else None


def _quantised(parameter: Parameter, format: str, device: torch.device, woven: bool) -> DeviceMatrix:
    """An expert at a time, and of an FP8 matrix some rows: in 16 bits and in fp32, all of them together take
    several times what they will. woven: as in _kept."""
    if len(parameter.shape) == 2:
        whole = as_tensor(parameter)
        if NUMBER_FORMATS[format].group or len(whole) <= ROWS:
            matrix = quantise(whole.to(device), format)
            return fp8.weave(matrix) if woven else matrix
        pieces = [quantise(whole[start : start + ROWS].to(device), format) for start in range(0, len(whole), ROWS)]
        codes, scales = ([getattr(one, name)[0] for one in pieces] for name in ("codes", "scales"))
        matrix = fp8.from_codes(joined(codes), joined(scales), pieces[0].dtype, (1, whole.shape[1]))
        return fp8.weave(matrix) if woven else matrix
    experts = (
        _quantised(as_tensor(parameter[number : number + 1])[0], format, device, woven)
        for number in range(parameter.shape[0])
    )
    return stack(experts, parameter.shape[0])
