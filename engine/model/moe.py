"""Mixture of experts with shared experts: y = sum over the chosen experts of weight * expert(x), plus shared(x)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cierzo.engine.model.config import MoeConfig
from cierzo.engine.model.layers import GatedMlp, Parameters
from cierzo.engine.weights.loader import ParameterSpec
from cierzo.kernels.ops import moe


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """One layer's experts on one rank: all of them, each with its share of the width F.

    router fp32 [E,D], whole on every rank, so that all ranks choose the same experts; gate_up [E,2F,D], down
    [E,D,F], used where they lie.
    """

    router: Tensor
    gate_up: Tensor
    down: Tensor
    shared: GatedMlp
    config: MoeConfig

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
    def build(cls, parameters: Parameters, config: MoeConfig) -> MixtureOfExperts:
        """From a layer's parameters."""
        return cls(
            router=parameters["gate.weight"].float(),  # exact, and spares the router a conversion in every step
            gate_up=parameters["experts.gate_up_proj"],
            down=parameters["experts.down_proj"],
            shared=GatedMlp.build(parameters.within("shared_experts.")),
            config=config,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [T,D] -> this rank's partial sum [T,D]."""
        config = self.config
        ids, weights = moe.route(
            x,
            self.router,
            top_k=config.experts_per_token,
            groups=config.num_groups,
            top_groups=config.top_groups,
            renormalise=config.renormalise,
            scale=config.routed_scale,
        )
        groups = moe.group_by_expert(ids, config.num_experts)
        shared = self.shared
        return moe.expert_mlp(x, self.gate_up, self.down, weights, groups, shared.gate_up, shared.down)
