"""A model's matrices in the kernels' order and in a number format: which format each gets, and where it is kept."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cierzo.engine.parameters import MatrixRequest, MatrixRole, Parameter, as_tensor
from cierzo.engine.weights.loader import Progress
from cierzo.engine.weights.on_device import on_device
from cierzo.engine.weights.packed import PackedStore
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.kernels.formats.packed import PLAIN_FORMATS, Matrix, PackedMatrix


def formats(weights: str, plain: str) -> dict[MatrixRole, str]:
    """The number format of each kind of matrix; `plain` is the activations'.

    The router and MLA's expansions stay plain: they are a hundredth of the weights, the first decides which experts
    run, and the second multiply every cached token. lm_head has 8 bits at least: in 4, it alone raises the demo
    model's perplexity by 6 %.
    """
    head = weights if weights == plain else "int8"
    return {"linear": weights, "experts": weights, "latent": plain, "router": plain, "head": head}


def device_formats(weights: str, plain: str) -> dict[MatrixRole, str]:
    """The same on a GPU, where the checkpoints' own formats run: in nvfp4 the experts have 4 bits, and what else is
    multiplied with has 8. The head stays as it is in them."""
    others = "fp8" if weights == "nvfp4" else weights
    return {"linear": others, "experts": weights, "latent": plain, "router": plain, "head": plain}


class DeviceMatrices:
    """Gives matrices in the memory of a GPU, each quantised there. weights: "bf16", "fp8" or "nvfp4". activations:
    "fp8" where fp8 matrices are multiplied with those."""

    def __init__(self, weights: str, dtype: torch.dtype, device: torch.device, activations: str = "bf16") -> None:
        plain = PLAIN_FORMATS[dtype]
        self._plain = plain
        self._formats = device_formats(weights, plain)
        self._device = device
        self._fp8_activations = activations == "fp8"

    def tensor(self, stored: Parameter) -> Tensor:
        """See MatrixSource."""
        return as_tensor(stored).to(self._device, copy=True)  # a mapped tensor may start anywhere

    def matrix(self, request: MatrixRequest) -> Matrix:
        """See MatrixSource. Raises CheckpointError for a matrix that its format cannot hold."""
        format = self._formats[request.role]
        return on_device(request.make(), format, self._plain, self._device, fp8_activations=self._fp8_activations)


class PackedMatrices:
    """Gives matrices whose values are there after `fill`. weights: "float32", "bf16", "int8", "int4" or "nvfp4"."""

    def __init__(self, reader: CheckpointReader, weights: str, dtype: torch.dtype, cache_dir: Path) -> None:
        plain = PLAIN_FORMATS[dtype]
        self._formats = formats(weights, plain)
        variant = weights if dtype == torch.bfloat16 else f"{weights}-{plain}"
        self._store = PackedStore(reader, variant, cache_dir, dtype=dtype)

    def tensor(self, stored: Parameter) -> Tensor:
        """The tensor itself: it lies where the kernels read it."""
        return as_tensor(stored)

    def matrix(self, request: MatrixRequest) -> PackedMatrix:
        """See MatrixSource."""
        return self._store.matrix(request, self._formats[request.role])

    def fill(self, progress: Progress | None = None) -> str:
        """Map the packed weights, or pack them first; says in a line what was done. Raises CheckpointError."""
        return self._store.fill(progress)
