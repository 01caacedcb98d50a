"""Checkpoint tensors -> the parameters a model asks for, with none missing, none left over and none misshapen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.weights.headers import FLOAT_DTYPES, TensorInfo
from cierzo.engine.weights.names import NameMap, map_names
from cierzo.engine.weights.reader import CheckpointReader, Range

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Parts = Mapping[tuple[int, int], str]


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """What a model expects of one parameter, and how it is cut among ranks.

    shape: the whole, unsharded shape, as the checkpoint stores it ([out, in] for a linear layer).
    shard_axis: the axis cut into `world` equal slices; None: every rank holds the whole.
    sections: how many equal sections the shard axis consists of, each cut on its own (2 for a fused gate_up,
        so that a rank gets its slice of the gate and its slice of the up projection, in this order).
    twin: a parameter that is this one by definition (the head, where embeddings are tied). Checkpoints rarely store
        it; one that does must store the same values.
    """

    shape: tuple[int, ...]
    shard_axis: int | None = None
    sections: int = 1
    twin: str | None = None


def load_parameters(
    reader: CheckpointReader,
    specs: Mapping[str, ParameterSpec],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    rank: int = 0,
    world: int = 1,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Load every parameter in `specs`, this rank's slice of it, as `dtype` on `device`.

    Names are the text-only spelling (`model.layers.0...`, `lm_head.weight`), whatever prefix the checkpoint uses;
    experts stored one by one are stacked into `experts.gate_up_proj` and `experts.down_proj`. Vision tensors are
    skipped, and their number is logged. Only this rank's slices are read. On the CPU a tensor whose dtype agrees
    aliases the mapped file, so that loading costs nothing until it is touched: parameters must not be written to.

    progress: called with (bytes done, bytes in all) after each parameter.
    Raises CheckpointError naming the tensor, and what was expected and found, when one is missing, left over, of
    another shape or of no floating-point dtype, or differs from its twin; ValueError when a shape does not divide
    among `world` ranks.
    """
    mapped = map_names(reader.tensors)
    _check_complete(reader.tensors, specs, mapped)
    _check_twins(reader, specs, mapped)
    if mapped.vision:
        _log.info("%s: %d vision tensors skipped: text only", reader.folder, len(mapped.vision))
    total_bytes = sum(_stored_bytes(reader, name, mapped) for name in specs)
    done_bytes = 0
    parameters: dict[str, Tensor] = {}
    for name, spec in specs.items():
        ranges = rank_ranges(spec, rank, world)
        if name in mapped.whole:
            tensor = _read_ranges(reader, mapped.whole[name], spec.shard_axis, ranges)
            parameters[name] = tensor.to(device=device, dtype=dtype)
        else:
            parameters[name] = _stack(reader, mapped.experts[name], spec, ranges, dtype).to(device)
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
    missing = [name for name in specs if name not in mapped.whole and name not in mapped.experts]
    if missing:
        raise CheckpointError(f"tensor {missing[0]} is missing{_others(missing)}", field=missing[0])
    used: set[str] = set()
    for name, spec in specs.items():
        if name in mapped.whole:
            _check_tensor(tensors[mapped.whole[name]], spec.shape)
            used.add(mapped.whole[name])
        else:
            _check_experts(tensors, name, spec.shape, mapped.experts[name])
            used.update(mapped.experts[name].values())
    used.update(mapped.whole[twin] for twin in _stored_twins(specs, mapped).values())
    used.update(mapped.vision, mapped.ignored)
    left_over = [name for name in tensors if name not in used]
    if left_over:
        raise CheckpointError(
            f"tensor {left_over[0]} has no place in this model{_others(left_over)}", field=left_over[0]
        )


def _stored_twins(specs: Mapping[str, ParameterSpec], mapped: NameMap) -> dict[str, str]:
    """Parameter -> its twin, where the checkpoint has one."""
    return {name: spec.twin for name, spec in specs.items() if spec.twin is not None and spec.twin in mapped.whole}


def _check_twins(reader: CheckpointReader, specs: Mapping[str, ParameterSpec], mapped: NameMap) -> None:
    """A twin with values of its own contradicts the config: whichever were used could be the wrong one."""
    for name, twin in _stored_twins(specs, mapped).items():
        _check_tensor(reader.tensors[mapped.whole[twin]], specs[name].shape)
        tensor = reader.read(mapped.whole[name])
        if not torch.equal(tensor, reader.read(mapped.whole[twin]).to(tensor.dtype)):
            raise CheckpointError(
                f"tensors {mapped.whole[twin]} and {mapped.whole[name]} differ, but the config ties them "
                "(tie_word_embeddings)",
                field=mapped.whole[twin],
            )


def _check_tensor(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"tensor {info.name}: shape {list(info.shape)}, expected {list(shape)}",
            field=info.name,
            limit=list(shape),
            value=list(info.shape),
        )
    if info.dtype not in FLOAT_DTYPES:
        expected = ", ".join(FLOAT_DTYPES)
        raise CheckpointError(
            f"tensor {info.name}: dtype {info.dtype}, expected one of {expected}",
            field=info.name,
            limit=expected,
            value=info.dtype,
        )


def _check_experts(tensors: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...], parts: Parts) -> None:
    num_parts = _parts_of(name)
    for expert in range(shape[0]):
        for part in range(num_parts):
            if (expert, part) not in parts:
                raise CheckpointError(f"{name}: part {part} of expert {expert} is missing", field=name)
            _check_tensor(tensors[parts[expert, part]], (shape[1] // num_parts, shape[2]))
    for (expert, _), tensor in parts.items():
        if expert >= shape[0]:
            raise CheckpointError(f"tensor {tensor}: there are {shape[0]} experts only", field=tensor)


def _parts_of(name: str) -> int:
    return 2 if name.endswith("gate_up_proj") else 1


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _stored_bytes(reader: CheckpointReader, name: str, mapped: NameMap) -> int:
    stored = [mapped.whole[name]] if name in mapped.whole else mapped.experts[name].values()
    return sum(reader.tensors[tensor].num_bytes for tensor in stored)


def _read_ranges(reader: CheckpointReader, name: str, axis: int | None, ranges: list[Range]) -> Tensor:
    """The ranges of a stored tensor along `axis`, one after another, contiguous."""
    if axis is None:
        return reader.read(name)
    pieces = [reader.read(name, axis, span) for span in ranges]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=axis)


def _stack(
    reader: CheckpointReader, parts: Parts, spec: ParameterSpec, ranges: list[Range], dtype: torch.dtype
) -> Tensor:
    """This rank's part of a fused parameter [E, rows, columns] out of its experts' matrices.

    A matrix is the box [1, rows / parts, columns] of the whole, at (expert, part * rows / parts, 0). What it gives
    to this rank is that box cut with the rank's ranges.
    """
    axis = spec.shard_axis or 0
    rows = spec.shape[1] // (1 + max(part for _, part in parts))
    shape = list(spec.shape)
    shape[axis] = sum(end - begin for begin, end in ranges)
    stacked = torch.empty(shape, dtype=dtype)
    for (expert, part), name in parts.items():
        box = [(expert, expert + 1), (part * rows, (part + 1) * rows), (0, spec.shape[2])]
        local = 0  # where the range begins in this rank's tensor
        for begin, end in ranges:
            low, high = max(begin, box[axis][0]), min(end, box[axis][1])
            if low < high:
                target = [slice(*span) for span in box]
                target[axis] = slice(local + low - begin, local + high - begin)
                span = (low - box[axis][0], high - box[axis][0])
                matrix = reader.read(name) if axis == 0 else reader.read(name, axis - 1, span)
                stacked[tuple(target)] = matrix
            local += end - begin
    return stacked
