"""The metadata of a llama-architecture GGUF file -> the model's shape and its config.json.

A key that would change the arithmetic and has no place in a config.json of transformers' `llama`, or that is not
known here, is a CheckpointError that names it: none of `llama.` and `tokenizer.ggml.` is dropped. A key that is
missing has llama.cpp's default (that of `llama_model::load_hparams` and of `llama_context`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cierzo.engine.fields import Fields

if TYPE_CHECKING:
    from gguf import GGUFReader

# Keys of features that this architecture has not, and the value of each that leaves it off.
_OFF: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "logit_scale": 0.0,
    "use_parallel_residual": False,
}
# Keys without a bearing on the arithmetic, or only on that of a scaling that reads them.
_IDLE = ("tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length")


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes of a llama model, and `rope_parameters` as transformers 5 spells them."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope_parameters: dict[str, Any]

    def config(self, tied: bool) -> dict[str, object]:
        """The config.json of transformers' LlamaForCausalLM, without the ids of special tokens."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            "head_dim": self.head_dim,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.context_length,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": self.rope_parameters,
            "tie_word_embeddings": tied,
            "vocab_size": self.vocab_size,
        }


def read_section(reader: GGUFReader, prefix: str, file: str) -> Fields:
    """The metadata whose keys begin with `prefix`, under the rest of their keys. file: named in complaints."""
    values = {
        key.removeprefix(prefix): field.contents() for key, field in reader.fields.items() if key.startswith(prefix)
    }
    return Fields(values, prefix, file)


def read_shape(reader: GGUFReader, file: str, num_tokens: int) -> LlamaShape:
    """The shape that the metadata describe. num_tokens: of the tokenizer. Raises CheckpointError naming the key."""
    general = read_section(reader, "general.", file)
    general.only("architecture", ("llama",))
    general.only("type", ("model",), default="model")  # others are adapters, projectors, calibrations
    read_section(reader, "split.", file).only("count", (0, 1), default=1)
    llama = read_section(reader, "llama.", file)
    num_heads, hidden_size = llama.integer("attention.head_count"), llama.integer("embedding_length")
    even_share = hidden_size // num_heads
    head_dim = llama.integer("attention.key_length", even_share)
    llama.only("attention.value_length", (head_dim,), default=even_share)
    llama.only("rope.dimension_count", (head_dim,), default=head_dim)
    if head_dim % 2:
        raise llama.error("attention.key_length", head_dim, "an even number")
    context_length = llama.integer("context_length")
    llama.only("vocab_size", (num_tokens,), default=num_tokens)
    shape = LlamaShape(
        num_layers=llama.integer("block_count"),
        hidden_size=hidden_size,
        intermediate_size=llama.integer("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=llama.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=num_tokens,
        context_length=context_length,
        rms_norm_eps=llama.number("attention.layer_norm_rms_epsilon", minimum=0.0),
        rope_parameters=_rope_parameters(llama, context_length),
    )
    _refuse_unknown(llama, context_length)
    return shape


def _rope_parameters(llama: Fields, context_length: int) -> dict[str, Any]:
    """A file that names a factor and no type means linear scaling; a factor of 0 means none."""
    theta = llama.number("rope.freq_base", 10000.0, minimum=1.0)
    kind = llama.string("rope.scaling.type", "linear")
    factor = llama.number("rope.scaling.factor", llama.get("rope.scale_linear", 1.0)) or 1.0
    if kind == "yarn":
        return {"rope_type": "yarn", "rope_theta": theta, **_yarn(llama, factor, context_length)}
    if kind not in ("none", "linear"):
        raise llama.error("rope.scaling.type", kind, "none, linear or yarn")
    if kind == "linear" and factor != 1.0:
        raise llama.error("rope.scaling.factor", factor, "1 for linear scaling (others unsupported)")
    llama.only("rope.scaling.attn_factor", (1.0,), default=1.0)
    return {"rope_type": "default", "rope_theta": theta}


def _yarn(llama: Fields, factor: float, context_length: int) -> dict[str, Any]:
    """YaRN's part of rope_parameters. `attn_factor` multiplies YaRN's own magnitude, which transformers'
    `attention_factor` replaces. Without its full blend (`yarn_ext_factor` 1) it would be linear scaling in part."""
    if factor < 1.0:
        raise llama.error("rope.scaling.factor", factor, "at least 1")
    llama.only("rope.scaling.yarn_ext_factor", (1.0, -1.0), default=1.0)  # -1: not set
    llama.only("rope.scaling.yarn_attn_factor", (1.0,), default=1.0)
    llama.only("rope.scaling.yarn_log_multiplier", (0.0,), default=0.0)
    attention = llama.number("rope.scaling.attn_factor", 1.0)
    return {
        "factor": factor,
        "original_max_position_embeddings": llama.integer("rope.scaling.original_context_length", context_length),
        "beta_fast": llama.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": llama.number("rope.scaling.yarn_beta_slow", 1.0),
        "attention_factor": attention * (1.0 + 0.1 * math.log(factor)),
    }


def _refuse_unknown(llama: Fields, context_length: int) -> None:
    for name, off in _OFF.items():
        llama.only(name, (off,), default=off)
    window = llama.integer("attention.sliding_window", 0, minimum=0)
    if 0 < window < context_length:
        raise llama.error("attention.sliding_window", window, f"0, or at least context_length {context_length}")
    for name in llama.unread():
        if name not in _IDLE:
            raise llama.error(name, llama.get(name), "left out: nothing here computes what it asks for")
