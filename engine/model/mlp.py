"""A gated MLP, down(silu(gate x) * up x), its width divided among ranks."""

from __future__ import annotations

from torch import Tensor

from cierzo.engine.parameters import MatrixRole, Parameters, ParameterSpec
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.ops.block import MlpWeights


def specs(hidden: int, width: int) -> dict[str, ParameterSpec]:
    """Parameters as transformers names them."""
    return {
        "gate_proj.weight": ParameterSpec((width, hidden), shard_axis=0),
        "up_proj.weight": ParameterSpec((width, hidden), shard_axis=0),
        "down_proj.weight": ParameterSpec((hidden, width), shard_axis=1),
    }


def build(parameters: Parameters, norm: Tensor, eps: float) -> MlpWeights:
    """The MLP of one layer, and the norm before it."""
    return MlpWeights(norm, *gate_up_down(parameters), eps)


def gate_up_down(parameters: Parameters, role: MatrixRole = "linear") -> tuple[Matrix, Matrix]:
    """The two matrices of a gated MLP: gate above up, and down."""
    return (
        parameters.matrix("gate_proj.weight", "up_proj.weight", paired=True, role=role),
        parameters.matrix("down_proj.weight", role=role),
    )
