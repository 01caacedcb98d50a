"""Sources of a model's matrices in the order of the kernels and in a number format, on a GPU and on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cierzo.engine.parameters import MatrixRequest, Parameter, as_tensor
from cierzo.engine.weights.loader import Progress
from cierzo.engine.weights.on_device import on_device
from cierzo.engine.weights.packed import PackedStore
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.kernels.formats.number_formats import NUMBER_FORMATS
from cierzo.kernels.formats.packed import PLAIN_FORMATS, Matrix, PackedMatrix


class DeviceMatrices:
    """Gives matrices in the memory of a GPU, each quantised there.

    weights: a number format that computes there. activations: the format of the activations that matrices are
    multiplied with, where their own takes them.
    """

    def __init__(self, weights: str, dtype: torch.dtype, device: torch.device, activations: str = "bf16") -> None:
        self._weights = NUMBER_FORMATS[weights]
        self._plain = PLAIN_FORMATS[dtype]
        self._device = device
        self._activations = activations

    def tensor(self, stored: Parameter) -> Tensor:
        """See MatrixSource."""
        return as_tensor(stored).to(self._device, copy=True)  # a mapped tensor may start anywhere

    def matrix(self, request: MatrixRequest) -> Matrix:
        """See MatrixSource. Raises CheckpointError for a matrix that its format cannot hold."""
        format = self._weights.of(request.role, "cuda", self._plain)
        return on_device(request.make(), format, self._plain, self._device, self._activations)


class PackedMatrices:
    """Gives matrices in the order of the CPU kernels, whose values are there after `fill`."""

    def __init__(self, reader: CheckpointReader, weights: str, dtype: torch.dtype, cache_dir: Path) -> None:
        self._weights = NUMBER_FORMATS[weights]
        self._plain = PLAIN_FORMATS[dtype]
        variant = weights if dtype == torch.bfloat16 else f"{weights}-{self._plain}"
        self._store = PackedStore(reader, variant, cache_dir, dtype=dtype)

    def tensor(self, stored: Parameter) -> Tensor:
        """The tensor itself: it lies where the kernels read it."""
        return as_tensor(stored)

    def matrix(self, request: MatrixRequest) -> PackedMatrix:
        """See MatrixSource."""
        return self._store.matrix(request, self._weights.of(request.role, "cpu", self._plain))

    def fill(self, progress: Progress | None = None) -> str:
        """Map the packed weights, or pack them first; says in a line what was done. Raises CheckpointError."""
        return self._store.fill(progress)
