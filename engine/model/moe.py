"""Mixture of experts with shared experts: y = sum over the chosen experts of weight * expert(x), plus shared(x)."""

from __future__ import annotations

from torch import Tensor

from cierzo.engine.model import mlp
from cierzo.engine.model.config import MoeConfig
from cierzo.engine.parameters import Parameters, ParameterSpec
from cierzo.kernels.ops.block import MoeWeights


def specs(hidden: int, config: MoeConfig) -> dict[str, ParameterSpec]:
    """Parameters as transformers names them; the fused expert tensors have no ".weight"."""
    experts, width = config.num_experts, config.expert_width
    shared = mlp.specs(hidden, width * config.num_shared_experts)
    return {
        "gate.weight": ParameterSpec((experts, hidden)),
        "experts.gate_up_proj": ParameterSpec((experts, 2 * width, hidden), shard_axis=1, sections=2),
        "experts.down_proj": ParameterSpec((experts, hidden, width), shard_axis=2),
        **{f"shared_experts.{name}": spec for name, spec in shared.items()},
    }


def build(parameters: Parameters, norm: Tensor, eps: float, config: MoeConfig) -> MoeWeights:
    """The experts of one layer, and the norm before it: all experts, each with this rank's share of its width. The
    router is whole on every rank, so that all ranks choose the same experts."""
    shared_gate_up, shared_down = mlp.gate_up_down(parameters.within("shared_experts."), role="experts")
    return MoeWeights(
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
