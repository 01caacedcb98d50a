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
        """weights: without pages; those of the pool that a step names are put there. tower: None where no image is
        taken."""
        self.weights = weights
        self.tower = tower
        self._positions = positions
        self._shard = shard
        self._pool: KVPool | None = None  # whose pages are in `weights`

    @torch.inference_mode()
    def logits(
        self,
        rows: StepRows,
        kv: KVPool,
        logit_rows: Tensor | None = None,
        *,
        image_rows: Tensor | None = None,
        image_embeddings: Tensor | None = None,
    ) -> Tensor:
        """Compute the step's T rows, writing their cache entries into `kv` -> fp32 [M,vocab] of `logit_rows`.

        logit_rows: int64 [M], or None for all. With several ranks, this rank's vocab / world columns. image_rows:
        int64 [I], rows that stand for merged tokens of images; image_embeddings [I,hidden], what the tower made of
        these, take the place of the rows' token embeddings. None: no row does.
        """
        if self._shard.world == 1 and image_rows is None:
            return block.decoder(self._on(kv), rows, self._positions.tables(rows), logit_rows)
        x, residual = self._layers(rows, kv, image_rows, image_embeddings)
        return compose.head(self._on(kv), x, residual, logit_rows)

    @torch.inference_mode()
    def head(
        self,
        rows: StepRows,
        kv: KVPool,
        *,
        image_rows: Tensor | None = None,
        image_embeddings: Tensor | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """Compute the step as `logits` does, bit for bit, and give what makes logits of some of its rows, int64
        [M] -> fp32 [M,vocab]: for a step of more rows than there is room for logits of."""
        weights = self._on(kv)
        x, residual = self._layers(rows, kv, image_rows, image_embeddings)
        return lambda some: compose.head(weights, x, residual, some)

    def _layers(
        self, rows: StepRows, kv: KVPool, image_rows: Tensor | None, image_embeddings: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weights, tables = self._on(kv), self._positions.tables(rows)
        embedded = compose.embedded(weights, rows.token_ids, image_rows, image_embeddings)
        all_reduce = None if self._shard.world == 1 else self._shard.all_reduce
        return compose.layers(weights, rows, tables, embedded, all_reduce)

    def _on(self, kv: KVPool) -> DecoderWeights:
        """The weights, with the pages of a pool."""
        if self._pool is not kv:
            pages = [
                (page.latents,) if isinstance(page, MlaPages) else (page.keys, page.values) for page in kv.layers
            ]
            self._pool, self.weights = kv, replace(self.weights, pages=pages)
        return self.weights
