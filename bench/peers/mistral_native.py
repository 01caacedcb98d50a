"""A checkpoint in the Mistral-native layout (params.json, consolidated safetensors), which vLLM takes for MLA.

Transformers stacks the experts: `gate_up_proj` is [E, 2F, D], `down_proj` [E, D, F]. The native layout wants each
expert's w1, w3 and w2 by name. Row-major, those are slices that follow each other, so the data of a file stays as
it is, byte for byte, and only its header is written anew.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cierzo.engine.weights.names import native_name

EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
COPY_BYTES = 1 << 26
Header = dict[str, dict[str, Any]]


def convert(source: Path, target: Path) -> None:
    """Write the mistral4 checkpoint `source` into the folder `target`. Raises KeyError for an unknown tensor."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (target / "params.json").write_text(json.dumps(params(config), indent=2) + "\n", encoding="utf-8")
    shards = sorted(source.glob("*.safetensors"))
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"consolidated-{number:05d}-of-{len(shards):05d}.safetensors"
        placed |= dict.fromkeys(_rename(shard, target / name), name)
    index = {"metadata": {}, "weight_map": placed}
    (target / "consolidated.safetensors.index.json").write_text(json.dumps(index) + "\n", encoding="utf-8")


def params(config: dict[str, Any]) -> dict[str, Any]:
    """params.json of a mistral4 config.json, as the makers of Small 4 write it, and what vLLM wants besides."""
    from cierzo.engine.weights.published import (
        native_params,  # imports torch, which the other engines' runs can spare
    )

    found = native_params(config)
    moe = {**found["moe"], "expert_parallel": 1, "expert_model_parallel": 1}
    return {**found, "max_seq_len": config["max_position_embeddings"], "dtype": config["dtype"], "moe": moe}


def _rename(source: Path, target: Path) -> list[str]:
    """Write `target` with the data of `source` behind a header of native names; return the names."""
    with source.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        old: Header = json.loads(file.read(size))
        new = dict(_native(old))
        header = json.dumps({"__metadata__": {"format": "pt"}, **new}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # the data starts on a multiple of 8 bytes
        with target.open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(file, out, COPY_BYTES)
    return list(new)


def _native(old: Header) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, entry in old.items():
        if name == "__metadata__":
            continue
        experts = EXPERTS.fullmatch(name)
        yield from _experts(experts, entry) if experts else [(_native_name(name), entry)]


def _native_name(name: str) -> str:
    try:
        return native_name(name)
    except (KeyError, StopIteration) as error:
        raise KeyError(f"{name}: no tensor of this name in the Mistral-native layout") from error


def _experts(match: re.Match[str], entry: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The slices of a stack of experts: [E, 2F, D] is w1, w3 of expert 0, w1, w3 of expert 1, ..."""
    layer, kind = match.groups()
    count, rows, columns = entry["shape"]
    parts = ("w1", "w3") if kind == "gate_up_proj" else ("w2",)
    begin, end = entry["data_offsets"]
    step = (end - begin) // (count * len(parts))
    for index in range(count * len(parts)):
        expert, part = divmod(index, len(parts))
        span = [begin + index * step, begin + (index + 1) * step]
        shape = [rows // len(parts), columns]
        yield (
            f"layers.{layer}.experts.{expert}.{parts[part]}.weight",
            {"dtype": entry["dtype"], "shape": shape, "data_offsets": span},
        )
