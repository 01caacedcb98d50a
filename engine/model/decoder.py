"""The decoder that all text models here share: embedding, blocks of attention and MLP, final norm, head.

h = x + attention(norm(x));  x' = h + mlp(norm'(h));  hidden = final_norm(x_last);  logits = head(hidden)
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from cierzo.cache.pool import GqaPages, KVPool, MlaPages
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.inputs import ModelInputs
from cierzo.engine.model.layers import Parameters, PositionTables, Shard
from cierzo.engine.weights.loader import ParameterSpec
from cierzo.kernels.ops import linear, norm
from cierzo.kernels.ops.block import StepRows

Specs = dict[str, ParameterSpec]


class Attention(Protocol):
    """Adds x to the residual, writes the step's rows into the pages, attends; this rank's partial sum [T,D]."""

    def forward(self, x: Tensor | None, residual: Tensor, rows: StepRows, pages: MlaPages | GqaPages) -> Tensor:
        """x, residual [T,D] -> [T,D]."""


class Mlp(Protocol):
    """Adds x to the residual; a dense MLP or a mixture of experts; returns this rank's partial sum [T,D]."""

    def forward(self, x: Tensor | None, residual: Tensor) -> Tensor:
        """x, residual [T,D] -> [T,D]."""


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
        layers: list[tuple[Attention, Mlp]],
        shard: Shard,
        device: torch.device,
    ) -> None:
        self.config = config
        self.shard = shard
        self.layers = layers
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
        x: Tensor | None = None
        for (attention, mlp), pages in zip(self.layers, kv.layers, strict=True):
            x = self.shard.all_reduce(attention.forward(x, residual, rows, pages))
            x = self.shard.all_reduce(mlp.forward(x, residual))
        assert x is not None, "a model has layers"
        return norm.add_rms_norm(x, residual, self.final_norm, self.config.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [M,D] -> fp32 [M,vocab]; with several ranks, this rank's vocab / world columns."""
        return linear.lm_head(hidden, self.head)
