"""A checkpoint in the Mistral-native layout (params.json, consolidated safetensors), which vLLM takes for MLA.

Transformers stacks the experts: `gate_up_proj` is [E, 2F, D], `down_proj` [E, D, F]. The native layout wants each
expert's w1, w3 and w2 by name. Row-major, those are slices of one size that follow each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cierzo.bench.peers.engine import Checkpoint
from cierzo.engine.checkpoint_format import PUBLISHED_FORMATS
from cierzo.engine.weights.published import apart, native_params
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.engine.weights.writer import TensorPlan, write_json, write_tensors

SHARD_BYTES = 5_000_000_000
NATIVE = PUBLISHED_FORMATS["native"]


def convert(checkpoint: Checkpoint, target: Path) -> None:
    """Write a mistral4 checkpoint into the folder `target`. Raises KeyError for an unknown tensor."""
    write_json(target / NATIVE.config_name, params(checkpoint.config()))
    with CheckpointReader(checkpoint.path) as reader:
        places: dict[TensorPlan, tuple[str, int, int]] = {}
        for name, info in reader.tensors.items():
            slices = list(apart(name, info.shape, NATIVE))
            for index, (native, shape) in enumerate(slices):
                places[TensorPlan(native, shape, info.dtype)] = name, index, len(slices)

        def pieces(plan: TensorPlan) -> Iterator[np.ndarray]:
            name, index, count = places[plan]
            yield reader.read(name).reshape(count, -1)[index].view(torch.uint8).numpy()

        write_tensors(target, list(places), pieces, stem=NATIVE.stem, max_shard_bytes=SHARD_BYTES)


def params(config: dict[str, Any]) -> dict[str, Any]:
    """params.json of a mistral4 config.json, as the makers of Small 4 write it, and what vLLM wants besides."""
    found = native_params(config)
    moe = {**found["moe"], "expert_parallel": 1, "expert_model_parallel": 1}
    return {**found, "max_seq_len": config["max_position_embeddings"], "dtype": config["dtype"], "moe": moe}
