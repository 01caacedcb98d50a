"""Launch of a CUDA C++ kernel on the current backend, with its arguments checked.

    launch(SCALE, grid=(4,), threads=256, values=tensor, count=1000, factor=0.5)

Launchers pass tensors and numbers, from which the backend gets addresses. On a GPU that is CuPy's (device.py).
Tests replace it by one that runs the same sources on the CPU, and so test grids, sizes and checks too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.cuda.launch.device import CupyBackend
from cierzo.kernels.cuda.launch.kernel import POINTERS, SCALARS, Kernel, LaunchError
from cierzo.kernels.fault import DeviceFault, described, fault_of, note, shown

_LIMITS = {"i32": 1 << 31, "i64": 1 << 63}
MOST_GRID = (2**31 - 1, 65535, 65535)
MOST_THREADS = 1024
MOST_SHARED_BYTES = 48 << 10  # of a block, without a request to the driver for more
_NULL = np.uint64(0)
# Sizes, and addresses of what stays, come again with every launch: looked up they take half the time.
_KNOWN = 4096
_address = lru_cache(_KNOWN)(np.uint64)
_WHOLE = {kind: lru_cache(_KNOWN)(SCALARS[kind]) for kind in _LIMITS}


class Backend(Protocol):
    """Runs kernels."""

    @property
    def device_type(self) -> str:
        """Type of the device whose tensors the kernels read and write: "cuda", or "cpu" in tests."""

    def run(
        self,
        kernel: Kernel,
        device: torch.device,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        values: Sequence[np.generic],
    ) -> None:
        """Launch on the device's current stream. Raises DeviceFault or LaunchError with the runtime's message."""

    def prepare(self, kernels: Sequence[Kernel], device: torch.device, folder: Path) -> None:
        """Compile and load kernels for a device, so that no launch does; `folder` keeps machine code. Raises
        LaunchError with the compiler's words."""


_backends: list[Backend] = []  # the last one is current


def backend() -> Backend:
    """The current backend: CuPy's, made at first use. Raises KernelChoiceError if a GPU or CuPy is missing."""
    if not _backends:
        _backends.append(CupyBackend())
    return _backends[-1]


@contextmanager
def running_on(other: Backend) -> Any:
    """Make another backend current within a `with` block."""
    _backends.append(other)
    try:
        yield other
    finally:
        _backends.remove(other)


def launch(kernel: Kernel, *, grid: Sequence[int], threads: int, shared_bytes: int = 0, **arguments: Any) -> None:
    """Run `grid` blocks of `threads` threads on the current stream; a grid without blocks does nothing.

    Raises ArgumentError, before anything runs, for a tensor of another dtype or on another device, and for a number
    or a grid past its limit; LaunchError for a source that does not compile; DeviceFault for a CUDA error, which
    may stem from an earlier launch.
    """
    x, y, z, *_ = (*grid, 1, 1)
    blocks = (x, y, z)
    if x == 0 or y == 0 or z == 0:
        return
    if x > MOST_GRID[0] or y > MOST_GRID[1] or z > MOST_GRID[2]:
        axis = next(axis for axis in range(3) if blocks[axis] > MOST_GRID[axis])
        raise _refusal(kernel, f"grid[{axis}] is {blocks[axis]}, at most {MOST_GRID[axis]}")
    if not 0 < threads <= MOST_THREADS:
        raise _refusal(kernel, f"threads is {threads}, must be 1 .. {MOST_THREADS}")
    if shared_bytes > MOST_SHARED_BYTES:
        raise _refusal(kernel, f"shared_bytes is {shared_bytes}, at most {MOST_SHARED_BYTES}")
    if arguments.keys() != kernel.types.keys():
        raise _refusal(kernel, f"takes {', '.join(kernel.types)}, got {[*arguments]}")
    runner = backend()
    device, values = _taken(kernel, arguments, runner.device_type)
    note(kernel.name)
    try:
        runner.run(kernel, device, (x, y, z), threads, shared_bytes, values)
    except (DeviceFault, LaunchError) as error:
        shape = f"grid {blocks}, {threads} threads, {shared_bytes} bytes shared"
        call = f"{kernel.source}: {described(kernel.name, arguments)}, {shape}"
        raise (
            fault_of(call, error) if isinstance(error, DeviceFault) else LaunchError(f"{call}: {error}")
        ) from error


def _taken(kernel: Kernel, arguments: Mapping[str, Any], kind: str) -> tuple[torch.device, list[np.generic]]:
    """The device of the tensors, and what the kernel is passed: addresses and numbers."""
    device: torch.device | None = None
    values: list[np.generic] = []
    for name, dtype, number, limit in _parameters(kernel):
        value = arguments[name]
        if dtype is None:
            if limit is not None and not -limit <= value < limit:
                raise _refusal(kernel, f"{name} is {value}, more than {kernel.types[name]} holds")
            values.append(number(value))
            continue
        if value is None:
            values.append(_NULL)
            continue
        if not isinstance(value, Tensor) or value.dtype is not dtype:
            raise _refusal(kernel, f"{name} must be a tensor of {dtype}, is {shown(value)}")
        found = value.device
        if found != device and not (kind == "cuda" and found.type == "cpu" and value.is_pinned()):
            if found.type != kind:
                raise _refusal(kernel, f"{name} is on {found}, the kernel runs on {kind}")
            if device is not None:
                raise _refusal(kernel, f"{name} is on {found}, not on {device}")
            device = found
        values.append(_address(value.data_ptr()))
    return device or torch.device(kind), values


@cache
def _parameters(kernel: Kernel) -> list[tuple[str, torch.dtype | None, Any, int | None]]:
    """Each parameter's name, a pointer's dtype, a number's type, and a bound of whole numbers."""
    numbers = SCALARS | _WHOLE
    return [(name, POINTERS.get(kind), numbers.get(kind), _LIMITS.get(kind)) for name, kind in kernel.types.items()]


def _refusal(kernel: Kernel, message: str) -> ArgumentError:
    return ArgumentError(f"{kernel.name}: {message}")
