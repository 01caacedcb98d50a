"""Tensors of a case with weights as the CPU's native kernels read them."""

from __future__ import annotations

from typing import Any

from cierzo.bench.gpu.cases import Maker
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.pack import pack


class PackedMaker(Maker):
    """Makes packed weights of `format`; those that stay plain are packed as bf16."""

    def plain(self, *shape: int) -> Any:
        """See Maker."""
        return pack(self.noise(*shape) * 0.02, "bf16")

    def matrix(self, *shape: int, paired: bool = False) -> Matrix:
        """See Maker."""
        return pack(self.noise(*shape) * 0.02, self.format, paired=paired)
