"""What every model here is made of, cut among ranks.

Rank r of `world` holds its share of the heads, of the MLP's and the experts' width and of the vocabulary's
rows in lm_head; embeddings, norms and MLA's latents are whole on every rank. Products that contract a divided
width give partial sums, which `all_reduce` adds up: the only thing ranks exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.inputs import ModelInputs
from cierzo.engine.parameters import MatrixRole, Parameters, ParameterSpec
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops import rope
from cierzo.kernels.ops.block import MlpWeights, StepRows


class PositionTables:
    """Makes the StepRows of one model on one device: what depends on positions alone is made once per step."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        settings = config.rope
        if settings.yarn is None:
            inv_freq = rope.default_inv_freq(settings.dim, settings.theta)
            self.magnitude = 1.0
        else:
            yarn = settings.yarn
            inv_freq = rope.yarn_inv_freq(
                settings.dim, settings.theta, yarn.factor, yarn.original_positions, yarn.beta_fast, yarn.beta_slow
            )
            self.magnitude = yarn.magnitude
        self.inv_freq = inv_freq.to(device)
        self.scaling = config.query_scaling

    def rows(self, inputs: ModelInputs) -> StepRows:
        """What all layers of this step share."""
        cos, sin = rope.rope_tables(inputs.positions, self.inv_freq, self.magnitude)
        scale = None
        if self.scaling is not None and inputs.longest_context > self.scaling.original_positions:
            scale = query_scale(inputs.positions, self.scaling.beta, self.scaling.original_positions)
        return StepRows(
            cos,
            sin,
            scale,
            inputs.cache_slots,
            inputs.num_expanded,
            inputs.expanded,
            inputs.absorbed,
            inputs.expert_ids,
        )


def query_scale(positions: Tensor, beta: float, original_positions: int) -> Tensor:
    """Llama-4's factor on the query, 1 + beta ln(1 + floor(p / original_positions)) -> fp32 [T]."""
    return 1.0 + beta * torch.log(1.0 + torch.floor(positions / original_positions))


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """down(silu(gate x) * up x), its width divided among ranks."""

    weights: MlpWeights

    @staticmethod
    def specs(prefix: str, hidden: int, width: int) -> dict[str, ParameterSpec]:
        """Parameters as transformers names them."""
        return {
            f"{prefix}gate_proj.weight": ParameterSpec((width, hidden), shard_axis=0),
            f"{prefix}up_proj.weight": ParameterSpec((width, hidden), shard_axis=0),
            f"{prefix}down_proj.weight": ParameterSpec((hidden, width), shard_axis=1),
        }

    @classmethod
    def build(cls, parameters: Parameters, norm: Tensor, eps: float) -> GatedMlp:
        """From a layer's parameters, and the norm before it."""
        return cls(MlpWeights(norm, *gate_up_down(parameters), eps))


def gate_up_down(parameters: Parameters, role: MatrixRole = "linear") -> tuple[Matrix, Matrix]:
    """The two matrices of a gated MLP: gate above up, and down."""
    return (
        parameters.matrix("gate_proj.weight", "up_proj.weight", paired=True, role=role),
        parameters.matrix("down_proj.weight", role=role),
    )
