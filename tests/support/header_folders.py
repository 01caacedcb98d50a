"""Checkpoint folders at true size that take no room: headers as they are published, and holes in place of data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cierzo.engine.checkpoint_format import PUBLISHED_FORMATS
from cierzo.engine.weights.headers import DTYPE_BITS
from cierzo.engine.weights.published import config_file, tensor_plans
from cierzo.engine.weights.shapes import shape_of
from cierzo.engine.weights.vision_shapes import vision_shape_of
from cierzo.engine.weights.writer import TensorPlan

VISION = 222  # tensors of Small 4's tower and projector, 856,944,640 bytes together


def write_headers(
    folder: Path,
    like: str,
    name: str,
    *,
    scale: str = "full",
    shards: int = 4,
    vision: bool = False,
    changes: Mapping[str, Any] = {},
) -> Path:
    """A folder in the published format of this name. vision: with its tower. changes: to its config.json or
    params.json."""
    folder.mkdir(exist_ok=True)
    format, shape = PUBLISHED_FORMATS[name], shape_of(like, scale)
    tower = vision_shape_of(scale) if vision else None
    plans = tensor_plans(shape, format, "BF16", tower)
    placed: dict[str, str] = {}
    for number in range(shards):
        file = f"{format.stem}-{number + 1:05}-of-{shards:05}.safetensors"
        held = plans[number * len(plans) // shards : (number + 1) * len(plans) // shards]
        write_shard(folder / file, held)
        placed |= {plan.name: file for plan in held}
    (folder / f"{format.stem}.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / format.config_name).write_text(
        json.dumps(config_file(shape, format, "bfloat16", tower) | dict(changes))
    )
    return folder


def write_shard(path: Path, plans: Iterable[TensorPlan]) -> None:
    """A file with these tensors, all zeros, of which only the header takes room."""
    header, end = {}, 0
    for plan in plans:
        begin, end = end, end + plan.num_elements * DTYPE_BITS[plan.dtype] // 8
        header[plan.name] = {"dtype": plan.dtype, "shape": plan.shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
