"""The decoder that all text models here share: embedding, blocks of attention and MLP, final norm, head.

h = x + attention(norm(x));  x' = h + mlp(norm'(h));  hidden = final_norm(x_last);  logits = head(hidden)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from cierzo.cache.pool import GqaPages, KVPool, MlaPages
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.inputs import ModelInputs
from cierzo.engine.model.layers import Parameters, PositionTables, Shard, StepTables
from cierzo.engine.weights.loader import ParameterSpec
from cierzo.kernels.ops import linear, norm

Specs = dict[str, ParameterSpec]


class Attention(Protocol):
    """Writes the step's rows into the pages, then attends; returns this rank's partial sum [T,D]."""

    def forward(self, x: Tensor, inputs: ModelInputs, tables: StepTables, pages: MlaPages | GqaPages) -> Tensor:
        """x [T,D] -> [T,D]."""


class Mlp(Protocol):
    """A dense MLP or a mixture of experts; returns this rank's partial sum [T,D]."""

    def forward(self, x: Tensor) -> Tensor:
        """x [T,D] -> [T,D]."""


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder layer; `norm_after` is the next layer's input norm, or the final norm."""

    attention: Attention
    middle_norm: Tensor
    mlp: Mlp
    norm_after: Tensor


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
        self.tables = PositionTables(config, device)
        self.embedding = parameters["model.embed_tokens.weight"]
        self.first_norm = parameters["model.layers.0.input_layernorm.weight"]
        self.blocks = [
            Block(
                attention,
                _norm(parameters, index, "post_attention_layernorm"),
                mlp,
                _norm_after(parameters, index, len(layers)),
            )
            for index, (attention, mlp) in enumerate(layers)
        ]
        if config.tie_word_embeddings:
            rows = shard.width(config.vocab_size, "vocab_size")
            self.head = self.embedding[shard.rank * rows : (shard.rank + 1) * rows]
        else:
            self.head = parameters["lm_head.weight"]

    @torch.inference_mode()
    def forward(self, inputs: ModelInputs, kv: KVPool) -> Tensor:
        """Compute the step's T rows, writing their cache entries into `kv` -> hidden [T,D], final norm applied."""
        eps = self.config.rms_norm_eps
        tables = self.tables.of(inputs)
        residual = functional.embedding(inputs.token_ids, self.embedding)
        x = norm.rms_norm(residual, self.first_norm, eps)
        for block, pages in zip(self.blocks, kv.layers, strict=True):
            x = self.shard.all_reduce(block.attention.forward(x, inputs, tables, pages))
            x = norm.add_rms_norm(x, residual, block.middle_norm, eps)
            x = self.shard.all_reduce(block.mlp.forward(x))
            x = norm.add_rms_norm(x, residual, block.norm_after, eps)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [M,D] -> fp32 [M,vocab]; with several ranks, this rank's vocab / world columns."""
        return linear.lm_head(hidden, self.head)


def _norm(parameters: Parameters, layer: int, name: str) -> Tensor:
    return parameters[f"model.layers.{layer}.{name}.weight"]


def _norm_after(parameters: Parameters, layer: int, layers: int) -> Tensor:
    last = layer == layers - 1
    return parameters["model.norm.weight"] if last else _norm(parameters, layer + 1, "input_layernorm")
