"""What every model here is made of, cut among ranks.

Rank r of `world` holds its share of the heads, of the MLP's and the experts' width and of the vocabulary's
rows in lm_head; embeddings, norms and MLA's latents are whole on every rank. Products that contract a divided
width give partial sums, which `all_reduce` adds up: the only thing ranks exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.inputs import ModelInputs
from cierzo.engine.weights.loader import ParameterSpec
from cierzo.kernels.ops import linear, rope

AllReduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's place, and the sum over all ranks."""

    rank: int
    world: int
    all_reduce: AllReduce

    def width(self, whole: int, field: str) -> int:
        """This rank's share of a divided width. Raises CheckpointError if it does not divide."""
        if whole % self.world:
            raise CheckpointError(
                f"{field} {whole} cannot be divided among {self.world} ranks",
                field=field,
                limit=f"a multiple of {self.world}",
                value=whole,
            )
        return whole // self.world


class Parameters:
    """A layer's view of the model's parameters: `Parameters(all, "model.layers.3.")["mlp.gate.weight"]`."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self._tensors = tensors
        self._prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def within(self, prefix: str) -> Parameters:
        """The view one level down."""
        return Parameters(self._tensors, self._prefix + prefix)


@dataclass(frozen=True, slots=True)
class StepTables:
    """What depends on positions alone: made once per step, used by every layer.

    cos, sin: fp32 [T,P/2]. query_scale: fp32 [T,1,1], or None where it is 1 for every row.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None


class PositionTables:
    """Makes the StepTables of one model on one device."""

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

    def of(self, inputs: ModelInputs) -> StepTables:
        """The tables of a step's rows."""
        cos, sin = rope.rope_tables(inputs.positions, self.inv_freq, self.magnitude)
        scale = None
        if self.scaling is not None and inputs.longest_context > self.scaling.original_positions:
            scale = query_scale(inputs.positions, self.scaling.beta, self.scaling.original_positions)[:, None, None]
        return StepTables(cos, sin, scale)


def query_scale(positions: Tensor, beta: float, original_positions: int) -> Tensor:
    """Llama-4's factor on the query, 1 + beta ln(1 + floor(p / original_positions)) -> fp32 [T]."""
    return 1.0 + beta * torch.log(1.0 + torch.floor(positions / original_positions))


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """down(silu(gate x) * up x), its width divided among ranks: returns this rank's partial sum."""

    gate_up: Tensor
    down: Tensor

    @staticmethod
    def specs(prefix: str, hidden: int, width: int) -> dict[str, ParameterSpec]:
        """Parameters as transformers names them."""
        return {
            f"{prefix}gate_proj.weight": ParameterSpec((width, hidden), shard_axis=0),
            f"{prefix}up_proj.weight": ParameterSpec((width, hidden), shard_axis=0),
            f"{prefix}down_proj.weight": ParameterSpec((hidden, width), shard_axis=1),
        }

    @classmethod
    def build(cls, parameters: Parameters) -> GatedMlp:
        """From a layer's parameters."""
        gate, up, down = (parameters[f"{name}_proj.weight"] for name in ("gate", "up", "down"))
        return cls(torch.cat([gate, up]), down)

    def forward(self, x: Tensor) -> Tensor:
        """x [T,D] -> [T,D]."""
        return linear.gated_mlp(x, self.gate_up, self.down)
