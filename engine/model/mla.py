"""Multi-head latent attention: prompt rows in expanded form, generated rows in absorbed form.

Cached per token: [ latent after its norm (R) | rope key after its rotation, not normed (P) ]. Nothing cached
depends on the query's scale, so a prefix is reusable at its positions. Source: DeepSeek-V2, arXiv 2405.04434.
Small 4: 32 heads, R 256, P 64, nope 64, V 128, hence 320 cached values per token and layer.
"""

from __future__ import annotations

from torch import Tensor

from cierzo.engine.model.config import LATENT_NORM_EPS, MlaConfig, ModelConfig
from cierzo.engine.parameters import MatrixRequest, Parameters, ParameterSpec, Shard, as_tensor
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.block import MlaWeights


def specs(config: ModelConfig, mla: MlaConfig) -> dict[str, ParameterSpec]:
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
    return query | rest


def build(parameters: Parameters, norm: Tensor, config: ModelConfig, mla: MlaConfig, shard: Shard) -> MlaWeights:
    """The attention of one layer with this rank's heads and all latents, and the norm before it. kv_b_proj is taken
    apart: W_UK above W_UV, by head."""
    heads = shard.width(config.num_heads, "num_attention_heads")
    nope, value, rank = mla.qk_nope_head_dim, mla.v_head_dim, mla.kv_lora_rank
    latent, whole = mla.q_lora_rank is not None, parameters.stored("kv_b_proj.weight")

    def part(name: str, begin: int, width: int, transposed: bool = False) -> Matrix:
        def make() -> Tensor:
            by_head = as_tensor(whole).view(heads, nope + value, rank)[:, begin : begin + width]
            return (by_head.transpose(1, 2) if transposed else by_head).contiguous()

        shape = (heads, rank, width) if transposed else (heads, width, rank)
        return parameters.derived(MatrixRequest(name, shape, make, role="latent", parts=(whole,)))

    return MlaWeights(
        norm=norm,
        down=parameters.matrix("q_a_proj.weight" if latent else "q_proj.weight", "kv_a_proj_with_mqa.weight"),
        query_norm=parameters["q_a_layernorm.weight"] if latent else None,
        query_up=parameters.matrix("q_b_proj.weight") if latent else None,
        kv_norm=parameters["kv_a_layernorm.weight"],
        w_uk=part("w_uk", 0, nope),
        w_uk_t=part("w_uk_t", 0, nope, transposed=True),
        w_uv=part("w_uv", nope, value),
        output=parameters.matrix("o_proj.weight"),
        eps=config.rms_norm_eps,
        latent_eps=LATENT_NORM_EPS,
        scale=config.softmax_scale,
        interleaved=config.rope.interleaved,
    )
