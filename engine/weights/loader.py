"""Checkpoint tensors -> the parameters a model asks for, with none missing, none left over and none misshapen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from cierzo.engine.checkpoint_format import ADAPTER_REMEDY, adapter_files
from cierzo.engine.errors import CheckpointError
from cierzo.engine.parameters import Parameter, ParameterSpec
from cierzo.engine.weights.headers import TensorInfo
from cierzo.engine.weights.names import NameMap, map_names
from cierzo.engine.weights.reader import CheckpointReader, Range
from cierzo.engine.weights.stored import check_matrix, is_stored, read_stored

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def load_parameters(
    reader: CheckpointReader,
    specs: Mapping[str, ParameterSpec],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    rank: int = 0,
    world: int = 1,
    progress: Progress | None = None,
) -> dict[str, Parameter]:
    """Load every parameter in `specs`, this rank's slice of it, as `dtype` on `device`.

    Names are the text-only spelling (`model.layers.0...`, `lm_head.weight`), whatever the checkpoint's is. Vision
    tensors are skipped, and scales of activations used on GPUs alone; their numbers are logged. Only this rank's
    slices are read.
    A parameter that is quantised, stored expert by expert or in another order is a StoredParameter, whose values
    are computed when it is packed. On the CPU any other whose dtype agrees aliases the mapped file, so that loading
    costs nothing until it is touched: parameters must not be written to. A parameter that is tied to another is
    left out, unless it has values of its own.

    progress: called with (bytes done, bytes in all) after each parameter.
    Raises CheckpointError naming the tensor, and what was expected and found, when one is missing, left over, of
    another shape or of no dtype that fits; ValueError when a shape does not divide among `world` ranks.
    """
    mapped = map_names(reader.tensors, reader.format)
    _check_complete(reader.tensors, specs, mapped)
    specs = {name: spec for name, spec in specs.items() if not _is_twin(reader, mapped, name, spec, dtype)}
    _log_skipped(reader, mapped)
    total_bytes = sum(_stored_bytes(reader, name, mapped) for name in specs)
    done_bytes = 0
    parameters: dict[str, Parameter] = {}
    for name, spec in specs.items():
        ranges = rank_ranges(spec, rank, world)
        if is_stored(reader.tensors, mapped, name, spec.rotated_heads):
            stored = read_stored(reader, mapped, name, spec.rotated_heads, dtype, torch.device(device))
            whole = world == 1 or spec.shard_axis is None
            parameters[name] = stored if whole else stored.cut(spec.shard_axis or 0, ranges)
        else:
            tensor = _read_ranges(reader, mapped.whole[name], spec.shard_axis, ranges)
            parameters[name] = tensor.to(device=device, dtype=dtype)
        done_bytes += _stored_bytes(reader, name, mapped)
        if progress is not None:
            progress(done_bytes, total_bytes)
    return parameters


def rank_ranges(spec: ParameterSpec, rank: int, world: int) -> list[Range]:
    """The [begin, end) ranges along `spec.shard_axis` that `rank` holds, in order: one for each section.

    A parameter that every rank holds whole has one range, its first axis. Raises ValueError when the ranks cannot
    get equal slices.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of {world}")
    if spec.shard_axis is None or world == 1:
        return [(0, spec.shape[spec.shard_axis or 0])]
    size = spec.shape[spec.shard_axis]
    if size % (spec.sections * world):
        raise ValueError(
            f"axis {spec.shard_axis} of {spec.shape}: {size} / {spec.sections} / {world} is no integer"
        )
    section, piece = size // spec.sections, size // spec.sections // world
    starts = [number * section + rank * piece for number in range(spec.sections)]
    return [(start, start + piece) for start in starts]


def _check_complete(tensors: Mapping[str, TensorInfo], specs: Mapping[str, ParameterSpec], mapped: NameMap) -> None:
    """Every spec has its tensor or its experts, of the right shape and kind, and every tensor has its spec."""
    absent = [name for name in specs if name not in mapped.whole and name not in mapped.experts]
    missing = [name for name in absent if specs[name].tied_to is None]
    if missing:
        raise CheckpointError(f"tensor {missing[0]} is missing{_others(missing)}", field=missing[0])
    used: set[str] = set()
    for name, spec in specs.items():
        if name in mapped.whole:
            used.update(check_matrix(tensors, mapped, mapped.whole[name], spec.shape))
        elif name in mapped.experts:
            used.update(_check_experts(tensors, mapped, name, spec.shape))
    used.update(mapped.vision, mapped.ignored)
    left_over = [name for name in tensors if name not in used]
    if left_over:
        raise CheckpointError(
            f"tensor {left_over[0]} has no place in this model{_others(left_over)}", field=left_over[0]
        )


def _is_twin(reader: CheckpointReader, mapped: NameMap, name: str, spec: ParameterSpec, dtype: torch.dtype) -> bool:
    """Whether a parameter is nothing but the one that it is tied to. One that is stored with other values is not:
    the flag that ties them is then a default that somebody left, and the values are what was trained."""
    if spec.tied_to is None:
        return False
    if name not in mapped.whole:
        return True
    names = mapped.whole[name], mapped.whole[spec.tied_to]
    if not any(is_stored(reader.tensors, mapped, one, None) for one in (name, spec.tied_to)):
        own, other = (reader.read(tensor) for tensor in names)
        if torch.equal(own.to(dtype), other.to(dtype)):
            return True
    _log.warning(
        "%s: the config ties %s to %s (tie_word_embeddings), and the checkpoint stores both with different values: "
        "each is used as it is stored",
        *(reader.folder, *names),
    )
    return False


def _check_experts(
    tensors: Mapping[str, TensorInfo], mapped: NameMap, name: str, shape: tuple[int, ...]
) -> Iterator[str]:
    """Every expert has its matrices; gives their tensors' names."""
    parts, num_parts = mapped.experts[name], _parts_of(name)
    for expert in range(shape[0]):
        for part in range(num_parts):
            if (expert, part) not in parts:
                raise CheckpointError(f"{name}: part {part} of expert {expert} is missing", field=name)
            yield from check_matrix(tensors, mapped, parts[expert, part], (shape[1] // num_parts, shape[2]))
    for (expert, _), tensor in parts.items():
        if expert >= shape[0]:
            raise CheckpointError(f"tensor {tensor}: there are {shape[0]} experts only", field=tensor)


def _log_skipped(reader: CheckpointReader, mapped: NameMap) -> None:
    adapters = adapter_files(reader.folder)
    if adapters:
        _log.warning(
            "%s holds an adapter (%s), which is NOT applied: the base model answers. To use the adapter, %s",
            *(reader.folder, ", ".join(adapters), ADAPTER_REMEDY),
        )
    if mapped.vision:
        _log.info("%s: %d vision tensors skipped: text only", reader.folder, len(mapped.vision))
    skipped = sum("activation scale" in roles for roles in mapped.companions.values())
    if skipped:
        _log.info(
            "%s: %d scales of activations not used, but for FP8 matrices' where `activations` is fp8: elsewhere "
            "kernels take activations in 16 bits, or scale them as they come",
            reader.folder,
            skipped,
        )


def _parts_of(name: str) -> int:
    return 2 if name.endswith("gate_up_proj") else 1


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _stored_bytes(reader: CheckpointReader, name: str, mapped: NameMap) -> int:
    stored = [mapped.whole[name]] if name in mapped.whole else list(mapped.experts[name].values())
    stored += [scale for tensor in stored for scale in mapped.companions.get(tensor, {}).values()]
    return sum(reader.tensors[tensor].num_bytes for tensor in stored)


def _read_ranges(reader: CheckpointReader, name: str, axis: int | None, ranges: list[Range]) -> Tensor:
    """The ranges of a stored tensor along `axis`, one after another, contiguous."""
    if axis is None:
        return reader.read(name)
    pieces = [reader.read(name, axis, span) for span in ranges]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=axis)
