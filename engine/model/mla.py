"""Multi-head latent attention: prompt rows in expanded form, generated rows in absorbed form.

Cached per token: [ latent after its norm (R) | rope key after its rotation, not normed (P) ]. Nothing cached
depends on the query's scale, so a prefix is reusable at its positions. Source: DeepSeek-V2, arXiv 2405.04434.
Small 4: 32 heads, R 256, P 64, nope 64, V 128, hence 320 cached values per token and layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cierzo.cache.pool import GqaPages, MlaPages
from cierzo.engine.model.config import LATENT_NORM_EPS, MlaConfig, ModelConfig
from cierzo.engine.model.inputs import ModelInputs
from cierzo.engine.model.layers import Parameters, Shard, StepTables
from cierzo.engine.weights.loader import ParameterSpec
from cierzo.kernels.ops import attention, linear, norm, rope


@dataclass(frozen=True, slots=True)
class QueryProjection:
    """x -> queries [T, H*(nope+P)]; through a normed latent where the model has a q_lora_rank."""

    down: Tensor | None
    latent_norm: Tensor | None
    up: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x [T,D] -> this rank's heads, flat."""
        if self.down is not None and self.latent_norm is not None:
            x = norm.rms_norm(linear.linear(x, self.down), self.latent_norm, LATENT_NORM_EPS)
        return linear.linear(x, self.up)


@dataclass(frozen=True, slots=True)
class MultiHeadLatentAttention:
    """One layer's attention on one rank, with its share of the heads and all of the latents.

    w_uk [H,nope,R] and w_uv [H,V,R] are kv_b_proj, taken apart at load.
    """

    query: QueryProjection
    kv_down: Tensor
    kv_norm: Tensor
    w_uk: Tensor
    w_uv: Tensor
    output: Tensor
    interleaved: bool
    scale: float

    @staticmethod
    def specs(prefix: str, config: ModelConfig, mla: MlaConfig) -> dict[str, ParameterSpec]:
        """Parameters as transformers names them."""
        hidden, heads, rank = config.hidden_size, config.num_heads, mla.kv_lora_rank
        query_width = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        if mla.q_lora_rank is None:
            query = {"q_proj.weight": ParameterSpec((query_width, hidden), shard_axis=0)}
        else:
            query = {
                "q_a_proj.weight": ParameterSpec((mla.q_lora_rank, hidden)),
                "q_a_layernorm.weight": ParameterSpec((mla.q_lora_rank,)),
                "q_b_proj.weight": ParameterSpec((query_width, mla.q_lora_rank), shard_axis=0),
            }
        kv_width = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        rest = {
            "kv_a_proj_with_mqa.weight": ParameterSpec((rank + mla.qk_rope_head_dim, hidden)),
            "kv_a_layernorm.weight": ParameterSpec((rank,)),
            "kv_b_proj.weight": ParameterSpec((kv_width, rank), shard_axis=0),
            "o_proj.weight": ParameterSpec((hidden, heads * mla.v_head_dim), shard_axis=1),
        }
        return {prefix + name: spec for name, spec in (query | rest).items()}

    @classmethod
    def build(
        cls, parameters: Parameters, config: ModelConfig, mla: MlaConfig, shard: Shard
    ) -> MultiHeadLatentAttention:
        """From a layer's parameters."""
        heads = shard.width(config.num_heads, "num_attention_heads")
        if mla.q_lora_rank is None:
            query = QueryProjection(None, None, parameters["q_proj.weight"])
        else:
            names = ("q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight")
            query = QueryProjection(*(parameters[name] for name in names))
        kv_up = parameters["kv_b_proj.weight"].view(heads, -1, mla.kv_lora_rank)
        w_uk, w_uv = kv_up.split((mla.qk_nope_head_dim, mla.v_head_dim), dim=1)
        return cls(
            query=query,
            kv_down=parameters["kv_a_proj_with_mqa.weight"],
            kv_norm=parameters["kv_a_layernorm.weight"],
            w_uk=w_uk.contiguous(),
            w_uv=w_uv.contiguous(),
            output=parameters["o_proj.weight"],
            interleaved=config.rope.interleaved,
            scale=config.softmax_scale,
        )

    def forward(self, x: Tensor, inputs: ModelInputs, tables: StepTables, pages: MlaPages | GqaPages) -> Tensor:
        """x [T,D] -> this rank's partial sum [T,D]; writes the rows' latents first."""
        assert isinstance(pages, MlaPages), type(pages)
        heads, nope, rank = self.w_uk.shape
        q = self.query.forward(x).view(x.shape[0], heads, -1)
        latent, rope_key = linear.linear(x, self.kv_down).tensor_split((rank,), dim=-1)
        rope.apply_rope(q[..., nope:], tables.cos, tables.sin, self.interleaved)
        rope.apply_rope(rope_key[:, None], tables.cos, tables.sin, self.interleaved)
        if tables.query_scale is not None:
            q.mul_(tables.query_scale)
        latent = norm.rms_norm(latent, self.kv_norm, LATENT_NORM_EPS)
        attention.write_latents(pages.latents, inputs.cache_slots, latent, rope_key)
        return linear.linear(self._attend(q, inputs, pages.latents).flatten(1), self.output)

    def _attend(self, q: Tensor, inputs: ModelInputs, latents: Tensor) -> Tensor:
        """q [T,H,nope+P] -> [T,H,V], each row in its own form."""
        expanded, absorbed = q[: inputs.num_expanded], q[inputs.num_expanded :]
        results = []
        if len(expanded):
            results.append(
                attention.mla_prefill(expanded, latents, self.w_uk, self.w_uv, inputs.expanded, self.scale)
            )
        if len(absorbed):
            wide = attention.mla_absorb(absorbed, self.w_uk)
            mixed = attention.mla_decode(wide, latents, inputs.absorbed, self.scale, self.w_uk.shape[2])
            results.append(attention.mla_unabsorb(mixed, self.w_uv))
        return results[0] if len(results) == 1 else torch.cat(results)
