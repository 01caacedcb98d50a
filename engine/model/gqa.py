"""Grouped-query attention, its query and key-value heads divided among ranks."""

from __future__ import annotations

from torch import Tensor

from cierzo.engine.model.config import GqaConfig, ModelConfig
from cierzo.engine.parameters import Parameters, ParameterSpec, Shard
from cierzo.kernels.ops.block import GqaWeights


def specs(config: ModelConfig, gqa: GqaConfig) -> dict[str, ParameterSpec]:
    """Parameters as transformers names them."""
    hidden, heads, kv_heads = config.hidden_size, config.num_heads, gqa.num_kv_heads
    width, kv_width = heads * gqa.head_dim, kv_heads * gqa.head_dim
    return {
        "q_proj.weight": ParameterSpec((width, hidden), shard_axis=0, rotated_heads=heads),
        "k_proj.weight": ParameterSpec((kv_width, hidden), shard_axis=0, rotated_heads=kv_heads),
        "v_proj.weight": ParameterSpec((kv_width, hidden), shard_axis=0),
        "o_proj.weight": ParameterSpec((hidden, width), shard_axis=1),
    }


def build(parameters: Parameters, norm: Tensor, config: ModelConfig, gqa: GqaConfig, shard: Shard) -> GqaWeights:
    """The attention of one layer, and the norm before it."""
    return GqaWeights(
        norm=norm,
        qkv=parameters.matrix(*(f"{name}_proj.weight" for name in "qkv")),
        output=parameters.matrix("o_proj.weight"),
        query_heads=shard.width(config.num_heads, "num_attention_heads"),
        kv_heads=shard.width(gqa.num_kv_heads, "num_key_value_heads"),
        eps=config.rms_norm_eps,
        scale=config.softmax_scale,
    )
