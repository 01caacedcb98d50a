"""params.json -> `ModelConfig`: the spelling of Mistral's own checkpoints. No torch here.

Small 4 has `qk_nope_head_dim` and `moe`; the dense models have neither. Ministral 3 and Devstral Small 2 are dense
models with `yarn` and `llama_4_scaling`; Pixtral and Small 3.1 have a `vision_encoder` (vision_config.py). What
params.json leaves unsaid is the same in all of them: SiLU, no biases, a softmax over the experts that is
renormalised over the chosen ones, <s> and </s> as ids 1 and 2. Source: vLLM's transformers_utils/configs/mistral.py
and the published file of Small 4.
"""

from __future__ import annotations

import math
from typing import Literal

from cierzo.engine.fields import Fields
from cierzo.engine.model.config import GqaConfig, MlaConfig, ModelConfig, MoeConfig, QueryScaling, check_groups
from cierzo.engine.model.rope_config import RopeConfig, YarnConfig
from cierzo.engine.model.vision_config import read_encoder

# Fields that say nothing about a text model's arithmetic on one device. The vision tower and quantisation are read
# elsewhere (vision_config.py, checkpoint_format.py), the former only where it is used; max_seq_len stands in for
# max_position_embeddings in older files.
HARMLESS = frozenset(
    {
        *("quantization", "quantization_config", "vision_encoder", "max_seq_len"),
        *("moe.expert_parallel", "moe.expert_model_parallel"),
    }
)
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2}  # of every tokenizer of these models


def read_params(fields: Fields, text_only: bool = False) -> ModelConfig:
    """The architecture that params.json describes. text_only: a vision tower is not read.

    Raises CheckpointError naming a field that is missing, malformed, or asks for what the models cannot compute.
    """
    fields.fill_in(TOKEN_IDS)
    fields.only("activation", ("silu", None), default=None)
    fields.only("model_type", ("transformer", None), default=None)
    fields.only("use_biases", (False, None), default=None)
    yarn = _yarn(fields)
    longest = _positions(fields, yarn)
    _refuse_sliding_window(fields, longest)
    is_mla = fields.has("qk_nope_head_dim")
    attention = _mla(fields) if is_mla else _gqa(fields)
    rotated = attention.qk_rope_head_dim if isinstance(attention, MlaConfig) else attention.head_dim
    vocab_size, norm_eps = fields.integer("vocab_size"), fields.number("norm_eps", minimum=0.0)
    return ModelConfig(
        architecture=_architecture(fields, is_mla),
        vocab_size=vocab_size,
        hidden_size=fields.integer("dim"),
        num_layers=fields.integer("n_layers"),
        num_heads=fields.integer("n_heads"),
        mlp_width=fields.integer("hidden_dim"),
        max_position_embeddings=longest,
        rms_norm_eps=norm_eps,
        tie_word_embeddings=_tied(fields),
        attention=attention,
        moe=_moe(fields) if is_mla else None,
        # Dense weights' pairs are brought into the other order when they are loaded; MLA's stay as they are.
        rope=RopeConfig(
            dim=rotated, theta=fields.number("rope_theta", minimum=1.0), interleaved=is_mla, scaling=yarn
        ),
        query_scaling=_query_scaling(fields),
        bos_token_id=fields.token_id("bos_token_id", vocab_size),
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
        vision=None if text_only else read_encoder(fields, norm_eps),
    )


def _architecture(fields: Fields, is_mla: bool) -> Literal["mistral4", "ministral3", "mistral"]:
    if is_mla:
        return "mistral4"
    return "ministral3" if fields.has("llama_4_scaling") else "mistral"


def _positions(fields: Fields, yarn: YarnConfig | None) -> int | None:
    """`max_position_embeddings`; older files have `max_seq_len` alone. Where neither is said, it is what YaRN
    stretches to; without YaRN (Small 3.1, 7B v0.3) no field tells it, and None is given."""
    for name in ("max_position_embeddings", "max_seq_len"):
        if fields.has(name):
            return fields.integer(name)
    return None if yarn is None else int(yarn.factor * yarn.original_positions)


def _tied(fields: Fields) -> bool:
    return fields.boolean("tied_embeddings") if fields.has("tied_embeddings") else False


def _refuse_sliding_window(fields: Fields, longest: int | None) -> None:
    window = fields.get("sliding_window", None)
    if window is None:
        return
    if longest is None or not isinstance(window, int) or isinstance(window, bool) or window < longest:
        raise fields.error(
            "sliding_window", window, f"null, or at least the positions, {longest or 'which are not said'}"
        )


def _mla(fields: Fields) -> MlaConfig:
    heads = fields.integer("n_heads")
    fields.only("n_kv_heads", (heads, None), default=None)
    attention = MlaConfig(
        q_lora_rank=fields.optional_integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.even("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
    )
    qk_dim = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    fields.only("head_dim", (qk_dim, None), default=None)
    return attention


def _gqa(fields: Fields) -> GqaConfig:
    fields.only("moe", (None,), default=None)  # Mixtral's
    heads, kv_heads = fields.integer("n_heads"), fields.integer("n_kv_heads")
    if heads % kv_heads:
        raise fields.error("n_kv_heads", kv_heads, f"a divisor of n_heads {heads}")
    return GqaConfig(num_kv_heads=kv_heads, head_dim=fields.even("head_dim"))


def _moe(fields: Fields) -> MoeConfig:
    inner = fields.section("moe")
    inner.only("route_every_n", (1, None), default=None)
    moe = MoeConfig(
        num_experts=inner.integer("num_experts"),
        experts_per_token=inner.integer("num_experts_per_tok"),
        expert_width=inner.integer("expert_hidden_dim"),
        num_shared_experts=inner.integer("num_shared_experts"),
        num_groups=inner.integer("num_expert_groups", 1),
        top_groups=inner.integer("num_expert_groups_per_tok", 1),
        first_dense_layers=inner.integer("first_k_dense_replace", 0, minimum=0),
        renormalise=True,
        routed_scale=inner.number("routed_scale", 1.0),
    )
    check_groups(inner, moe, ("num_experts", "num_expert_groups", "num_expert_groups_per_tok"))
    return moe


def _yarn(fields: Fields) -> YarnConfig | None:
    """`apply_scale` false, as Small 4's is: no magnitude anywhere. True, or unsaid: YaRN's own, 0.1 ln(factor) + 1,
    on cos and sin. Older models have no yarn, or null."""
    if not fields.has("yarn"):
        return None
    yarn = fields.section("yarn")
    factor = yarn.number("factor", minimum=1.0)
    scaled = yarn.boolean("apply_scale", True)
    return YarnConfig(
        factor=factor,
        original_positions=yarn.integer("original_max_position_embeddings"),
        beta_fast=yarn.number("beta"),
        beta_slow=yarn.number("alpha"),
        magnitude=0.1 * math.log(factor) + 1.0 if scaled else 1.0,
    )


def _query_scaling(fields: Fields) -> QueryScaling | None:
    if not fields.has("llama_4_scaling"):
        return None
    inner = fields.section("llama_4_scaling")
    beta = inner.number("beta", minimum=0.0)
    scaling = QueryScaling(beta=beta, original_positions=inner.integer("original_max_position_embeddings"))
    return scaling if beta else None
