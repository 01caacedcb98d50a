"""Architecture name -> the module that knows its parameters and builds it."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.model import mistral, mistral4
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.decoder import Decoder
from cierzo.engine.parameters import (
    AllReduce,
    MatrixSource,
    Parameter,
    Parameters,
    ParameterSpec,
    PlainMatrices,
    Shard,
)

ARCHITECTURES: dict[str, ModuleType] = {"mistral4": mistral4, "mistral": mistral, "llama": mistral}


def parameter_specs(config: ModelConfig) -> dict[str, ParameterSpec]:
    """Every parameter of the model, under its text-only name."""
    return ARCHITECTURES[config.architecture].specs(config)


def build_model(
    config: ModelConfig,
    parameters: Mapping[str, Parameter],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    rank: int = 0,
    world: int = 1,
    all_reduce: AllReduce | None = None,
    matrices: MatrixSource | None = None,
) -> Decoder:
    """The model of this rank, from the parameters that `load_parameters` gave it (already cut for the rank).

    device: where the model runs; `matrices` carries the parameters there, in the form that the kernels want: by
    default as they are. `all_reduce` sums a [T,D] tensor over all ranks; needed from world 2 on. The operations
    must be bound (kernels.registry.bind) before the model runs. Raises CheckpointError for a parameter that is
    missing, left over, of the wrong shape or dtype.
    """
    if all_reduce is None:
        if world > 1:
            raise ValueError(f"world {world} needs an all_reduce")
        all_reduce = _alone
    shard = Shard(rank, world, all_reduce)
    _check(parameters, parameter_specs(config), shard, dtype)
    module = ARCHITECTURES[config.architecture]
    return module.build(
        config, Parameters(parameters, matrices or PlainMatrices(device)), shard, torch.device(device)
    )


def _alone(partial: Tensor) -> Tensor:
    """The sum over one rank."""
    return partial


def _check(
    parameters: Mapping[str, Parameter], specs: dict[str, ParameterSpec], shard: Shard, dtype: torch.dtype
) -> None:
    specs = {name: spec for name, spec in specs.items() if name in parameters or spec.tied_to is None}
    for name in [*(specs.keys() - parameters.keys()), *(parameters.keys() - specs.keys())]:
        raise CheckpointError(f"parameter {name} is {'missing' if name in specs else 'left over'}", field=name)
    for name, spec in specs.items():
        tensor, shape = parameters[name], list(spec.shape)
        if spec.shard_axis is not None:
            shape[spec.shard_axis] = shard.width(shape[spec.shard_axis], name)
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            found = f"{list(tensor.shape)} {tensor.dtype}"
            raise CheckpointError(f"parameter {name} is {found}, must be {shape} {dtype}", field=name)
