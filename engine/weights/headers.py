"""Contents of a checkpoint folder's files, read from their headers alone: no torch, no tensor data.

A safetensors file is: 8 bytes little-endian header length; a JSON header
{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}; the data, which the offsets count
into (https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cierzo.engine.checkpoint_file import require_file
from cierzo.engine.checkpoint_format import (
    PARAMS_NAME,
    UNREADABLE,
    CheckpointFormat,
    find_format,
    refuse_lone_adapter,
)
from cierzo.engine.errors import CheckpointError
from cierzo.engine.fields import naming_unreadable, read_json

_log = logging.getLogger(__name__)

DTYPE_BITS: Mapping[str, int] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

INDEX_NAME = "model.safetensors.index.json"  # of Hugging Face's layout
SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: its file, its dtype (safetensors' spelling) and shape, and its size in bytes."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_checkpoint_headers(folder: Path) -> tuple[CheckpointFormat, dict[str, TensorInfo]]:
    """A checkpoint folder's format, and all its tensors by name, in the order of the shards.

    Every shard's length is compared with its header, so that nothing mapped later can lie beyond the file's end.

    Raises CheckpointError naming the file or the tensor: folder, config, index or shard missing; shard
    truncated or malformed; a tensor that the index places in a shard that lacks it, that a shard holds and the
    index does not name, or that two shards hold; a quantisation that is unknown, or not declared.
    """
    with naming_unreadable(folder):
        if not folder.is_dir():
            message = f"{folder} is not a folder: a checkpoint is a folder with config.json"
            raise CheckpointError(message, value=folder)
        format = find_format(folder)
    tensors = read_tensors(folder, format)
    for info in tensors.values():
        if format.scheme == "plain" and info.dtype.startswith(("F8", "F4")):
            raise CheckpointError(
                f"tensor {info.name} is {info.dtype}, but {format.config_name} declares no quantisation",
                field=info.name,
                limit=", ".join(FLOAT_DTYPES),
                value=info.dtype,
            )
    return format, tensors


def read_tensors(folder: Path, format: CheckpointFormat) -> dict[str, TensorInfo]:
    """All tensors of a folder, in the files of the format's layout. Raises CheckpointError; the scheme is not
    compared with what they are."""
    with naming_unreadable(folder):
        placed = _find_tensors(folder, format)
    return read_shard_header(placed) if isinstance(placed, Path) else _read_shards(folder, placed)


def read_shard_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, after checking that the file is exactly as long as they need."""
    try:
        require_file(path)
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or length > min(file_bytes - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is truncated: {file_bytes} bytes, its header alone announces {8 + length}",
                    field=path.name,
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", field=path.name) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header cannot be read: {error}", field=path.name) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is no JSON object", field=path.name)
    return _check_layout(path, header, file_bytes - 8 - length)


def _check_layout(path: Path, header: dict[str, Any], data_bytes: int) -> dict[str, TensorInfo]:
    """Header entries -> TensorInfo; the tensors must fill the file's data without hole, overlap or excess."""
    spans: list[tuple[int, int, TensorInfo]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            shape = tuple(int(size) for size in entry["shape"])
            begin, end = (int(offset) for offset in entry["data_offsets"])
            num_bytes = math.prod(shape) * DTYPE_BITS[entry["dtype"]] // 8
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path}: tensor {name}: malformed entry ({error!r})", field=name) from error
        if end - begin != num_bytes or min(shape, default=0) < 0:
            raise CheckpointError(
                f"{path}: tensor {name}: {end - begin} bytes for {entry['dtype']} {list(shape)}", field=name
            )
        spans.append((begin, end, TensorInfo(name, path, entry["dtype"], shape, num_bytes)))
    reached = 0
    for begin, end, info in sorted(spans, key=lambda span: span[:2]):
        if begin != reached:
            raise CheckpointError(
                f"{path}: tensor {info.name} begins at {begin}, not at {reached}", field=info.name
            )
        reached = end
        if end > data_bytes:
            raise CheckpointError(
                f"{path} is truncated: {data_bytes} bytes of data, tensor {info.name} ends at {end}",
                field=info.name,
                limit=data_bytes,
                value=end,
            )
    if reached != data_bytes:
        raise CheckpointError(f"{path}: {data_bytes - reached} bytes after the last tensor", field=path.name)
    return {info.name: info for _, _, info in spans}


def _find_tensors(folder: Path, format: CheckpointFormat) -> dict[str, str] | Path:
    """Tensor name -> shard file name as the index says it; the file alone for a checkpoint of one file.

    A single file has precedence over an index beside it, as in transformers, unless the index makes it one shard of
    several.
    """
    index_path = folder / f"{format.stem}.safetensors.index.json"
    single_path = folder / f"{format.stem}.safetensors"
    require_file(index_path)
    require_file(single_path)
    if not single_path.exists():
        if not index_path.exists():
            raise _no_tensors(folder, format, f"{index_path.name} nor {single_path.name}")
        return _read_index(index_path)
    if not index_path.exists():
        return single_path
    try:
        placed = _read_index(index_path)
    except CheckpointError as error:
        _log.warning("%s; %s beside it is read, as transformers reads it", error, single_path.name)
        return single_path
    others = sorted({*placed.values()} - {single_path.name})
    if others and single_path.name in placed.values():
        return placed
    if others:
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        _log.warning(
            "%s: %s names %s%s and not the %s beside it; this file is read, as transformers reads it, and what the "
            "index names is not: remove what is not meant",
            *(folder, index_path.name, others[0], more, single_path.name),
        )
    return single_path


def _no_tensors(folder: Path, format: CheckpointFormat, wanted: str) -> CheckpointError:
    """The error for a folder without tensors: it says what is missing, and what lies there instead."""
    refuse_lone_adapter(folder)
    shards = sorted(path.name for path in folder.glob(f"{format.stem}*.safetensors"))
    patterns = (_OTHER_FORMATS[format.layout], *UNREADABLE)
    others = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
    hint = _hint_at_index(shards) if shards else _hint(others)
    return CheckpointError(f"{folder} holds neither {wanted}{hint}", field=wanted.split()[0])


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> the file of it, which may lie in a folder below that of the index."""
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{path}: weight_map is missing or empty", field="weight_map")
    names: dict[str, str] = {}  # of files: there are few, and up to 56,000 tensors
    for name, file in placed.items():
        if not isinstance(file, str) or file not in names:
            inside = PurePosixPath(file) if isinstance(file, str) else PurePosixPath()
            if inside.is_absolute() or ".." in inside.parts or not inside.name:
                raise CheckpointError(f"{path}: tensor {name}: {file!r} is no file name", field=name)
            names[file] = str(inside)  # "./a" is "a"
        placed[name] = names[file]
    return placed


_OTHER_FORMATS = {"hf": "consolidated*.safetensors", "native": "model*.safetensors"}


def _hint_at_index(shards: list[str]) -> str:
    more = f" and {len(shards) - 1} more lie" if len(shards) > 1 else " lies"
    return f" ({shards[0]}{more} there; the index, which says what is in which file, comes with them)"


def _hint(others: list[str]) -> str:
    """Say what the folder holds instead, and what that lacks."""
    if not others:
        return ""
    if others[0].endswith(".safetensors"):
        config = PARAMS_NAME if others[0].startswith("consolidated") else "config.json"
        return f" ({others[0]} would need {config} beside it)"
    return f" ({others[0]} is of a format that is not supported)"


def _read_shards(folder: Path, placed: dict[str, str]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    paths = {file: folder / file for file in sorted(set(placed.values()))}
    for path in paths.values():
        for name, info in read_shard_header(path).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name} is in both {tensors[name].file} and {info.file}", field=name)
            tensors[name] = info
    for name, file in placed.items():
        if name not in tensors or tensors[name].file is not paths[file]:
            raise CheckpointError(f"{paths[file]} lacks tensor {name}, which the index places there", field=name)
    for name in tensors:
        if name not in placed:
            raise CheckpointError(f"{tensors[name].file}: tensor {name} is not in the index", field=name)
    return tensors
