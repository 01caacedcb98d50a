"""On the device: every operation against the plain-torch reference in fp32; a row's bits, whatever is beside it.

Inputs are random and new in every run; memory that outputs are made of holds NaN beforehand, or -1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cierzo.bench.gpu.calls import Cell, cells, make_call
from cierzo.bench.gpu.cases import BY_FP8, CASES, Size, widened
from cierzo.bench.gpu.timing import read_through_descriptors
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels import registry
from cierzo.kernels.formats.activations import QuantisedRows
from cierzo.kernels.formats.device import LARGEST_E4M3
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ops.terms import Terms
from cierzo.kernels.ref.terms import sum_terms

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
UNWRITTEN = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
}
POISON = 0xFF  # of each byte: NaN in every float format


class Failed(Exception):
    """An operation is wrong on this device; the text says how."""


class Poisoned(TorchDispatchMode):
    """While it is entered, memory that torch leaves as it was is poisoned, whatever its size and wherever an
    allocator takes it from."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See TorchDispatchMode."""
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in UNWRITTEN:
            torch.tensor((), dtype=torch.uint8, device=result.device).set_(result.untyped_storage()).fill_(POISON)
        return result


def check(
    operation: str, model: ModelSizes, size: Size, format: str, device: torch.device, seed: int
) -> dict[str, Any]:
    """Deviation from the reference, and whether rows keep their bits. Raises Failed."""
    (arguments, *_), _ = make_call(operation, model, size, format, device, seed=seed, cold_bytes=0)
    ours, reference = (registry.implementations(operation, "cuda")[place] for place in (0, -1))
    function = ours.load()
    with Poisoned():
        got = outputs(operation, function, arguments)
    wanted = outputs(operation, reference.load(), tuple(map(widened, arguments)))
    tolerance = TOLERANCE_FP8 if format in BY_FP8 else TOLERANCE
    deviation = max((_deviation(a, b, tolerance) for a, b in zip(got, wanted, strict=True)), default=0.0)
    _same(got, outputs(operation, function, arguments), f"{operation}: a second call has other bits")
    if CASES[operation].weighted:
        with read_through_descriptors():
            described = outputs(operation, function, arguments)
        _same(got, described, f"{operation}: read through descriptors it has other bits")
    companies = 0
    for start, stop, part in _companies(operation, arguments):
        companies += 1
        beside = [tensor[start:stop] for tensor in got]
        _same(beside, _tensors(function(*part)), f"{operation}: row {start} has other bits alone than in company")
    return {"implementation": ours.name, "deviation": deviation, "companies": companies, "seed": seed}


def outputs(operation: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that a call returns, and copies of those that it changes, as it leaves them."""
    changes = CASES[operation].changes
    arguments = tuple(one.clone() if place in changes else one for place, one in enumerate(arguments))
    found = [*_tensors(function(*arguments)), *(arguments[place] for place in changes)]
    if operation == "rotate_and_write_keys_values":  # keys and values move away: only the queries are defined then
        keys, qkv = found[0], found[-1]
        found[-1] = qkv[:, : qkv.shape[1] - 2 * keys.shape[2] * keys.shape[3]]
    return found


def _tensors(result: Any) -> list[Tensor]:
    """The tensors of a result: none, one, several, quantised rows, or the sum of terms."""
    if isinstance(result, Terms):
        return [sum_terms(result)]
    if isinstance(result, QuantisedRows):
        return [result.codes, result.scales]
    return [result] if isinstance(result, Tensor) else list(result or ())


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
        wanted = wanted.float().clamp(-LARGEST_E4M3, LARGEST_E4M3).to(got.dtype)
    got, wanted = got.double(), wanted.double()
    finite = wanted.isfinite()
    if not torch.equal(got.isfinite(), finite):
        raise Failed(f"{int((got.isfinite() != finite).sum())} values are finite in one of both only")
    scale, error = (
        float(values[finite].square().mean().sqrt()) if finite.any() else 0.0 for values in (wanted, got - wanted)
    )
    relative = error / scale if scale else error
    if not relative <= tolerance:
        raise Failed(f"deviates by {relative:.2e} of the values, more than {tolerance}")
    return relative


def _same(some: list[Tensor], others: list[Tensor], otherwise: str) -> None:
    """Raise Failed where tensors are not equal bit for bit, NaN included."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for pair in zip(some, others, strict=True):
        one, other = (tensor.contiguous().view(integers[tensor.element_size()]) for tensor in pair)
        if not torch.equal(one, other):
            raise Failed(otherwise)


def checked() -> Iterator[tuple[str, Cell]]:
    """Every operation, model, size and number format, sizes that no model has too."""
    return cells(SIZES, {operation: known.hostile for operation, known in CASES.items()})


Companies = Iterator[tuple[int, int, tuple[Any, ...]]]


def _companies(operation: str, arguments: tuple[Any, ...]) -> Companies:
    """(start, stop, arguments of a call for these rows alone), for operations that keep rows apart."""
    if any(isinstance(value, PagedQueries) for value in arguments):
        yield from _segments(arguments)
    elif operation in ("expert_mlp", "expert_terms"):
        yield from _tokens(arguments)
    elif CASES[operation].rowwise:
        x, *others = arguments
        count = len(x)
        for start, stop in {(0, 1), (count - 1, count), (0, count // 2), (count // 3, count)}:
            if start < stop:
                yield start, stop, (x[start:stop].clone(), *others)


def _tokens(arguments: tuple[Any, ...]) -> Companies:
    """Some tokens with their own experts, grouped anew."""
    x, gate_up, down, weights, order, starts, *shared = arguments
    count = len(x)
    experts = torch.empty_like(order)
    experts[order] = torch.repeat_interleave(torch.arange(len(starts) - 1, device=x.device), starts.diff())
    for start, stop in {(0, 1), (count // 2, count // 2 + 1), (count // 3, count)}:
        ranked = experts.view(count, -1)[start:stop].flatten().sort(stable=True)
        bounds = torch.searchsorted(ranked.values, torch.arange(len(starts), device=x.device))
        grouped = (weights[start:stop].clone(), ranked.indices, bounds)
        yield start, stop, (x[start:stop].clone(), gate_up, down, *grouped, *shared)


def _segments(arguments: tuple[Any, ...]) -> Companies:
    """Each of the first segments alone; its rows in pieces, as if its prompt came in chunks."""
    at = next(index for index, value in enumerate(arguments) if isinstance(value, PagedQueries))
    q, queries = arguments[0], arguments[at]
    for segment in range(min(3, len(queries.contexts))):
        first, length = int(queries.query_starts[segment]), queries.query_lengths[segment]
        for start, stop in {(0, length), (0, (length + 1) // 2), (length // 2, length)}:
            if start < stop:
                context, table = queries.contexts[segment] - length + stop, int(queries.table_rows[segment])
                alone = PagedQueries.of([stop - start], [context], [table], queries.block_tables)
                rows = q[first + start : first + stop].clone()
                yield first + start, first + stop, (rows, *arguments[1:at], alone, *arguments[at + 1 :])
