"""Sizes of a configured model, the number formats of its matrices, and the bytes of them all. No numpy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cierzo.engine.cost.operations import stored
from cierzo.engine.cost.sizes import ModelSizes, Role
from cierzo.engine.model.config import MlaConfig, ModelConfig

if TYPE_CHECKING:
    from cierzo.engine.cost.device import Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberFormats:
    """Number formats of a model's matrices and of the activations that meet them, and where they meet."""

    weights: str
    plain: str = "bf16"
    activations: str = "bf16"
    on_gpu: bool = True

    def of(self, role: Role) -> str:
        """The format of a kind of matrix, as engine/weights/matrices.py gives it."""
        if role == "experts":
            return self.weights
        if role == "linear":
            return "fp8" if self.on_gpu and self.weights == "nvfp4" else self.weights
        if role == "head" and not self.on_gpu and self.weights != self.plain:
            return "int8"
        return self.plain

    def rate(self, weights: str) -> Rate:
        """The format in which a product with these weights is computed: codes are widened to the activations', but
        FP8 meets FP8 where the activations have it, and a CPU multiplies bytes."""
        if self.plain == "float32":
            return "fp32"
        if self.on_gpu:
            return "fp8" if self.activations == "fp8" and weights == "fp8" else "bf16"
        return "bf16" if weights == "bf16" else "int8"

    def measured_as(self, weights: str) -> str:
        """The GPU bench's name for products with these weights (bench/gpu/cases.py)."""
        return "fp8 x fp8" if self.rate(weights) == "fp8" else weights


def sizes_of(model: ModelConfig, plain: str = "bf16") -> ModelSizes:
    """The sizes of a model. plain: number format of its activations."""
    attention, moe = model.attention, model.moe
    if isinstance(attention, MlaConfig):
        sizes = ModelSizes(
            query_rank=attention.q_lora_rank or 0,
            rank=attention.kv_lora_rank,
            rope=attention.qk_rope_head_dim,
            nope=attention.qk_nope_head_dim,
            value_dim=attention.v_head_dim,
        )
    else:
        sizes = ModelSizes(kv_heads=attention.num_kv_heads, head_dim=attention.head_dim)
    if moe is not None:
        sizes = replace(
            sizes,
            experts=moe.num_experts,
            top_k=moe.experts_per_token,
            expert_width=moe.expert_width,
            shared_width=moe.num_shared_experts * moe.expert_width,
        )
    return replace(
        sizes,
        hidden=model.hidden_size,
        heads=model.num_heads,
        vocab=model.vocab_size,
        mlp_width=model.mlp_width,
        layers=model.num_layers,
        dense_layers=model.num_layers if moe is None else moe.first_dense_layers,
        value_bytes=int(stored(plain, 1, 1)),
    )


def weight_bytes(model: ModelConfig, formats: NumberFormats) -> int:
    """Bytes of a model's matrices in their number formats, on one device."""
    matrices = sizes_of(model).matrices()
    return int(sum(count * stored(formats.of(role), n, k) for role, count, n, k in matrices))
