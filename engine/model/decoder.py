"""The decoder that all text models here share: embedding, blocks of attention and MLP, final norm, head.

h = x + attention(norm(x));  x' = h + mlp(norm'(h));  hidden = final_norm(x_last);  logits = head(hidden)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cierzo.cache.pool import KVPool, MlaPages
from cierzo.engine.model.positions import Positions
from cierzo.engine.model.vision import VisionTower
from cierzo.engine.parameters import Shard
from cierzo.kernels.ops import block, compose
from cierzo.kernels.ops.block import DecoderWeights, StepRows


class Decoder:
    """A model on one rank, ready to run. Parameters are used where they lie and never written."""

    def __init__(
        self, weights: DecoderWeights, positions: Positions, shard: Shard, tower: VisionTower | None = None
    ) -> None:
        """weights: without pages; those of the pool that a step names are put there. tower: sees images, if the
        model takes any."""
        self.weights = weights
        self.tower = tower
        self._positions = positions
        self._shard = shard
        self._pool: KVPool | None = None  # whose pages are in `weights`

    @torch.inference_mode()
    def logits(self, rows: StepRows, kv: KVPool, logit_rows: Tensor | None = None) -> Tensor:
        """Compute the step's T rows, writing their cache entries into `kv` -> fp32 [M,vocab] of `logit_rows`.

        logit_rows: int64 [M], or None for all. With several ranks, this rank's vocab / world columns.
        """
        weights, tables = self._on(kv), self._positions.tables(rows)
        if self._shard.world == 1:
            return block.decoder(weights, rows, tables, logit_rows)
        return compose.decoder(weights, rows, tables, logit_rows, self._shard.all_reduce)

    @torch.inference_mode()
    def head(self, rows: StepRows, kv: KVPool) -> Callable[[Tensor], Tensor]:
        """Compute the step as `logits` does, bit for bit, and give what makes logits of some of its rows, int64
        [M] -> fp32 [M,vocab]: for a step of more rows than there is room for logits of."""
        weights, tables = self._on(kv), self._positions.tables(rows)
        all_reduce = None if self._shard.world == 1 else self._shard.all_reduce
        x, residual = compose.layers(weights, rows, tables, all_reduce)
        return lambda some: compose.head(weights, x, residual, some)

    def _on(self, kv: KVPool) -> DecoderWeights:
        """The weights, with the pages of a pool."""
        if self._pool is not kv:
            pages = [
                (page.latents,) if isinstance(page, MlaPages) else (page.keys, page.values) for page in kv.layers
            ]
            self._pool, self.weights = kv, replace(self.weights, pages=pages)
        return self.weights
