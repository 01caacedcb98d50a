"""Writes a sharded safetensors checkpoint piece by piece, so that memory never holds more than one piece.

The shards' headers follow from names, shapes and dtypes alone; the data then streams behind them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cierzo.engine.weights.headers import DTYPE_BITS

Pieces = Iterable[np.ndarray]


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor to be written: name, shape, dtype in safetensors' spelling ("BF16", "U8")."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * DTYPE_BITS[self.dtype] // 8


def write_tensors(
    folder: Path,
    plans: Sequence[TensorPlan],
    pieces: Callable[[TensorPlan], Pieces],
    *,
    stem: str = "model",
    max_shard_bytes: int,
    progress: bool = False,
    label: str = "writing",
) -> None:
    """Write `model.safetensors`, or `model-00001-of-0000N.safetensors`... with their index, into `folder`.

    plans: the tensors in the order in which they are written.
    pieces: gives a tensor's data as arrays whose bytes, one after another, are the tensor in row-major order.
    stem: what the names begin with, if not with "model".
    max_shard_bytes: a shard takes tensors up to this size; a larger tensor gets a shard of its own.
    progress: show a bar with bytes written, on a terminal, if it takes more than two seconds.
    """
    shards = _split(plans, max_shard_bytes)
    placed: dict[str, str] = {}
    total_bytes = sum(plan.num_bytes for plan in plans)
    disable = None if progress else True  # None: only on a terminal
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc=label, delay=2.0, disable=disable) as bar:
        for number, shard in enumerate(shards, start=1):
            name = (
                f"{stem}.safetensors"
                if len(shards) == 1
                else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            )
            _write_shard(folder / name, shard, pieces, bar)
            placed.update((plan.name, name) for plan in shard)
    if len(shards) > 1:
        metadata = {"total_parameters": sum(plan.num_elements for plan in plans), "total_size": total_bytes}
        write_json(
            folder / f"{stem}.safetensors.index.json",
            {"metadata": metadata, "weight_map": dict(sorted(placed.items()))},
        )


def write_json(path: Path, value: object) -> None:
    """Write JSON the way transformers does: two spaces of indent, sorted keys, a final newline."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _split(plans: Sequence[TensorPlan], max_shard_bytes: int) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + plan.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.num_bytes
    return shards


def _write_shard(
    path: Path, shard: Sequence[TensorPlan], pieces: Callable[[TensorPlan], Pieces], bar: tqdm
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in shard:
        span = [offset, offset + plan.num_bytes]
        header[plan.name] = {"dtype": plan.dtype, "shape": list(plan.shape), "data_offsets": span}
        offset += plan.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts on a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for plan in shard:
            written = 0
            for piece in pieces(plan):
                file.write(np.ascontiguousarray(piece).data)
                written += piece.nbytes
                bar.update(piece.nbytes)
            if written != plan.num_bytes:
                raise ValueError(f"{plan.name}: {written} bytes given for {plan.num_bytes}")
