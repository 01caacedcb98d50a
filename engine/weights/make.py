"""Random checkpoints in the shape of Mistral Small 4 or Small 3, for tests and benchmarks.

They have no tokenizer: prompts are token ids. Their output means nothing, and costs what the real one costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from cierzo.engine.errors import ConfigError
from cierzo.engine.weights.folder import new_folder
from cierzo.engine.weights.shapes import shape_of
from cierzo.engine.weights.writer import TensorPlan, write_json, write_tensors

WEIGHT_STD = 0.02  # initializer_range of both models
_STORED = {"bfloat16": "BF16", "float32": "F32"}
_PIECE_ELEMENTS = 1 << 22


def make_checkpoint(
    path: Path | str,
    *,
    like: str,
    scale: str | float = "tiny",
    dtype: str = "bfloat16",
    seed: int = 0,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write a random checkpoint folder at `path`, whole or not at all, and return `path`.

    like, scale: "small4" or "small3"; "tiny", "mini", "full" or a factor in (0, 1] (`shape_of` says how it scales).
    dtype: "bfloat16" or "float32", as stored. seed: of the weights, which are normal with standard deviation 0.02;
    norm weights are 1. A tensor's values depend on the seed and its name alone, not on shards or other tensors.
    max_shard_bytes: size limit of one safetensors file. overwrite: replace an existing checkpoint folder.
    progress: show a bar.

    Raises ConfigError for an unknown like, scale or dtype; CheckpointError, with the numbers, when the disk has no
    room, and when `path` exists and `overwrite` is false.
    """
    path = Path(path)
    shape = shape_of(like, scale)
    if dtype not in _STORED:
        raise ConfigError(f"dtype {dtype!r}: bfloat16 or float32", field="dtype", limit=list(_STORED), value=dtype)
    plans = [TensorPlan(name, sizes, _STORED[dtype]) for name, sizes in shape.tensors()]
    config = shape.config(dtype)
    with new_folder(path, overwrite=overwrite, num_bytes=sum(plan.num_bytes for plan in plans)) as folder:
        write_json(folder / "config.json", config)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_json(
            folder / "generation_config.json", {name: config[name] for name in ids if config[name] is not None}
        )
        write_tensors(
            folder,
            plans,
            lambda plan: random_pieces(plan, seed),
            max_shard_bytes=max_shard_bytes,
            progress=progress,
            label=f"writing {path.name}",
        )
    return path


def random_pieces(plan: TensorPlan, seed: int) -> Iterator[np.ndarray]:
    """A tensor's values in pieces of at most 4 Mi elements: ones for a norm, else normal."""
    digest = hashlib.sha256(f"{seed}:{plan.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    is_norm = plan.name.endswith(("norm.weight", "layernorm.weight"))
    for start in range(0, plan.num_elements, _PIECE_ELEMENTS):
        values = torch.ones(min(_PIECE_ELEMENTS, plan.num_elements - start))
        if not is_norm:
            values.normal_(0.0, WEIGHT_STD, generator=generator)
        if plan.dtype == "BF16":
            yield values.to(torch.bfloat16).view(torch.int16).numpy()  # numpy has no bfloat16: its bits
        else:
            yield values.numpy()
