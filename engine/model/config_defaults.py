"""Values of fields that a config.json leaves out: the defaults of transformers' configuration classes.

A saver may leave out what its class has by default, in a `text_config` above all. Source: transformers 5.23,
`MistralConfig`, `Ministral3Config`, `LlamaConfig`, `Mistral4Config`, the classes of WRAPPERS, and
`RotaryEmbeddingConfigMixin.default_theta`; a test compares the tables with the classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROPE_THETA = 10000.0
EOS_TOKEN_ID = 2  # of all classes; only where generation_config.json names no id either

_COMMON: Mapping[str, Any] = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mistral": {
        **_COMMON,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "llama": {
        **_COMMON,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
    },
    "ministral3": {
        **_COMMON,
        "vocab_size": 131072,
        "intermediate_size": 14336,
        "num_hidden_layers": 34,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "mistral4": {
        **_COMMON,
        "vocab_size": 131072,
        "intermediate_size": 12288,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 36,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "kv_lora_rank": 256,
        "q_lora_rank": 1024,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 64,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 0,
        "norm_topk_prob": True,
        "max_position_embeddings": 1048576,
        "rope_interleave": True,
        "rope_parameters": {
            "type": "yarn",
            "rope_theta": ROPE_THETA,
            "factor": 128.0,
            "original_max_position_embeddings": 8192,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
}
# Multimodal classes around a text model: their own tie flag, which counts, and the type of a `text_config` without.
WRAPPERS: Mapping[str, Mapping[str, Any]] = {
    "mistral3": {
        "tie_word_embeddings": True,
        "image_token_index": 10,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "multimodal_projector_bias": False,
        "spatial_merge_size": 2,
    },
    "llava": {"tie_word_embeddings": False},
    "llava_next": {"tie_word_embeddings": False},
}
WRAPPED: Mapping[str, Mapping[str, Any]] = {
    "mistral3": {"model_type": "mistral"},
    "llava": {"model_type": "llama"},
    "llava_next": {"model_type": "llama"},
}
# Of `PixtralVisionConfig`, for what a `vision_config` leaves out; its RoPE's base is ROPE_THETA.
PIXTRAL: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 1024,
    "patch_size": 16,
    "hidden_act": "gelu",
}
