"""The dense models, Mistral Small 3's architecture and Llama's: grouped-query attention and one MLP per layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cierzo.engine.model.config import GqaConfig, ModelConfig
from cierzo.engine.model.decoder import Decoder, LayerHalf, Specs, outer_specs
from cierzo.engine.model.layers import GatedMlp
from cierzo.engine.parameters import Parameters, ParameterSpec, Shard
from cierzo.kernels.ops.block import GqaWeights


@dataclass(frozen=True, slots=True)
class GroupedQueryAttention:
    """One layer's attention on one rank, with its share of the query and of the key-value heads."""

    weights: GqaWeights

    @staticmethod
    def specs(prefix: str, config: ModelConfig, gqa: GqaConfig) -> Specs:
        """Parameters as transformers names them."""
        hidden, width, kv_width = (
            config.hidden_size,
            config.num_heads * gqa.head_dim,
            gqa.num_kv_heads * gqa.head_dim,
        )
        return {
            f"{prefix}q_proj.weight": ParameterSpec((width, hidden), shard_axis=0, rotated_heads=config.num_heads),
            f"{prefix}k_proj.weight": ParameterSpec(
                (kv_width, hidden), shard_axis=0, rotated_heads=gqa.num_kv_heads
            ),
            f"{prefix}v_proj.weight": ParameterSpec((kv_width, hidden), shard_axis=0),
            f"{prefix}o_proj.weight": ParameterSpec((hidden, width), shard_axis=1),
        }

    @classmethod
    def build(
        cls, parameters: Parameters, norm: Tensor, config: ModelConfig, gqa: GqaConfig, shard: Shard
    ) -> GroupedQueryAttention:
        """From a layer's parameters, and the norm before it."""
        return cls(
            GqaWeights(
                norm=norm,
                qkv=parameters.matrix(*(f"{name}_proj.weight" for name in "qkv")),
                output=parameters.matrix("o_proj.weight"),
                query_heads=shard.width(config.num_heads, "num_attention_heads"),
                kv_heads=shard.width(gqa.num_kv_heads, "num_key_value_heads"),
                eps=config.rms_norm_eps,
                scale=config.softmax_scale,
            )
        )


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
    layers: list[tuple[LayerHalf, LayerHalf]] = []
    for layer in range(config.num_layers):
        own = parameters.within(f"model.layers.{layer}.")
        norms = own["input_layernorm.weight"], own["post_attention_layernorm.weight"]
        attention = GroupedQueryAttention.build(own.within("self_attn."), norms[0], config, _gqa(config), shard)
        layers.append((attention, GatedMlp.build(own.within("mlp."), norms[1], config.rms_norm_eps)))
    return Decoder(config, parameters, layers, shard, device)


def _gqa(config: ModelConfig) -> GqaConfig:
    assert isinstance(config.attention, GqaConfig), config.attention
    return config.attention
