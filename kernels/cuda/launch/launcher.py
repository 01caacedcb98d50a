"""Launch of a CUDA C++ kernel on the current backend, with its arguments checked.

    launch(SCALE, grid=(4,), threads=256, values=tensor, count=1000, factor=0.5)

Launchers pass tensors and numbers, from which the backend gets addresses. On a GPU that is CuPy's (device.py).
Tests replace it by one that runs the same sources on the CPU, and so test grids, sizes and checks too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
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
    x, y, z, *_ = (*grid, 1, 1, 1)
    blocks = (x, y, z)
    if 0 in blocks:
        return
    for axis, (size, limit) in enumerate(zip(blocks, MOST_GRID, strict=True)):
        _require(kernel, size <= limit, f"grid[{axis}] is {size}, at most {limit}")
    _require(kernel, 0 < threads <= MOST_THREADS, f"threads is {threads}, must be 1 .. {MOST_THREADS}")
    _require(
        kernel, shared_bytes <= MOST_SHARED_BYTES, f"shared_bytes is {shared_bytes}, at most {MOST_SHARED_BYTES}"
    )
    _require(kernel, set(arguments) == set(kernel.types), f"takes {', '.join(kernel.types)}, got {[*arguments]}")
    runner = backend()
    device = _device_of(kernel, arguments, runner.device_type)
    values = [_value(kernel, name, kind, arguments[name]) for name, kind in kernel.types.items()]
    note(kernel.name)
    try:
        runner.run(kernel, device, blocks, threads, shared_bytes, values)
    except (DeviceFault, LaunchError) as error:
        shape = f"grid {blocks}, {threads} threads, {shared_bytes} bytes shared"
        call = f"{kernel.source}: {described(kernel.name, arguments)}, {shape}"
        raise (
            fault_of(call, error) if isinstance(error, DeviceFault) else LaunchError(f"{call}: {error}")
        ) from error


def _device_of(kernel: Kernel, arguments: Mapping[str, Any], kind: str) -> torch.device:
    device: torch.device | None = None
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or (kind == "cuda" and value.device.type == "cpu" and value.is_pinned()):
            continue
        _require(kernel, value.device.type == kind, f"{name} is on {value.device}, the kernel runs on {kind}")
        if device is not None:
            _require(kernel, value.device == device, f"{name} is on {value.device}, not on {device}")
        device = value.device
    return device or torch.device(kind)


def _value(kernel: Kernel, name: str, kind: str, value: Any) -> np.generic:
    """Value of an argument as passed to the kernel: an address or a number."""
    if kind in POINTERS:
        if value is None:
            return np.uint64(0)
        right = isinstance(value, Tensor) and value.dtype == POINTERS[kind]
        _require(kernel, right, f"{name} must be a tensor of {POINTERS[kind]}, is {shown(value)}")
        return np.uint64(value.data_ptr())
    limit = _LIMITS.get(kind)
    if limit is not None:
        _require(kernel, -limit <= value < limit, f"{name} is {value}, more than {kind} holds")
    return SCALARS[kind](value)


def _require(kernel: Kernel, holds: bool, message: str) -> None:
    if not holds:
        raise ArgumentError(f"{kernel.name}: {message}")
