"""The dense models, Mistral Small 3's architecture and Llama's: grouped-query attention and one MLP per layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cierzo.cache.pool import GqaPages, MlaPages
from cierzo.engine.model.config import GqaConfig, ModelConfig
from cierzo.engine.model.decoder import Attention, Decoder, Mlp, Specs, outer_specs
from cierzo.engine.model.inputs import ModelInputs
from cierzo.engine.model.layers import GatedMlp, Parameters, Shard, StepTables
from cierzo.engine.weights.loader import ParameterSpec
from cierzo.kernels.ops import attention as attend
from cierzo.kernels.ops import linear, rope


@dataclass(frozen=True, slots=True)
class GroupedQueryAttention:
    """One layer's attention on one rank, with its share of the query and of the key-value heads."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    head_dim: int
    scale: float

    @staticmethod
    def specs(prefix: str, config: ModelConfig, gqa: GqaConfig) -> Specs:
        """Parameters as transformers names them."""
        hidden, width, kv_width = (
            config.hidden_size,
            config.num_heads * gqa.head_dim,
            gqa.num_kv_heads * gqa.head_dim,
        )
        return {
            f"{prefix}q_proj.weight": ParameterSpec((width, hidden), shard_axis=0),
            f"{prefix}k_proj.weight": ParameterSpec((kv_width, hidden), shard_axis=0),
            f"{prefix}v_proj.weight": ParameterSpec((kv_width, hidden), shard_axis=0),
            f"{prefix}o_proj.weight": ParameterSpec((hidden, width), shard_axis=1),
        }

    @classmethod
    def build(
        cls, parameters: Parameters, config: ModelConfig, gqa: GqaConfig, shard: Shard
    ) -> GroupedQueryAttention:
        """From a layer's parameters."""
        shard.width(config.num_heads, "num_attention_heads")
        shard.width(gqa.num_kv_heads, "num_key_value_heads")
        query, key, value, output = (parameters[f"{name}_proj.weight"] for name in "qkvo")
        return cls(query, key, value, output, gqa.head_dim, config.softmax_scale)

    def forward(self, x: Tensor, inputs: ModelInputs, tables: StepTables, pages: MlaPages | GqaPages) -> Tensor:
        """x [T,D] -> this rank's partial sum [T,D]; writes the rows' keys and values first."""
        assert isinstance(pages, GqaPages), type(pages)
        q, k, v = (
            linear.linear(x, weight).unflatten(1, (-1, self.head_dim))
            for weight in (self.query, self.key, self.value)
        )
        rope.apply_rope(q, tables.cos, tables.sin, interleaved=False)
        rope.apply_rope(k, tables.cos, tables.sin, interleaved=False)
        attend.write_keys_values(pages.keys, pages.values, inputs.cache_slots, k, v)
        return linear.linear(self._attend(q, inputs, pages).flatten(1), self.output)

    def _attend(self, q: Tensor, inputs: ModelInputs, pages: GqaPages) -> Tensor:
        prompt, generated = q[: inputs.num_expanded], q[inputs.num_expanded :]
        results = []
        if len(prompt):
            results.append(attend.gqa_prefill(prompt, pages.keys, pages.values, inputs.expanded, self.scale))
        if len(generated):
            results.append(attend.gqa_decode(generated, pages.keys, pages.values, inputs.absorbed, self.scale))
        return results[0] if len(results) == 1 else torch.cat(results)


def specs(config: ModelConfig) -> Specs:
    """Every parameter of the model, as transformers' MistralForCausalLM and LlamaForCausalLM save it."""
    gqa = _gqa(config)
    found = outer_specs(config)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        found |= GroupedQueryAttention.specs(f"{prefix}self_attn.", config, gqa)
        found |= GatedMlp.specs(f"{prefix}mlp.", config.hidden_size, config.mlp_width)
    return found


def build(config: ModelConfig, parameters: Parameters, shard: Shard, device: torch.device) -> Decoder:
    """The model on one rank."""
    layers: list[tuple[Attention, Mlp]] = []
    for layer in range(config.num_layers):
        own = parameters.within(f"model.layers.{layer}.")
        attention = GroupedQueryAttention.build(own.within("self_attn."), config, _gqa(config), shard)
        layers.append((attention, GatedMlp.build(own.within("mlp."))))
    return Decoder(config, parameters, layers, shard, device)


def _gqa(config: ModelConfig) -> GqaConfig:
    assert isinstance(config.attention, GqaConfig), config.attention
    return config.attention
