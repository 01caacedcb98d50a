"""What every model here is made of, cut among ranks.

Rank r of `world` holds its share of the heads, of the MLP's and the experts' width and of the vocabulary's
rows in lm_head; embeddings, norms and MLA's latents are whole on every rank. Products that contract a divided
width give partial sums, which `all_reduce` adds up: the only thing ranks exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.inputs import ModelInputs
from cierzo.engine.weights.loader import ParameterSpec
from cierzo.engine.weights.quantised import Parameter, above_each_other, as_tensor
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops import rope
from cierzo.kernels.ops.block import MlpWeights, StepRows

# What a matrix is for: that decides its number format (engine/weights/matrices.py).
MatrixRole = Literal["linear", "experts", "latent", "router", "head"]
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


class MatrixSource(Protocol):
    """Gives a model its matrices, in whatever form the kernels want them, and its other tensors, where they run."""

    def tensor(self, stored: Parameter) -> Tensor:
        """A parameter that nothing is multiplied with: norms, the embedding."""
        ...

    def matrix(
        self,
        key: str,
        shape: tuple[int, ...],
        make: Callable[[], Parameter],
        *,
        paired: bool = False,
        role: MatrixRole = "linear",
    ) -> Matrix:
        """What `make` would give, [n,k] or [experts,n,k], known as `key` among the model's matrices."""
        ...


class PlainMatrices:
    """As they are: what the plain-torch reference multiplies with."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)

    def tensor(self, stored: Parameter) -> Tensor:
        """The tensor itself, on the device."""
        return as_tensor(stored).to(self._device)

    def matrix(
        self,
        key: str,
        shape: tuple[int, ...],
        make: Callable[[], Parameter],
        *,
        paired: bool = False,
        role: MatrixRole = "linear",
    ) -> Matrix:
        """The tensor itself, on the device; of a quantised one, its values."""
        return as_tensor(make()).to(self._device)


class Parameters:
    """A layer's view of the model's parameters: `Parameters(all, matrices, "layers.3.")["mlp.gate.weight"]`."""

    def __init__(self, parameters: Mapping[str, Parameter], matrices: MatrixSource, prefix: str = "") -> None:
        self._parameters = parameters
        self._matrices = matrices
        self._prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
        """The values of one that is used as it is, where the model runs; a quantised one's are computed anew."""
        return self._matrices.tensor(self.stored(name))

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._parameters

    def stored(self, name: str) -> Parameter:
        """A parameter as it was loaded, on the host: a matrix is carried nowhere before its format is known."""
        return self._parameters[self._prefix + name]

    def within(self, prefix: str) -> Parameters:
        """The view one level down."""
        return Parameters(self._parameters, self._matrices, self._prefix + prefix)

    def matrix(self, *names: str, paired: bool = False, role: MatrixRole = "linear") -> Matrix:
        """The named parameters, one above the other along their rows."""
        parts = [self.stored(name) for name in names]
        rows = sum(part.shape[-2] for part in parts)

        def make() -> Parameter:
            return above_each_other(parts)

        shape = (*parts[0].shape[:-2], rows, parts[0].shape[-1])
        return self.derived(" + ".join(names), shape, make, paired=paired, role=role)

    def derived(
        self,
        key: str,
        shape: tuple[int, ...],
        make: Callable[[], Parameter],
        *,
        paired: bool = False,
        role: MatrixRole = "linear",
    ) -> Matrix:
        """A matrix made of this layer's parameters, under a name of its own."""
        return self._matrices.matrix(self._prefix + key, shape, make, paired=paired, role=role)


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
