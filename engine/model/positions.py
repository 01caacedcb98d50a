"""Tables of a step's positions: the rotary embedding's cosines and sines, and the factors on the queries."""

from __future__ import annotations

import torch
from torch import Tensor

from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.rope_config import LinearConfig, Llama3Config, RopeConfig, YarnConfig
from cierzo.kernels.ops import rope
from cierzo.kernels.ops.block import PositionTables, StepRows


class Positions:
    """Makes the tables of one model on one device, once per step for all layers."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.inv_freq = _inv_freq(config.rope).to(device)
        scaling = config.rope.scaling
        self.magnitude = scaling.magnitude if isinstance(scaling, YarnConfig) else 1.0
        self.scaling = config.query_scaling

    def tables(self, rows: StepRows) -> PositionTables:
        """The tables of the step's rows."""
        cos, sin = rope.rope_tables(rows.positions, self.inv_freq, self.magnitude)
        scale = None
        if self.scaling is not None and rows.longest_context > self.scaling.original_positions:
            scale = query_scale(rows.positions, self.scaling.beta, self.scaling.original_positions)
        return PositionTables(cos, sin, scale)


def _inv_freq(settings: RopeConfig) -> Tensor:
    dim, theta = settings.dim, settings.theta
    match settings.scaling:
        case None:
            return rope.default_inv_freq(dim, theta)
        case LinearConfig(factor=factor):
            return rope.default_inv_freq(dim, theta, factor)
        case Llama3Config() as llama:
            factors = llama.low_freq_factor, llama.high_freq_factor
            return rope.llama3_inv_freq(dim, theta, llama.factor, llama.original_positions, *factors)
        case YarnConfig() as yarn:
            betas = yarn.beta_fast, yarn.beta_slow
            return rope.yarn_inv_freq(dim, theta, yarn.factor, yarn.original_positions, *betas)


def query_scale(positions: Tensor, beta: float, original_positions: int) -> Tensor:
    """Llama-4's factor on the query, 1 + beta ln(1 + floor(p / original_positions)) -> fp32 [T]."""
    return 1.0 + beta * torch.log(1.0 + torch.floor(positions / original_positions))
