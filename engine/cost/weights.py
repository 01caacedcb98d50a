"""Sizes of a configured model, the number formats of its matrices, and the bytes of them all. No numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cierzo.engine.cost.operations import stored
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.engine.model.config import MlaConfig, ModelConfig
from cierzo.kernels.formats.number_formats import NUMBER_FORMATS, MatrixRole

if TYPE_CHECKING:
    from cierzo.engine.cost.device import Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberFormats:
    """Number formats of a model's matrices and of the activations that meet them, and where they meet."""

    weights: str
    plain: str = "bf16"
    activations: str = "bf16"
    on_gpu: bool = True
    head: str = ""  # of lm_head, where it is not the one that follows from the weights'

    def of(self, role: MatrixRole) -> str:
        """The format of matrices of a role."""
        if role == "head" and self.head:
            return self.head
        return NUMBER_FORMATS[self.weights].of(role, "cuda" if self.on_gpu else "cpu", self.plain)

    def rate(self, weights: str) -> Rate:
        """The format in which a product with these weights is computed: codes are widened to the activations', but
        FP8 meets FP8 where the activations have it, and a CPU multiplies bytes."""
        if self.plain == "float32":
            return "fp32"
        if self.on_gpu:
            return "fp8" if self._as_they_are(weights) else "bf16"
        return "bf16" if NUMBER_FORMATS[weights].dtype else "int8"

    def measured_as(self, weights: str) -> str:
        """The GPU bench's name for products with these weights (bench/gpu/cases.py)."""
        return f"{weights} x {self.activations}" if self._as_they_are(weights) else weights

    def _as_they_are(self, weights: str) -> bool:
        """Whether the activations are multiplied with the codes of these weights as they are."""
        return self.activations in NUMBER_FORMATS[weights].activations


def sizes_of(model: ModelConfig, plain: str = "bf16") -> ModelSizes:
    """The sizes of a model. plain: number format of its activations."""
    attention, moe = model.attention, model.moe
    if isinstance(attention, MlaConfig):
        ranks = {"query_rank": attention.q_lora_rank or 0, "rank": attention.kv_lora_rank}
        dims = {"rope": attention.qk_rope_head_dim, "nope": attention.qk_nope_head_dim}
        parts: dict[str, Any] = {**ranks, **dims, "value_dim": attention.v_head_dim}
    else:
        parts = {"kv_heads": attention.num_kv_heads, "head_dim": attention.head_dim}
    if moe is not None:
        parts |= {"experts": moe.num_experts, "top_k": moe.experts_per_token, "expert_width": moe.expert_width}
        parts["shared_width"] = moe.num_shared_experts * moe.expert_width
    return ModelSizes(
        hidden=model.hidden_size,
        heads=model.num_heads,
        vocab=model.vocab_size,
        mlp_width=model.mlp_width,
        layers=model.num_layers,
        dense_layers=model.num_layers if moe is None else moe.first_dense_layers,
        value_bytes=int(stored(plain, 1, 1)),
        **parts,
    )


def weight_bytes(model: ModelConfig, formats: NumberFormats) -> int:
    """Bytes of a model's matrices in their number formats, on one device, its vision tower's among them."""
    sizes = sizes_of(model)
    embedding = stored(formats.plain, model.vocab_size, model.hidden_size)  # apart from the head, even if tied
    matrices = sum(count * stored(formats.of(role), n, k) for role, count, n, k in sizes.matrices())
    return int(embedding + matrices) + tower_bytes(model, formats)


def tower_bytes(model: ModelConfig, formats: NumberFormats) -> int:
    """Bytes of a model's vision tower; 0 where it has none."""
    tower = model.vision
    return 0 if tower is None else int(stored(formats.of("vision"), 1, tower.num_parameters(model.hidden_size)))
