"""Mistral Small 4's text model: MLA and, above the first dense layers, a mixture of experts."""

from __future__ import annotations

import torch

from cierzo.engine.model.config import MlaConfig, ModelConfig, MoeConfig
from cierzo.engine.model.decoder import Decoder, LayerHalf, Specs, outer_specs
from cierzo.engine.model.layers import GatedMlp
from cierzo.engine.model.mla import MultiHeadLatentAttention
from cierzo.engine.model.moe import MixtureOfExperts
from cierzo.engine.parameters import Parameters, Shard


def specs(config: ModelConfig) -> Specs:
    """Every parameter of the model, as transformers' Mistral4ForCausalLM saves it."""
    mla, moe = _parts(config)
    found = outer_specs(config)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        found |= MultiHeadLatentAttention.specs(f"{prefix}self_attn.", config, mla)
        if layer < moe.first_dense_layers:
            found |= GatedMlp.specs(f"{prefix}mlp.", config.hidden_size, config.mlp_width)
        else:
            found |= MixtureOfExperts.specs(f"{prefix}mlp.", config.hidden_size, moe)
    return found


def build(config: ModelConfig, parameters: Parameters, shard: Shard, device: torch.device) -> Decoder:
    """The model on one rank."""
    mla, moe = _parts(config)
    layers: list[tuple[LayerHalf, LayerHalf]] = []
    for layer in range(config.num_layers):
        own = parameters.within(f"model.layers.{layer}.")
        norm, middle = own["input_layernorm.weight"], own["post_attention_layernorm.weight"]
        attention = MultiHeadLatentAttention.build(own.within("self_attn."), norm, config, mla, shard)
        inner, eps = own.within("mlp."), config.rms_norm_eps
        dense = layer < moe.first_dense_layers
        mlp = GatedMlp.build(inner, middle, eps) if dense else MixtureOfExperts.build(inner, middle, eps, moe)
        layers.append((attention, mlp))
    return Decoder(config, parameters, layers, shard, device)


def _parts(config: ModelConfig) -> tuple[MlaConfig, MoeConfig]:
    assert isinstance(config.attention, MlaConfig), config.attention
    assert config.moe is not None
    return config.attention, config.moe
