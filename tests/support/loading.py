"""A checkpoint folder loaded as the engine loads it: its parameters, and logits of a dozen rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from oracle import make_queries
from torch import Tensor

from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.model.build import parameter_specs
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.parameters import Parameter
from cierzo.engine.weights.loader import load_parameters
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.engine.worker.runner import load_model
from cierzo.kernels.ops.block import StepRows

TOKENS = torch.arange(12) * 13 % 192


def logits(folder: Path, **options: Any) -> Tensor:
    """Of 9 prompt rows and 3 generated ones, as an engine with these options loads the model."""
    config = resolve(EngineOptions(model=str(folder), kv_cache_gib=0.01, block_tokens=4, **options))
    model, pool, _ = load_model(config)
    tables = torch.tensor([[5, 2, 7]], dtype=torch.int32)
    slots = torch.tensor([20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31])
    expanded, absorbed = make_queries([(9, 9, 0)], tables), make_queries([(3, 12, 0)], tables)
    found = model.logits(StepRows(TOKENS, torch.arange(12), slots, 9, expanded, absorbed), pool)
    assert found.isfinite().all()
    assert found.std() > 0.05
    return found


def load(folder: Path, rank: int = 0, world: int = 1) -> dict[str, Parameter]:
    """A rank's parameters, in float32."""
    specs = parameter_specs(read_model_config(folder))
    with CheckpointReader(folder) as reader:
        return load_parameters(reader, specs, dtype=torch.float32, device="cpu", rank=rank, world=world)
