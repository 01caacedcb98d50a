"""A model's matrices in the kernels' order and in a number format: which format each gets, and where it is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cierzo.engine.model.layers import MatrixRole
from cierzo.engine.weights.loader import Progress
from cierzo.engine.weights.packed import PackedStore
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.kernels.formats.pack import pack_into
from cierzo.kernels.formats.packed import PackedMatrix

PLAIN_WEIGHTS = {torch.bfloat16: "bf16", torch.float32: "float32"}  # the weights' format that is no rounding


class PackedMatrices:
    """Gives matrices whose values are there after `fill`.

    weights: "float32", "bf16", "int8", "int4" or "nvfp4". The router and MLA's expansions keep the activations'
    format: they are a hundredth of the weights, the first decides which experts run, and the second multiply every
    cached token. lm_head has 8 bits at least: its rounding reaches every logit without an average to soften it.
    """

    def __init__(self, reader: CheckpointReader, weights: str, dtype: torch.dtype, cache_dir: Path) -> None:
        plain = PLAIN_WEIGHTS[dtype]
        self._formats: dict[MatrixRole, str] = {
            "linear": weights,
            "experts": weights,
            "latent": plain,
            "router": plain,
            "head": weights if weights == plain else "int8",
        }
        variant = weights if dtype == torch.bfloat16 else f"{weights}-{plain}"
        self._store = PackedStore(reader, variant, cache_dir, dtype=dtype, pack_into=pack_into)

    def matrix(
        self,
        key: str,
        shape: tuple[int, ...],
        make: Callable[[], Tensor],
        *,
        paired: bool = False,
        role: MatrixRole = "linear",
    ) -> PackedMatrix:
        """See MatrixSource."""
        return self._store.matrix(key, shape, make, format=self._formats[role], paired=paired)

    def fill(self, progress: Progress | None = None) -> str:
        """Map the packed weights, or pack them first; says in a line what was done. Raises CheckpointError."""
        return self._store.fill(progress)
