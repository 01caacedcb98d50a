"""The decoder that all text models here share: embedding, blocks of attention and MLP, final norm, head.

h = x + attention(norm(x));  x' = h + mlp(norm'(h));  hidden = final_norm(x_last);  logits = head(hidden)
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from cierzo.cache.pool import KVPool, MlaPages
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.inputs import ModelInputs
from cierzo.engine.model.layers import Parameters, PositionTables, Shard
from cierzo.engine.weights.loader import ParameterSpec
from cierzo.kernels.ops import block, linear, norm
from cierzo.kernels.ops.block import GqaWeights, Half, MlaWeights, MlpWeights, MoeWeights

Specs = dict[str, ParameterSpec]


class LayerHalf(Protocol):
    """An attention, a dense MLP or a mixture of experts: what kernels' blocks compute with."""

    @property
    def weights(self) -> MlaWeights | GqaWeights | MlpWeights | MoeWeights:
        """This rank's share."""


def outer_specs(config: ModelConfig) -> Specs:
    """What every model has around its layers' attention and MLP, named as transformers names it."""
    table, tied = (config.vocab_size, config.hidden_size), config.tie_word_embeddings
    specs = {
        "model.embed_tokens.weight": ParameterSpec(table, twin="lm_head.weight" if tied else None),
        "model.norm.weight": ParameterSpec((config.hidden_size,)),
    }
    if not tied:
        specs["lm_head.weight"] = ParameterSpec(table, shard_axis=0)
    for layer in range(config.num_layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            specs[f"model.layers.{layer}.{name}.weight"] = ParameterSpec((config.hidden_size,))
    return specs


class Decoder:
    """A model on one rank, ready to run. Parameters are used where they lie and never written."""

    def __init__(
        self,
        config: ModelConfig,
        parameters: Parameters,
        layers: list[tuple[LayerHalf, LayerHalf]],
        shard: Shard,
        device: torch.device,
    ) -> None:
        self.config = config
        self.shard = shard
        self.layers = layers
        self._pool: KVPool | None = None
        self._halves: list[Half] = []
        self.tables = PositionTables(config, device)
        self.embedding = parameters["model.embed_tokens.weight"]
        self.final_norm = parameters["model.norm.weight"]
        if config.tie_word_embeddings:
            rows = shard.width(config.vocab_size, "vocab_size")
            tied = self.embedding[shard.rank * rows : (shard.rank + 1) * rows]
            self.head = parameters.derived("lm_head", tuple(tied.shape), lambda: tied, role="head")
        else:
            self.head = parameters.matrix("lm_head.weight", role="head")

    @torch.inference_mode()
    def forward(self, inputs: ModelInputs, kv: KVPool) -> Tensor:
        """Compute the step's T rows, writing their cache entries into `kv` -> hidden [T,D], final norm applied."""
        rows = self.tables.rows(inputs)
        residual = functional.embedding(inputs.token_ids, self.embedding)
        if self._pool is not kv:
            self._pool, self._halves = kv, self._with_pages(kv)
        eps = self.config.rms_norm_eps
        if self.shard.world == 1:
            return block.decoder(residual, self._halves, rows, self.final_norm, eps)
        x: Tensor | None = None
        for half in self._halves:  # each half gives this rank's partial sum
            x = self.shard.all_reduce(block.run_half(x, residual, half, rows))
        assert x is not None, "a model has layers"
        return norm.add_rms_norm(x, residual, self.final_norm, eps)

    def _with_pages(self, kv: KVPool) -> list[Half]:
        halves = []
        for (attention, mlp), pages in zip(self.layers, kv.layers, strict=True):
            tensors = (pages.latents,) if isinstance(pages, MlaPages) else (pages.keys, pages.values)
            halves += [Half(attention.weights, tensors), Half(mlp.weights)]
        return halves

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [M,D] -> fp32 [M,vocab]; with several ranks, this rank's vocab / world columns."""
        return linear.lm_head(hidden, self.head)
