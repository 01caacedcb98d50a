"""config.json -> `ModelConfig`: every hyperparameter that the models read, and an error for what they cannot do.

Knows transformers' `mistral4`, `mistral` and `llama`, and `mistral3`, which wraps one of them as its `text_config`;
params.json, where a folder has that instead, is read by `params_json`. A field that is missing has the default of
transformers' class (`config_defaults`). One that would change the arithmetic and is malformed or unsupported is a
CheckpointError that names it; fields that have no bearing on inference are ignored. No torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import msgspec

from cierzo.cache.layout import CacheDtype, CacheLayout
from cierzo.engine.checkpoint_format import CONFIG_NAME, PARAMS_NAME, find_format
from cierzo.engine.fields import Fields, naming_unreadable, read_json, require_file
from cierzo.engine.model.config_defaults import DEFAULTS, EOS_TOKEN_ID, MISTRAL3, MISTRAL3_TEXT
from cierzo.engine.model.rope_config import RopeConfig, read_rope

LATENT_NORM_EPS = 1e-6  # transformers' Mistral4 builds its two latent norms with this, whatever rms_norm_eps says


class MlaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="mla"):
    """Multi-head latent attention: R is `kv_lora_rank`, P `qk_rope_head_dim`, V `v_head_dim`."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


class GqaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="gqa"):
    """Grouped-query attention: `num_heads / num_kv_heads` query heads share one key-value head."""

    num_kv_heads: int
    head_dim: int


class MoeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Routed experts: E is `num_experts`, K `experts_per_token`, F `expert_width`; layers below
    `first_dense_layers` have one dense MLP instead."""

    num_experts: int
    experts_per_token: int
    expert_width: int
    num_shared_experts: int
    num_groups: int
    top_groups: int
    first_dense_layers: int
    renormalise: bool
    routed_scale: float


class QueryScaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Llama-4's: the query at position p is multiplied by 1 + beta ln(1 + floor(p / original_positions))."""

    beta: float
    original_positions: int


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model's architecture. `softmax_scale_override` replaces (query-key width)^-0.5.

    `max_position_embeddings` is None where the checkpoint does not say it; then a user must say how long requests
    may be. `tie_word_embeddings`: an output head that the checkpoint stores counts all the same.
    """

    architecture: Literal["mistral4", "mistral", "llama"]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_width: int
    max_position_embeddings: int | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention: MlaConfig | GqaConfig
    moe: MoeConfig | None
    rope: RopeConfig
    query_scaling: QueryScaling | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    softmax_scale_override: float | None = None

    @property
    def softmax_scale(self) -> float:
        """The factor that attention scores are multiplied by.

        Without YaRN's magnitude term, whatever mscale_all_dim says: Small 4's own params.json has apply_scale
        false, and vLLM and SGLang compute it so (vllm#57563, sglang#26203). transformers from July 2026 on and
        llama.cpp multiply by (0.1 ln 128 + 1)^2 = 2.2 here; the override lets one compare on real weights.
        """
        if self.softmax_scale_override is not None:
            return self.softmax_scale_override
        attention = self.attention
        if isinstance(attention, MlaConfig):
            return (attention.qk_nope_head_dim + attention.qk_rope_head_dim) ** -0.5
        return attention.head_dim**-0.5

    def cache_layout(self, block_tokens: int, dtype: str, world: int = 1) -> CacheLayout:
        """The layout of one rank's KV cache. Latents are whole on every rank, key-value heads are divided."""
        value_type = cast(CacheDtype, dtype)
        if isinstance(self.attention, MlaConfig):
            values = self.attention.kv_lora_rank + self.attention.qk_rope_head_dim
            return CacheLayout(
                kind="mla",
                num_layers=self.num_layers,
                block_tokens=block_tokens,
                latent_values=values,
                dtype=value_type,
            )
        return CacheLayout(
            kind="gqa",
            num_layers=self.num_layers,
            block_tokens=block_tokens,
            num_kv_heads=self.attention.num_kv_heads // world,
            head_dim=self.attention.head_dim,
            dtype=value_type,
        )


def read_model_config(path: Path) -> ModelConfig:
    """Read `path`/config.json, or params.json where that is the layout of the folder (`find_layout`), and the
    end-of-text ids of `path`/generation_config.json where there is one. A quantisation that cannot be loaded is
    refused here already. Ids beyond the vocabulary are left out."""
    with naming_unreadable(path):
        layout = find_format(path).layout
        generation = _generation_config(path)
        if layout == "native":
            from cierzo.engine.model.params_json import read_params  # needs this module's classes

            config = read_params(Fields(read_json(path / PARAMS_NAME), file=PARAMS_NAME))
        else:
            config = parse_config(Fields(read_json(path / CONFIG_NAME)), generation.has("eos_token_id"))
    eos = (*config.eos_token_ids, *generation.token_ids("eos_token_id", config.vocab_size))
    return msgspec.structs.replace(config, eos_token_ids=tuple(dict.fromkeys(eos)))


def _generation_config(path: Path) -> Fields:
    """The fields of generation_config.json; none where there is no such file."""
    file = path / "generation_config.json"
    require_file(file)
    return Fields(read_json(file) if file.exists() else {}, file=file.name)


def parse_config(outer: Fields, ends_elsewhere: bool = False) -> ModelConfig:
    """The model of a config.json.

    ends_elsewhere: generation_config.json names end-of-text ids, so that the default of transformers' class is not
    meant.
    """
    fields = outer
    if outer.string("model_type") == "mistral3":
        fields = outer.section("text_config")
        fields.fill_in(MISTRAL3_TEXT)
        outer.fill_in(MISTRAL3)
        fields.inherit(outer, "tie_word_embeddings", "bos_token_id", "eos_token_id")
    architecture = fields.string("model_type")
    if architecture not in DEFAULTS:
        raise fields.error("model_type", architecture, "mistral4, mistral, llama, or mistral3 around one of them")
    fields.fill_in(DEFAULTS[architecture])
    fields.fill_in({"eos_token_id": [] if ends_elsewhere else EOS_TOKEN_ID})
    return _mistral4(fields) if architecture == "mistral4" else _dense(fields, architecture)


def _mistral4(fields: Fields) -> ModelConfig:
    heads = fields.integer("num_attention_heads")
    fields.only("num_key_value_heads", (heads, None), default=None)
    attention = MlaConfig(
        q_lora_rank=fields.optional_integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.even("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
    )
    qk_dim = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    fields.only("head_dim", (qk_dim, None), default=None)
    rope, parameters = read_rope(
        fields,
        dim=attention.qk_rope_head_dim,
        interleaved=fields.boolean("rope_interleave"),
        rotated_share=attention.qk_rope_head_dim / qk_dim,
    )
    beta = parameters.number("llama_4_scaling_beta", minimum=0.0)
    original = rope.yarn.original_positions if rope.yarn else parameters.integer("original_max_position_embeddings")
    scaling = QueryScaling(beta=beta, original_positions=original)
    return _model(fields, attention, _moe(fields), rope, scaling if beta else None)


def _moe(fields: Fields) -> MoeConfig:
    moe = MoeConfig(
        num_experts=fields.integer("n_routed_experts"),
        experts_per_token=fields.integer("num_experts_per_tok"),
        expert_width=fields.integer("moe_intermediate_size"),
        num_shared_experts=fields.integer("n_shared_experts"),
        num_groups=fields.integer("n_group"),
        top_groups=fields.integer("topk_group"),
        first_dense_layers=fields.integer("first_k_dense_replace", minimum=0),
        renormalise=fields.boolean("norm_topk_prob"),
        routed_scale=fields.number("routed_scaling_factor"),
    )
    check_groups(fields, moe, ("n_routed_experts", "n_group", "topk_group"))
    return moe


def check_groups(fields: Fields, moe: MoeConfig, names: tuple[str, str, str]) -> None:
    """Raise CheckpointError where the chosen experts cannot be chosen. names: those of the file's fields that
    number experts, groups and the groups chosen."""
    experts, groups, top_groups = names
    if moe.num_experts % moe.num_groups:
        raise fields.error(groups, moe.num_groups, f"a divisor of {experts} {moe.num_experts}")
    group_experts = moe.num_experts // moe.num_groups
    if moe.num_groups > 1 and group_experts < 2:  # a group is ranked by its two best experts
        raise fields.error(groups, moe.num_groups, "groups of at least two experts")
    if moe.top_groups > moe.num_groups:
        raise fields.error(top_groups, moe.top_groups, f"at most {groups} {moe.num_groups}")
    if moe.experts_per_token > moe.top_groups * group_experts:
        limit = f"at most {moe.top_groups * group_experts}, the experts in {top_groups} groups"
        raise fields.error("num_experts_per_tok", moe.experts_per_token, limit)


def _dense(fields: Fields, architecture: str) -> ModelConfig:
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    kv_heads = fields.optional_integer("num_key_value_heads") or heads
    if architecture == "llama":
        fields.only("mlp_bias", (False, None), default=None)
        fields.only("pretraining_tp", (1, None), default=None)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")
    head_dim = fields.optional_integer("head_dim", default=None) or hidden // heads
    if head_dim % 2:
        raise fields.error("head_dim", head_dim, "an even number")
    attention = GqaConfig(num_kv_heads=kv_heads, head_dim=head_dim)
    rope, _ = read_rope(fields, dim=head_dim, interleaved=False, rotated_share=1.0)
    return _model(fields, attention, None, rope, None)


def _model(
    fields: Fields,
    attention: MlaConfig | GqaConfig,
    moe: MoeConfig | None,
    rope: RopeConfig,
    query_scaling: QueryScaling | None,
) -> ModelConfig:
    """Read the fields that all architectures have."""
    fields.only("attention_bias", (False, None), default=None)
    fields.only("hidden_act", ("silu", "swish"))
    _refuse_other_layers(fields)
    _refuse_sliding_window(fields)
    vocab_size = fields.integer("vocab_size")
    return ModelConfig(
        architecture=fields.string("model_type"),  # type: ignore[arg-type]  # one of those in DEFAULTS
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=fields.integer("num_attention_heads"),
        mlp_width=fields.integer("intermediate_size"),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps", minimum=0.0),
        tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        attention=attention,
        moe=moe,
        rope=rope,
        query_scaling=query_scaling,
        bos_token_id=fields.token_id("bos_token_id", vocab_size),
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
    )


def _refuse_other_layers(fields: Fields) -> None:
    """All layers must attend to all positions, and be alike."""
    layers = fields.integer("num_hidden_layers")
    kinds = fields.get("layer_types", None)
    names = ("full_attention", "attention")  # the latter is an older one
    if kinds is not None and (not isinstance(kinds, list) or [kind in names for kind in kinds] != [True] * layers):
        raise fields.error("layer_types", kinds, f'null, or {layers} times "full_attention"')
    fields.only("per_layer_config", ({}, None), default=None)


def _refuse_sliding_window(fields: Fields) -> None:
    """A window of at least the whole context never cuts anything, nor does one that no layer of `layer_types` has.
    transformers' `mistral` has one of 4096 where the field is missing, and no `use_sliding_window`."""
    mistral = fields.string("model_type") == "mistral"
    if fields.has("layer_types") or (not mistral and fields.get("use_sliding_window", None) is False):
        return
    longest = fields.integer("max_position_embeddings")
    window = fields.optional_integer("sliding_window", default=None)
    if window is not None and window < longest:
        default = f" (if missing, it is {DEFAULTS['mistral']['sliding_window']})" if mistral else ""
        raise fields.error(
            "sliding_window", window, f"null, or at least max_position_embeddings {longest}{default}"
        )
