"""Checkpoint tensors -> the parameters a model asks for: first all are planned and checked, then each is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cierzo.engine.checkpoint_format import ADAPTER_REMEDY, adapter_files, left_aside
from cierzo.engine.parameters import Parameter, ParameterSpec
from cierzo.engine.weights.names import NameMap, map_names
from cierzo.engine.weights.pieces import stored_matrices
from cierzo.engine.weights.plan import ParameterPlan, plan_parameters, sees, vision_left_aside
from cierzo.engine.weights.quantised import StoredParameter
from cierzo.engine.weights.reader import CheckpointReader, Range

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

    Names are the text-only spelling (`model.layers.0...`, `lm_head.weight`), whatever the checkpoint's is, and
    `vision_tower...`. A vision tower that `specs` has not is skipped, and scales of activations are used on GPUs
    alone; their numbers are logged. Only this rank's slices are read.
    A parameter that is quantised, stored expert by expert or in another order is a StoredParameter, whose values
    are computed when it is packed. On the CPU any other whose dtype agrees aliases the mapped file, so that loading
    costs nothing until it is touched: parameters must not be written to. A parameter that is tied to another is
    left out, unless it has values of its own.

    progress: called with (bytes done, bytes in all) after each parameter.
    Raises CheckpointError naming the tensor, and what was expected and found, when one is missing, left over, of
    another shape or of no dtype that fits; ValueError when a shape does not divide among `world` ranks.
    """
    mapped = map_names(reader.tensors, reader.format, sees(specs))
    plans = plan_parameters(reader.tensors, specs, mapped)
    plans = {name: plan for name, plan in plans.items() if not _is_twin(reader, plans, name, dtype)}
    _log_skipped(reader, mapped, vision_left_aside(mapped, specs))
    total_bytes, done_bytes = sum(plan.num_bytes for plan in plans.values()), 0
    parameters: dict[str, Parameter] = {}
    for name, plan in plans.items():
        parameters[name] = _read(reader, plan, rank_ranges(plan.spec, rank, world), dtype, torch.device(device))
        done_bytes += plan.num_bytes
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


def _read(
    reader: CheckpointReader, plan: ParameterPlan, ranges: list[Range], dtype: torch.dtype, device: torch.device
) -> Parameter:
    """The ranges of a parameter along its shard axis: a tensor, or matrices of which nothing is read yet."""
    axis, shape = plan.spec.shard_axis, plan.spec.shape
    if plan.is_plain:
        return _read_ranges(reader, plan.experts[0][0].tensor.name, axis, ranges).to(device=device, dtype=dtype)
    stored = StoredParameter(stored_matrices(reader, plan), len(shape) == 3, dtype, device)
    return stored if axis is None or ranges == [(0, shape[axis])] else stored.cut(axis, ranges)


def _read_ranges(reader: CheckpointReader, name: str, axis: int | None, ranges: list[Range]) -> Tensor:
    """The ranges of a stored tensor along `axis`, one after another, contiguous."""
    if axis is None:
        return reader.read(name)
    pieces = [reader.read(name, axis, span) for span in ranges]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=axis)


def _is_twin(reader: CheckpointReader, plans: Mapping[str, ParameterPlan], name: str, dtype: torch.dtype) -> bool:
    """Whether a parameter is nothing but the one that it is tied to. One that is stored with other values is not:
    the flag that ties them is then a default that somebody left, and the values are what was trained."""
    tied_to = plans[name].spec.tied_to
    if tied_to is None:
        return False
    both = plans[name], plans[tied_to]
    names = [plan.experts[0][0].tensor.name for plan in both]
    if all(plan.is_plain for plan in both):
        own, other = (reader.read(tensor).to(dtype) for tensor in names)
        if torch.equal(own, other):
            return True
    _log.warning(
        "%s: the config ties %s to %s (tie_word_embeddings), and the checkpoint stores both with different values: "
        "each is used as it is stored",
        *(reader.folder, *names),
    )
    return False


def _log_skipped(reader: CheckpointReader, mapped: NameMap, vision: list[str]) -> None:
    adapters = adapter_files(reader.folder)
    if adapters:
        _log.warning(
            "%s holds an adapter (%s), which is NOT applied: the base model answers. To use the adapter, %s",
            *(reader.folder, ", ".join(adapters), ADAPTER_REMEDY),
        )
    for note in reader.format.quantisation.notes():
        _log.info("%s: %s", reader.folder, note)
    if vision:
        num_bytes = sum(reader.tensors[name].num_bytes for name in vision)
        _log.warning("%s: %s", reader.folder, left_aside(len(vision), num_bytes))
    skipped = sum("activation scale" in roles for roles in mapped.companions.values())
    if skipped:
        _log.info(
            "%s: %d scales of activations not used, but for FP8 matrices' where `activations` is fp8: elsewhere "
            "kernels take activations in 16 bits, or scale them as they come",
            reader.folder,
            skipped,
        )
