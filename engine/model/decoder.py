"""The decoder that all text models here share: embedding, blocks of attention and MLP, final norm, head.

h = x + attention(norm(x));  x' = h + mlp(norm'(h));  hidden = final_norm(x_last);  logits = head(hidden)
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cierzo.cache.pool import KVPool, MlaPages
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.inputs import ModelInputs
from cierzo.engine.model.layers import PositionTables
from cierzo.engine.parameters import MatrixRequest, Parameters, ParameterSpec, Shard, as_tensor
from cierzo.kernels.ops import block
from cierzo.kernels.ops.block import DecoderWeights, GqaWeights, Half, MlaWeights, MlpWeights, MoeWeights

Specs = dict[str, ParameterSpec]


class LayerHalf(Protocol):
    """An attention, a dense MLP or a mixture of experts: what kernels' blocks compute with."""

    @property
    def weights(self) -> MlaWeights | GqaWeights | MlpWeights | MoeWeights:
        """This rank's share."""


def outer_specs(config: ModelConfig) -> Specs:
    """What every model has around its layers' attention and MLP, named as transformers names it."""
    table = (config.vocab_size, config.hidden_size)
    tied_to = "model.embed_tokens.weight" if config.tie_word_embeddings else None
    specs = {
        "model.embed_tokens.weight": ParameterSpec(table),
        "model.norm.weight": ParameterSpec((config.hidden_size,)),
        "lm_head.weight": ParameterSpec(table, shard_axis=0, tied_to=tied_to),
    }
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
        self.tables = PositionTables(config, device)
        self.embedding = parameters["model.embed_tokens.weight"]
        self.final_norm = parameters["model.norm.weight"]
        if "lm_head.weight" in parameters:
            self.head = parameters.matrix("lm_head.weight", role="head")
        else:
            rows = shard.width(config.vocab_size, "vocab_size")
            tied = as_tensor(parameters.stored("model.embed_tokens.weight"))[
                shard.rank * rows : (shard.rank + 1) * rows
            ]
            self.head = parameters.derived(MatrixRequest("lm_head", tuple(tied.shape), lambda: tied, role="head"))
        self._pool: KVPool | None = None  # whose pages are in `_weights`
        self._weights: DecoderWeights | None = None

    @torch.inference_mode()
    def logits(self, inputs: ModelInputs, kv: KVPool, logit_rows: Tensor | None = None) -> Tensor:
        """Compute the step's T rows, writing their cache entries into `kv` -> fp32 [M,vocab] of `logit_rows`.

        logit_rows: int64 [M], or None for all. With several ranks, this rank's vocab / world columns.
        """
        rows = self.tables.rows(inputs)
        if self._pool is not kv or self._weights is None:
            self._pool, self._weights = kv, self._with_pages(kv)
        if self.shard.world == 1:
            return block.decoder(inputs.token_ids, self._weights, rows, logit_rows)
        return block.run_decoder(inputs.token_ids, self._weights, rows, logit_rows, self.shard.all_reduce)

    def _with_pages(self, kv: KVPool) -> DecoderWeights:
        halves = []
        for (attention, mlp), pages in zip(self.layers, kv.layers, strict=True):
            tensors = (pages.latents,) if isinstance(pages, MlaPages) else (pages.keys, pages.values)
            halves += [Half(attention.weights, tensors), Half(mlp.weights)]
        return DecoderWeights(self.embedding, halves, self.final_norm, self.config.rms_norm_eps, self.head)
