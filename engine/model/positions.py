"""Tables of a step's positions: the rotary embedding's cosines and sines, and the factors on the queries."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.engine.model.config import ModelConfig
from cierzo.kernels.ops import rope
from cierzo.kernels.ops.block import PositionTables, StepRows


class Positions:
    """Makes the tables of one model on one device, once per step for all layers."""

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

    def tables(self, rows: StepRows) -> PositionTables:
        """The tables of the step's rows."""
        cos, sin = rope.rope_tables(rows.positions, self.inv_freq, self.magnitude)
        scale = None
        if self.scaling is not None and rows.longest_context > self.scaling.original_positions:
            scale = query_scale(rows.positions, self.scaling.beta, self.scaling.original_positions)
        return PositionTables(cos, sin, scale)


def query_scale(positions: Tensor, beta: float, original_positions: int) -> Tensor:
    """Llama-4's factor on the query, 1 + beta ln(1 + floor(p / original_positions)) -> fp32 [T]."""
    return 1.0 + beta * torch.log(1.0 + torch.floor(positions / original_positions))
