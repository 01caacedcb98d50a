"""On the device: every operation against the plain-torch reference in fp32; a row's bits, whatever is beside it.

Inputs are random and new in every run; memory that outputs may be made of holds NaN beforehand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cierzo.bench.gpu.cases import BY_FP8, WEIGHTED, make_call, mapped, widened
from cierzo.bench.gpu.kernels import read_through_descriptors
from cierzo.bench.kernel_cases import Size
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels import registry
from cierzo.kernels.formats.activations import QuantisedRows
from cierzo.kernels.ops.attention import PagedQueries

SIZES = (
    Size(name="one row", sequences=1, rows_each=1, context=32),
    Size(name="decode", sequences=5, rows_each=1, context=1536),
    Size(name="decode, one prefix", sequences=5, rows_each=1, context=1536, shared=1056),
    Size(name="many rows", sequences=130, rows_each=1, context=64),
    Size(name="prefill", sequences=2, rows_each=150, context=416),
)
TOLERANCE = 1e-2  # of the root mean square: bf16 keeps 8 bits of every input, sum and result
TOLERANCE_FP8 = 3e-2  # where values are rounded to 4 bits: a last bit of bf16 may turn the rounding of some
CHOICES = 1e-2  # the share of choices between near equals that may fall otherwise
POISON_BYTES = 256 << 20
LARGEST_E4M3 = 448.0

# What is changed in place, by position among the arguments. Of qkv, the queries alone are defined afterwards.
IN_PLACE: dict[str, tuple[int, ...]] = {
    "add_rms_norm": (1,),
    "add_rms_norm_fp8": (1,),
    "apply_rope": (0,),
    "write_latents": (0,),
    "write_normed_latents": (0,),
    "write_keys_values": (0, 1),
    "rotate_and_write_keys_values": (0, 1),
    "add_bias": (0,),
    "apply_penalties": (0,),
    "mask_tokens": (0,),
    "copy_blocks": (0,),
    "gather_blocks": (2,),
    "scatter_blocks": (0,),
}
# Whose rows are those of the first argument, each on its own.
ROWWISE = (
    *("rms_norm", "rms_norm_fp8", "linear", "lm_head", "gated_mlp", "mla_absorb", "mla_unabsorb"),
    *("peaks", "log_probabilities"),
)
ATTENTION = ("mla_decode", "mla_prefill", "gqa_decode", "gqa_prefill")


class Failed(Exception):
    """An operation is wrong on this device; the text says how."""


def check(
    operation: str, model: ModelSizes, size: Size, format: str, device: torch.device, seed: int
) -> dict[str, Any] | None:
    """Deviation from the reference, and whether rows keep their bits; None where the model lacks the operation.

    Raises Failed.
    """
    call = make_call(operation, model, size, format, device, seed=seed, cold_bytes=0)
    if call is None:
        return None
    choice = registry.implementations(operation, "cuda")[0]
    reference = registry.implementations(operation, "cuda")[-1].load()
    function, arguments = choice.load(), call.arguments[0]
    poison(device)
    got = outputs(operation, function, cloned(arguments))
    wanted = outputs(operation, reference, widened(cloned(arguments)))
    tolerance = TOLERANCE_FP8 if format in BY_FP8 else TOLERANCE
    deviation = max((_deviation(a, b, tolerance) for a, b in zip(got, wanted, strict=True)), default=0.0)
    _check_again(operation, function, arguments, got)
    if operation in WEIGHTED:
        with read_through_descriptors():
            described = outputs(operation, function, cloned(arguments))
        if not all(_equal(one, other) for one, other in zip(got, described, strict=True)):
            raise Failed(f"{operation}: read through descriptors it has other bits")
    rows = 0
    for pieces in _companies(operation, function, arguments):
        rows += 1
        for name, alone, beside in pieces:
            if not _equal(alone, beside):
                raise Failed(f"{operation}: {name} has other bits alone than in company")
    return {"implementation": choice.name, "deviation": deviation, "companies": rows, "seed": seed}


def outputs(operation: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that a call returns, and those that it changed."""
    result = function(*arguments)
    returned = [] if result is None else tensors_of(result)
    changed = [arguments[index] for index in IN_PLACE.get(operation, ())]
    if operation == "rotate_and_write_keys_values":
        keys, qkv = arguments[0], arguments[3]
        queries = qkv.shape[1] - 2 * keys.shape[2] * 2 * arguments[4].shape[1]
        changed.append(qkv[:, :queries])
    return [*returned, *changed]


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors of a result: one, several, or quantised rows."""
    if isinstance(result, QuantisedRows):
        return [result.codes, result.scales]
    return [result] if isinstance(result, Tensor) else list(result)


def cloned(value: Any) -> Any:
    """Copies of the tensors that a call may change; large weights are shared."""
    return mapped(
        value, lambda tensor: tensor.clone() if tensor.nbytes < 1 << 30 else tensor, lambda matrix: matrix
    )


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next outputs are made of."""
    torch.full((POISON_BYTES // 4,), torch.nan, device=device)


def _deviation(got: Tensor, wanted: Tensor, tolerance: float) -> float:
    """Root mean square of the difference, relative to that of the values; of integers, the share that differs."""
    if got.shape != wanted.shape:
        raise Failed(f"shape {list(got.shape)}, must be {list(wanted.shape)}")
    if not got.is_floating_point():
        share = float((got != wanted).double().mean()) if got.numel() else 0.0
        if share > CHOICES:
            raise Failed(f"{share:.2%} of the integers differ")
        return share
    if got.dtype == torch.float8_e4m3fn:
        tolerance = TOLERANCE_FP8
        wanted = wanted.float().clamp(-LARGEST_E4M3, LARGEST_E4M3).to(got.dtype).float()
        got = got.float()
    difference = got.double() - wanted.double()
    finite = wanted.isfinite()
    if not torch.equal(got.isfinite(), finite):
        raise Failed(f"{int((got.isfinite() != finite).sum())} values are finite in one of both only")
    scale = float(wanted.double()[finite].square().mean().sqrt()) if finite.any() else 0.0
    error = float(difference[finite].square().mean().sqrt()) if finite.any() else 0.0
    relative = error / scale if scale else error
    if not relative <= tolerance:
        raise Failed(f"deviates by {relative:.2e} of the values, more than {tolerance}")
    return relative


def _check_again(
    operation: str, function: Callable[..., Any], arguments: tuple[Any, ...], first: list[Tensor]
) -> None:
    for again, before in zip(outputs(operation, function, cloned(arguments)), first, strict=True):
        if not _equal(again, before):
            raise Failed(f"{operation}: a second call on the same arguments gives other bits")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


Pieces = list[tuple[str, Tensor, Tensor]]


def _companies(operation: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[Pieces]:
    """(what, its bits in a smaller company, its bits in the whole)."""
    if operation in ATTENTION:
        yield from _segments(function, arguments)
        return
    if operation == "expert_mlp":
        yield from _tokens(function, arguments)
        return
    if operation not in ROWWISE:
        return
    whole = tensors_of(function(*arguments))
    count = len(arguments[0])
    for start, stop in {(0, 1), (count - 1, count), (0, count // 2), (count // 3, count)}:
        if start < stop:
            part = tensors_of(function(arguments[0][start:stop].clone(), *arguments[1:]))
            yield [(f"row {start}", a, b[start:stop]) for a, b in zip(part, whole, strict=True)]


def _tokens(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[Pieces]:
    """Some tokens with their own experts, grouped anew."""
    x, gate_up, down, weights, order, starts, *shared = arguments
    whole = function(*arguments)
    count, slots = weights.shape
    experts = torch.empty(count * slots, dtype=torch.int64, device=x.device)
    lengths = starts.diff()
    experts[order] = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)
    for start, stop in {(0, 1), (count // 2, count // 2 + 1), (count // 3, count)}:
        ids = experts.view(count, slots)[start:stop].flatten()
        ranked = ids.sort(stable=True)
        bounds = torch.searchsorted(ranked.values, torch.arange(len(starts), device=x.device))
        part = function(
            x[start:stop].clone(), gate_up, down, weights[start:stop].clone(), ranked.indices, bounds, *shared
        )
        yield [(f"token {start}", part, whole[start:stop])]


def _segments(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[Pieces]:
    """Each of the first segments alone; its rows in pieces, as if its prompt came in chunks."""
    at = next(index for index, value in enumerate(arguments) if isinstance(value, PagedQueries))
    q, queries = arguments[0], arguments[at]
    whole = function(*arguments)
    for segment in range(min(3, len(queries.contexts))):
        first, length = int(queries.query_starts[segment]), queries.query_lengths[segment]
        context = queries.contexts[segment]
        for start, stop in {(0, length), (0, (length + 1) // 2), (length // 2, length)}:
            if start == stop:
                continue
            alone = dataclasses.replace(
                queries,
                query_starts=torch.tensor([0, stop - start], dtype=torch.int32, device=q.device),
                context_lengths=torch.tensor([context - length + stop], dtype=torch.int32, device=q.device),
                table_rows=queries.table_rows[segment : segment + 1].clone(),
                query_lengths=[stop - start],
                contexts=[context - length + stop],
            )
            rows = q[first + start : first + stop].clone()
            part = function(rows, *arguments[1:at], alone, *arguments[at + 1 :])
            yield [(f"segment {segment}, rows {start} to {stop}", part, whole[first + start : first + stop])]
