"""Shapes of Mistral Small 4 and Mistral Small 3, at true size and in proportion: their tensors and config.json.

Names, shapes and config keys are those that transformers 5.23 writes for `Mistral4ForCausalLM` and
`MistralForCausalLM`. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cierzo.engine.errors import refusal
from cierzo.engine.fields import Fields
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.config_json import parse_config

NamedShape = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Small4Shape:
    """Mistral Small 4: MLA and a mixture of experts in every layer (true size: model.md 1.1)."""

    vocab_size: int = 131072
    hidden_size: int = 4096
    num_layers: int = 36
    num_heads: int = 32
    q_lora_rank: int = 1024
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    num_experts: int = 128
    experts_per_token: int = 4
    expert_width: int = 2048
    max_position_embeddings: int = 1048576

    def scaled(self, factor: float) -> Small4Shape:
        """Width, layers, experts, their width, query rank and vocabulary times `factor`; see `shape_of`."""
        return replace(
            self,
            vocab_size=_multiple(self.vocab_size * factor, 256),
            hidden_size=_multiple(self.hidden_size * factor, 64),
            num_layers=_multiple(self.num_layers * factor, 1),
            num_heads=_multiple(self.num_heads * factor, 1),
            q_lora_rank=_multiple(self.q_lora_rank * factor, 32),
            num_experts=_multiple(self.num_experts * factor, self.experts_per_token),
            expert_width=_multiple(self.expert_width * factor, 32),
        )

    def tensors(self) -> Iterator[NamedShape]:
        """(name, shape) of every parameter, in the model's order."""
        qk_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        hidden, heads, width = self.hidden_size, self.num_heads, self.expert_width
        attention = {
            "q_a_proj.weight": (self.q_lora_rank, hidden),
            "q_a_layernorm.weight": (self.q_lora_rank,),
            "q_b_proj.weight": (heads * qk_dim, self.q_lora_rank),
            "kv_a_proj_with_mqa.weight": (self.kv_lora_rank + self.qk_rope_head_dim, hidden),
            "kv_a_layernorm.weight": (self.kv_lora_rank,),
            "kv_b_proj.weight": (heads * (self.qk_nope_head_dim + self.v_head_dim), self.kv_lora_rank),
            "o_proj.weight": (hidden, heads * self.v_head_dim),
        }
        mlp = {
            "gate.weight": (self.num_experts, hidden),
            "experts.gate_up_proj": (self.num_experts, 2 * width, hidden),
            "experts.down_proj": (self.num_experts, hidden, width),
            "shared_experts.gate_proj.weight": (width, hidden),
            "shared_experts.up_proj.weight": (width, hidden),
            "shared_experts.down_proj.weight": (hidden, width),
        }
        yield from _decoder(self.vocab_size, hidden, self.num_layers, attention, mlp)

    def config(self, dtype: str) -> dict[str, object]:
        """config.json, the softmax scale's `mscale_all_dim` as published (model.md 1.2 and 1.3)."""
        qk_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        return {
            **_common_config("Mistral4ForCausalLM", "mistral4", self.vocab_size, self.hidden_size, dtype),
            "attention_bias": False,
            "first_k_dense_replace": 0,
            "head_dim": qk_dim,
            "intermediate_size": 3 * self.hidden_size,  # of dense layers, of which there is none
            "kv_lora_rank": self.kv_lora_rank,
            "max_position_embeddings": self.max_position_embeddings,
            "moe_intermediate_size": self.expert_width,
            "n_group": 1,
            "n_routed_experts": self.num_experts,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": self.num_heads,
            "num_experts_per_tok": self.experts_per_token,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_heads,
            "output_router_logits": False,
            "pad_token_id": 11,
            "pretraining_tp": 1,
            "q_lora_rank": self.q_lora_rank,
            "qk_head_dim": qk_dim,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "rms_norm_eps": 1e-6,
            "rope_interleave": True,
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 128.0,
                "llama_4_scaling_beta": 0.1,
                "max_position_embeddings": self.max_position_embeddings,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 8192,
                "partial_rotary_factor": self.qk_rope_head_dim / qk_dim,
                "rope_theta": 10000.0,
                "rope_type": "yarn",
                "type": "yarn",
            },
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
            "v_head_dim": self.v_head_dim,
        }


@dataclass(frozen=True, slots=True)
class Small3Shape:
    """Mistral Small 3: dense, grouped-query attention (true size: model.md 1.11)."""

    vocab_size: int = 131072
    hidden_size: int = 5120
    num_layers: int = 40
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    mlp_width: int = 32768
    max_position_embeddings: int = 131072

    def scaled(self, factor: float) -> Small3Shape:
        """Width, layers, heads, MLP width and vocabulary times `factor`; see `shape_of`."""
        kv_heads = _multiple(self.num_kv_heads * factor, 1)
        return replace(
            self,
            vocab_size=_multiple(self.vocab_size * factor, 256),
            hidden_size=_multiple(self.hidden_size * factor, 64),
            num_layers=_multiple(self.num_layers * factor, 1),
            num_heads=self.num_heads // self.num_kv_heads * kv_heads,
            num_kv_heads=kv_heads,
            mlp_width=_multiple(self.mlp_width * factor, 32),
        )

    def tensors(self) -> Iterator[NamedShape]:
        """(name, shape) of every parameter, in the model's order."""
        hidden, q_rows, kv_rows = (
            self.hidden_size,
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
        attention = {
            "q_proj.weight": (q_rows, hidden),
            "k_proj.weight": (kv_rows, hidden),
            "v_proj.weight": (kv_rows, hidden),
            "o_proj.weight": (hidden, q_rows),
        }
        mlp = {
            "gate_proj.weight": (self.mlp_width, hidden),
            "up_proj.weight": (self.mlp_width, hidden),
            "down_proj.weight": (hidden, self.mlp_width),
        }
        yield from _decoder(self.vocab_size, hidden, self.num_layers, attention, mlp)

    def config(self, dtype: str) -> dict[str, object]:
        """config.json."""
        return {
            **_common_config("MistralForCausalLM", "mistral", self.vocab_size, self.hidden_size, dtype),
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp_width,
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "pad_token_id": None,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 1e9, "rope_type": "default"},
            "sliding_window": None,
        }


Shape = Small4Shape | Small3Shape

# mini: the pair of benchmark checkpoints, active parameters in the proportion of Small 4 to Small 3.
# tiny: a few MB, with the true head sizes, so that kernels made for those run on it.
_PRESETS: dict[tuple[str, str], Shape] = {
    ("small4", "full"): Small4Shape(),
    ("small4", "mini"): Small4Shape(
        vocab_size=32768,
        hidden_size=1024,
        num_layers=12,
        num_heads=16,
        q_lora_rank=512,
        expert_width=512,
        max_position_embeddings=262144,
    ),
    ("small4", "tiny"): Small4Shape(
        vocab_size=1024,
        hidden_size=128,
        num_layers=3,
        num_heads=4,
        q_lora_rank=64,
        num_experts=16,
        expert_width=64,
    ),
    ("small3", "full"): Small3Shape(),
    ("small3", "mini"): Small3Shape(
        vocab_size=32768, hidden_size=1280, num_layers=14, num_heads=16, num_kv_heads=8, mlp_width=8448
    ),
    ("small3", "tiny"): Small3Shape(
        vocab_size=1024, hidden_size=128, num_layers=3, num_heads=4, num_kv_heads=2, mlp_width=512
    ),
}


def shape_of(like: str, scale: str | float) -> Shape:
    """The shape of "small4" or "small3" at a scale: "tiny", "mini", "full", or a factor in (0, 1].

    A factor multiplies hidden size, layers, heads, experts, their width (or the MLP's), the query's latent rank
    and the vocabulary, each rounded to a legal multiple and at least one of it. What kernels are made for stays:
    head sizes, the key-value latent, experts per token, query heads per key-value head. 1 is the true size.

    Raises ConfigError for another name or a factor outside (0, 1].
    """
    if like not in ("small4", "small3"):
        raise refusal("like", "small4 or small3", like)
    preset = _PRESETS.get((like, str(scale)))
    if preset is not None:
        return preset
    return _PRESETS[like, "full"].scaled(factor_of(scale))


def factor_of(scale: str | float, field: str = "scale") -> float:
    """A scale that is no name. Raises ConfigError naming the field for a factor outside (0, 1]."""
    try:
        factor = float(scale)
    except ValueError:
        factor = 0.0
    if not 0 < factor <= 1:  # a NaN is refused too
        raise refusal(field, "tiny, mini, full or a number in (0, 1]", scale)
    return factor


def named_model_config(name: str) -> ModelConfig | None:
    """The config of "small4" or "small3" at true size, where no checkpoint is at hand; None for any other name and
    where there is a folder of this name."""
    if name not in ("small4", "small3") or Path(name).is_dir():
        return None
    return parse_config(Fields(shape_of(name, "full").config("bfloat16")))


def _multiple(size: float, unit: int) -> int:
    return max(1, round(size / unit)) * unit


def _decoder(
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    attention: Mapping[str, tuple[int, ...]],
    mlp: Mapping[str, tuple[int, ...]],
) -> Iterator[NamedShape]:
    yield "model.embed_tokens.weight", (vocab_size, hidden_size)
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        yield from ((f"{prefix}.self_attn.{name}", shape) for name, shape in attention.items())
        yield from ((f"{prefix}.mlp.{name}", shape) for name, shape in mlp.items())
        yield f"{prefix}.input_layernorm.weight", (hidden_size,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden_size,)
    yield "model.norm.weight", (hidden_size,)
    yield "lm_head.weight", (vocab_size, hidden_size)


def _common_config(
    architecture: str, model_type: str, vocab_size: int, hidden_size: int, dtype: str
) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": dtype,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "model_type": model_type,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": vocab_size,
    }
