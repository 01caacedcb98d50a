"""Pieces that the cases of launches.py and calls.py share: a list, a kernel that copies, errors that must come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import triton.language as tl
from torch import Tensor

from cierzo.kernels.triton.launch import Configuration, kernel, launch
from standin.driver import Machine

CASES: dict[str, Callable[[Machine, Path], None]] = {}


def case(function: Callable[[Machine, Path], None]) -> Callable[[Machine, Path], None]:
    """Run by `main`."""
    CASES[function.__name__] = function
    return function


@kernel
def _copy(x_ptr, out_ptr, count, beyond, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at + beyond, mask=at < count), mask=at < count)


COPY = Configuration(
    _copy, {"x_ptr": "*fp32", "out_ptr": "*fp32", "count": "i32", "beyond": "i32"}, {"BLOCK": 64}, num_warps=1
)


def copy(x: Tensor, beyond: int = 0, grid: tuple[int, ...] = (1,)) -> Tensor:
    out = x.new_empty(64)
    launch(COPY, grid, x_ptr=x, out_ptr=out, count=64, beyond=beyond)
    return out


def sent(machine: Machine, tensor: Tensor) -> Tensor:
    with machine.card.loading():
        return tensor.to("cuda")


@contextmanager
def raising(kind: type[BaseException], *words: str) -> Iterator[None]:
    said: str | None = None
    try:
        yield
    except kind as error:
        said = str(error)
    assert said is not None, f"no {kind.__name__}"
    for word in words:
        assert word in said, f"{word!r} is not in {said}"
