"""Mixture of experts with shared experts: y = sum over the chosen experts of weight * expert(x), plus shared(x)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cierzo.engine.model.config import MoeConfig
from cierzo.engine.model.layers import GatedMlp, gate_up_down
from cierzo.engine.parameters import Parameters, ParameterSpec
from cierzo.kernels.ops.block import MoeWeights


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """One layer's experts on one rank: all of them, each with its share of the width. The router is whole on every
    rank, so that all ranks choose the same experts."""

    weights: MoeWeights

    @staticmethod
    def specs(prefix: str, hidden: int, config: MoeConfig) -> dict[str, ParameterSpec]:
        """Parameters as transformers names them; the fused expert tensors have no ".weight"."""
        experts, width = config.num_experts, config.expert_width
        return {
            f"{prefix}gate.weight": ParameterSpec((experts, hidden)),
            f"{prefix}experts.gate_up_proj": ParameterSpec((experts, 2 * width, hidden), shard_axis=1, sections=2),
            f"{prefix}experts.down_proj": ParameterSpec((experts, hidden, width), shard_axis=2),
            **GatedMlp.specs(f"{prefix}shared_experts.", hidden, width * config.num_shared_experts),
        }

    @classmethod
    def build(cls, parameters: Parameters, norm: Tensor, eps: float, config: MoeConfig) -> MixtureOfExperts:
        """From a layer's parameters, and the norm before it."""
        shared_gate_up, shared_down = gate_up_down(parameters.within("shared_experts."), role="experts")
        return cls(
            MoeWeights(
                norm=norm,
                router=parameters.matrix("gate.weight", role="router"),
                gate_up=parameters.matrix("experts.gate_up_proj", paired=True, role="experts"),
                down=parameters.matrix("experts.down_proj", role="experts"),
                shared_gate_up=shared_gate_up,
                shared_down=shared_down,
                eps=eps,
                top_k=config.experts_per_token,
                groups=config.num_groups,
                top_groups=config.top_groups,
                renormalise=config.renormalise,
                scale=config.routed_scale,
            )
        )
