"""A model's architecture: every hyperparameter that the models read. No torch here.

A checkpoint's folder tells it (`read_config`), in one of two files: `config_json` and `params_json` read them.
"""

from __future__ import annotations

from typing import Literal, cast

import msgspec

from cierzo.cache.layout import CacheDtype, CacheLayout
from cierzo.engine.fields import Fields
from cierzo.engine.model.rope_config import RopeConfig

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


class VisionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tower that turns an image into embeddings for the text model: Pixtral's, whose patches are merged.

    An image is cut into patches of `patch` pixels square; `merge` x `merge` of them become one token.
    `max_side_px`: the longer side of the largest image. norm_eps: of the tower's norms; projector_norm_eps: of the
    one behind it. The token ids stand for an image in a prompt: for a merged token, a row's end, the image's end.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_width: int
    patch: int
    merge: int
    max_side_px: int
    rope_theta: float
    projector_norm_eps: float
    image_token_id: int
    break_token_id: int
    end_token_id: int
    norm_eps: float = 1e-5  # no config says it: transformers and vLLM have it so

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def unit_px(self) -> int:
        """Pixels of a merged token's side; images are whole multiples of it."""
        return self.patch * self.merge

    def num_parameters(self, text_width: int) -> int:
        """Parameters of tower and projector in front of a text model of this hidden size."""
        hidden, merged = self.hidden_size, self.merge**2
        layer = 4 * hidden * hidden + 3 * hidden * self.mlp_width + 2 * hidden
        projector = merged * hidden * hidden + hidden * text_width + text_width * text_width
        return 3 * self.patch**2 * hidden + hidden + self.num_layers * layer + hidden + projector


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model's architecture. `softmax_scale_override` replaces (query-key width)^-0.5.

    `max_position_embeddings` is None where the checkpoint does not say it; then a user must say how long requests
    may be. `tie_word_embeddings`: an output head that the checkpoint stores counts all the same. `vision`: None
    where there is no tower, or none that is used.
    """

    architecture: Literal["mistral4", "ministral3", "mistral", "llama"]
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
    vision: VisionConfig | None = None
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
