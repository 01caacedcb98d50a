"""config.json -> `ModelConfig`: the spelling of Hugging Face's checkpoints. No torch here.

Knows transformers' `mistral4`, `ministral3`, `mistral` and `llama`, and the multimodal types that wrap one of them
as their `text_config`: `mistral3`, `llava` and `llava_next`.
A field that is missing has the default of transformers' class (`config_defaults`). One that would change the
arithmetic and is malformed or unsupported is a CheckpointError that names it; fields that have no bearing on
inference are ignored.
"""

from __future__ import annotations

import msgspec

from cierzo.engine.fields import Fields
from cierzo.engine.model.config import GqaConfig, MlaConfig, ModelConfig, MoeConfig, QueryScaling, check_groups
from cierzo.engine.model.config_defaults import DEFAULTS, EOS_TOKEN_ID, WRAPPED, WRAPPERS
from cierzo.engine.model.rope_config import Llama3Config, RopeConfig, YarnConfig, read_rope
from cierzo.engine.model.vision_config import read_pixtral


def parse_config(outer: Fields, ends_elsewhere: bool = False, text_only: bool = False) -> ModelConfig:
    """The model of a config.json.

    ends_elsewhere: generation_config.json names end-of-text ids, so that the default of transformers' class is not
    meant. text_only: a vision tower is not read.
    """
    wrapper = outer.string("model_type")
    fields = _wrapped(outer) if wrapper in WRAPPERS else outer
    architecture = fields.string("model_type")
    if architecture not in DEFAULTS:
        known = f"{', '.join(DEFAULTS)}, or around one of them {', '.join(WRAPPERS)}"
        raise fields.error("model_type", architecture, known)
    fields.fill_in(DEFAULTS[architecture])
    fields.fill_in({"eos_token_id": [] if ends_elsewhere else EOS_TOKEN_ID})
    model = _mistral4(fields) if architecture == "mistral4" else _dense(fields, architecture)
    if text_only or wrapper != "mistral3":  # the others' towers are of another kind
        return model
    return msgspec.structs.replace(model, vision=read_pixtral(outer, model.rms_norm_eps))


def _wrapped(outer: Fields) -> Fields:
    """The text model of a multimodal one."""
    wrapper = outer.string("model_type")
    fields = outer.section("text_config")
    fields.fill_in(WRAPPED[wrapper])
    outer.fill_in(WRAPPERS[wrapper])
    fields.inherit(outer, "bos_token_id", "eos_token_id")
    # llava's class alone takes over a true flag of its text model where its own is false
    if wrapper != "llava" or outer.boolean("tie_word_embeddings"):
        fields.inherit(outer, "tie_word_embeddings")
    return fields


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
    return _model(fields, attention, _moe(fields), rope, _query_scaling(rope, parameters))


def _query_scaling(rope: RopeConfig, parameters: Fields) -> QueryScaling | None:
    """Llama-4's, which stands among the rope settings and counts from the same original length."""
    beta = parameters.number("llama_4_scaling_beta", minimum=0.0)
    if isinstance(rope.scaling, YarnConfig | Llama3Config):
        original = rope.scaling.original_positions
    else:
        original = parameters.integer("original_max_position_embeddings")
    return QueryScaling(beta=beta, original_positions=original) if beta else None


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
    rope, parameters = read_rope(fields, dim=head_dim, interleaved=False, rotated_share=1.0)
    scaling = _query_scaling(rope, parameters) if architecture == "ministral3" else None
    return _model(fields, attention, None, rope, scaling)


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
    transformers' `mistral` has one of 4096 where the field is missing; it and `ministral3` ignore
    `use_sliding_window`."""
    architecture = fields.string("model_type")
    told_off = architecture not in ("mistral", "ministral3")
    if fields.has("layer_types") or (told_off and fields.get("use_sliding_window", None) is False):
        return
    longest = fields.integer("max_position_embeddings")
    window = fields.optional_integer("sliding_window", default=None)
    if window is not None and window < longest:
        unsaid = DEFAULTS[architecture].get("sliding_window")
        default = "" if unsaid is None else f" (if missing, it is {unsaid})"
        raise fields.error(
            "sliding_window", window, f"null, or at least max_position_embeddings {longest}{default}"
        )
