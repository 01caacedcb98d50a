"""All that a server can launch on a GPU: kernels, in the configurations in which its model's steps need them.

The model runs on meta tensors, which hold nothing, in every form of step that there is; what it would launch is
noted, and nothing runs. That takes the weights' formats, sizes and strides alone, and no GPU. The operations must
be bound for "cuda".

A kernel chooses between its forms by whether a number (rows of a step, of a segment, of logits, tokens of a
context) is above a threshold. So steps have numbers on both sides of those that are known, and numbers that double,
and one more than each: they lie on both sides of any, and between two that are not within a factor of two. Of
sequences there are the fewest and the most that can have the rows, and contexts are as long as one that any kernel
tells from longer ones: the host's work for all the tokens of thousands of longest contexts would take minutes.
Tests take all numbers, the longest contexts, and steps drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cierzo.cache.pool import DTYPES, KVPool
from cierzo.engine.config import EngineConfig
from cierzo.engine.model import vision
from cierzo.engine.model.build import build_model
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.decoder import Decoder
from cierzo.engine.model.positions import Positions
from cierzo.engine.parameters import Parameter, Parameters, PlainMatrices, Shard
from cierzo.engine.weights.matrices import DeviceMatrices
from cierzo.engine.worker.grammars import Constraint, Makers
from cierzo.engine.worker.sampling import Sampler
from cierzo.engine.worker.scoring import BLOCK_ROWS
from cierzo.engine.worker.staging import Staging
from cierzo.kernels.cuda.launch.kernel import Kernel
from cierzo.kernels.ops import compose
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ops.block import DecoderWeights, StepRows
from cierzo.kernels.triton import flash
from cierzo.kernels.triton.heuristics import thresholds
from cierzo.kernels.triton.launch import Configuration, Launch, dry_run
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import Admission

META = torch.device("meta")
Lengths = list[int]  # of the segments of a step


@dataclass(frozen=True, slots=True)
class Launches:
    """Kernels in Triton, each configuration once, and in CUDA C++."""

    configurations: Sequence[Configuration]
    kernels: Sequence[Kernel]


def launches(config: EngineConfig, weights: DecoderWeights) -> Launches:
    """All that a server of this configuration can launch. weights: the model's, on any device, as they are read."""
    model = Decoder(_one_of_each(_on_meta(weights)), Positions(config.model, META), Shard(0, 1, lambda part: part))
    limits = config.scheduler
    # One block stands for all: their number is in no kernel.
    pool = KVPool(config.layout, 1, META)
    # Of contexts it counts whether they are one round's, and whether one of them needs scaled queries.
    scaling = config.model.query_scaling
    enough = 1 + max(flash.WORKSPACE_TOKENS, 0 if scaling is None else scaling.original_positions)
    found: list[Launch] = []
    with torch.inference_mode():
        for rows, logit_rows in steps(limits, config.cache.block_tokens, telling(limits.budget_tokens), enough):
            found += dry_run(model.logits, rows, pool, logit_rows)
        for count in telling(BLOCK_ROWS):
            found += dry_run(_head, model.weights, count)
        for admissions in _samplings():
            found += dry_run(_sample, admissions, config.model.vocab_size)
        found += _of_images(config.model, DTYPES[config.dtype])
    kernels = {one.kernel.name: one.kernel for one in found if isinstance(one.kernel, Kernel)}
    configurations = {one.kernel.key: one.kernel for one in found if isinstance(one.kernel, Configuration)}
    return Launches([*configurations.values()], [*kernels.values()])


def _of_images(model: ModelConfig, dtype: torch.dtype) -> Iterator[Launch]:
    """Launches of the vision tower, if there is one, for images of the sizes that cover every form of its kernels.
    Its weights are plain, and its layers alike."""
    if model.vision is None:
        return
    one_layer = msgspec.structs.replace(model.vision, num_layers=1)
    stored = {
        name: torch.empty(spec.shape, dtype=dtype, device=META)
        for name, spec in vision.specs(one_layer, model.hidden_size).items()
    }
    matrices = PlainMatrices(META)
    tower = vision.build(msgspec.structs.replace(model, vision=one_layer), Parameters(stored, matrices))
    assert tower is not None
    unit = one_layer.unit_px
    for count in telling((one_layer.max_side_px // unit) ** 2):
        yield from dry_run(tower.embed, torch.empty(count * unit, unit, 3, device=META))


def _head(weights: DecoderWeights, count: int) -> None:
    """The head of a step of which so many rows score a prompt."""
    width, dtype = weights.embedding.shape[1], weights.embedding.dtype
    x, residual = (torch.empty(count, width, dtype=dtype, device=META) for _ in range(2))
    compose.head(weights, x, residual, torch.empty(count, dtype=torch.int64, device=META))


def telling(most: int) -> list[int]:
    """Numbers of rows up to `most` that tell all that numbers decide: 1, 2, 3, 4, 5, 8, 9, 16 .. and the others."""
    last = [1 << power for power in range(most.bit_length())] + thresholds()
    return sorted({number for one in last for number in (one, one + 1) if 0 < number <= most} | {most})


def steps(
    limits: SchedulerConfig, block_tokens: int, counts: Sequence[int], enough: int
) -> Iterator[tuple[StepRows, Tensor | None]]:
    """Steps of so many rows each, in every form, on meta tensors, and the rows whose logits they ask for.

    enough: tokens that a long context, or all of a step's, have before its rows, where there is room for them.
    """
    tables = torch.empty(
        (limits.max_running, -(-limits.max_model_len // block_tokens)), dtype=torch.int32, device=META
    )
    for count in counts:
        for lengths in _segments(count, limits):
            yield from _of_contexts(lengths, [], limits, tables, enough)
            yield from _of_contexts([], lengths, limits, tables, enough)
        for lengths in _segments(count - 1, limits):
            # A sequence that goes on after a preemption can have rows of both kinds: there may be one more segment.
            yield from _of_contexts(lengths, [1], limits, tables, enough)
            yield from _of_contexts([1], lengths, limits, tables, enough)


def _segments(count: int, limits: SchedulerConfig) -> Iterator[Lengths]:
    """So many rows as those of as few sequences as can have them, and of as many."""
    fewest = -(-count // limits.max_model_len)
    if 0 < fewest <= limits.max_running:
        for among in sorted({fewest, min(limits.max_running, count)}):
            yield [count // among + (number < count % among) for number in range(among)]


def long_contexts(lengths: Lengths, most: int, enough: int) -> Lengths:
    """Contexts of segments that have `enough` tokens before their own between them, the first as many as it can;
    less where contexts of `most` tokens are not enough."""
    contexts = []
    for length in lengths:
        before = min(most - length, enough)
        contexts.append(before + length)
        enough -= before
    return contexts


def _of_contexts(
    expanded: Lengths, absorbed: Lengths, limits: SchedulerConfig, tables: Tensor, enough: int
) -> Iterator[tuple[StepRows, Tensor | None]]:
    """A step whose contexts are its own tokens, and one whose contexts are long."""
    total = sum(expanded) + sum(absorbed)
    tokens, positions, slots = (torch.empty(total, dtype=torch.int64, device=META) for _ in range(3))
    every = not expanded and len(absorbed) == total
    sequences = min(len(expanded) + len(absorbed), limits.max_running)
    logit_rows = torch.empty(sequences, dtype=torch.int64, device=META)
    for before in (0, enough):
        prompts, generated = (
            PagedQueries.of(
                lengths, long_contexts(lengths, limits.max_model_len, before), [0] * len(lengths), tables
            )
            for lengths in (expanded, absorbed)
        )
        rows = StepRows(tokens, positions, slots, sum(expanded), prompts, generated)
        yield rows, None if every else logit_rows


# --- weights -----------------------------------------------------------------------------------------------


def weights_on_meta(config: EngineConfig, parameters: Mapping[str, Parameter]) -> DecoderWeights:
    """The weights that a GPU will hold of loaded parameters, of which no value is read."""
    dtype = DTYPES[config.dtype]
    matrices = DeviceMatrices(config.weights, dtype, META, config.activations, config.head)
    stored = {name: _on_meta(parameter) for name, parameter in parameters.items()}
    return build_model(config.model, stored, device=META, dtype=dtype, matrices=matrices).weights


def _on_meta(value: Any) -> Any:
    """Copy a tree of weights, with meta tensors in the place of tensors."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
    if isinstance(value, torch.device):
        return META
    if isinstance(value, list | tuple):
        return type(value)(map(_on_meta, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _on_meta(getattr(value, one.name)) for one in fields(value) if one.init})
    return value


def _one_of_each(weights: DecoderWeights) -> DecoderWeights:
    """The model with its first layer, and one of each kind behind that: all others launch what these do."""
    first, *others = zip(weights.blocks[::2], weights.blocks[1::2], strict=True)
    kinds = {_shapes(layer): layer for layer in others}
    return replace(weights, blocks=[block for layer in (first, *kinds.values()) for block in layer])


def _shapes(value: Any) -> str:
    """Text that is equal for weights of equal formats, shapes and strides."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}{value.stride()}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_shapes, value))})"
    if is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}{_shapes([getattr(value, one.name) for one in fields(value)])}"
    return repr(value)


# --- sampling ----------------------------------------------------------------------------------------------


class _MetaStaging(Staging):
    """Staging to tensors that hold nothing, from which nothing comes back."""

    def __init__(self) -> None:
        super().__init__(META)

    def to_device(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """See Staging."""
        return [torch.from_numpy(np.ascontiguousarray(array)).reshape(-1).to(META) for array in arrays]

    def to_host(self, tensors: Sequence[Tensor]) -> Callable[[], list[NDArray[Any]]]:
        """See Staging."""
        return list


def _samplings() -> list[list[SamplingParams]]:
    """Sequences of a step that ask for nothing, and for all that there is."""
    everything = SamplingParams(
        temperature=1.0, top_k=5, top_p=0.5, min_p=0.1, logprobs=2, min_tokens=9,
        repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.5, logit_bias={1: 1.0}, seed=0,
        stop_token_ids=(1,),
    )  # fmt: skip
    greedy = SamplingParams(temperature=0.0, seed=0)
    return [[greedy], [everything], [greedy, everything]]


def _sample(sequences: list[SamplingParams], vocab_size: int) -> None:
    count = len(sequences)
    sampler = Sampler(count, META, _MetaStaging())
    for slot, params in enumerate(sequences):
        constraint = Constraint(Makers()) if params.temperature else None
        if constraint is not None:
            constraint.mask = np.zeros(-(-vocab_size // 32), np.int32)
        sampler.admit(slot, 0, Admission(params, (1, 2), (3,), (), constraint=constraint))
    logits = torch.empty(count, vocab_size, dtype=torch.float32, device=META)
    for pending in ((), range(count)):
        sampler.launch(logits, [*range(count)], [3] * count, pending)
