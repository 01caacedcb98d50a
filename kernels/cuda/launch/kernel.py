"""Description and launch of a CUDA C++ kernel.

    SCALE = Kernel("scale.cu", "scale", {"values": "*f32", "count": "i32", "factor": "f32"})
    launch(SCALE, grid=(4,), threads=256, values=tensor, count=1000, factor=0.5)

Launchers pass tensors and numbers, from which the current backend gets addresses. On a GPU that is CuPy's
(device.py). Tests replace it by one that runs the same sources on the CPU, and so test grids, sizes and checks too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.fault import DeviceFault, described, fault_of, note, shown

SOURCES = Path(__file__).parents[1]
# Options of NVRTC. Sums keep the order and the rounding of the sources.
OPTIONS = ("-std=c++17", "--fmad=false", f"-I{SOURCES}")
POINTERS = {
    "*f32": torch.float32,
    "*f64": torch.float64,
    "*bf16": torch.bfloat16,
    "*i64": torch.int64,
    "*i32": torch.int32,
    "*bytes": torch.uint8,
}
SCALARS: dict[str, type[np.generic]] = {"i32": np.int32, "i64": np.int64, "f32": np.float32}
_LIMITS = {"i32": 1 << 31, "i64": 1 << 63}
MOST_GRID = (2**31 - 1, 65535, 65535)
MOST_THREADS = 1024
MOST_SHARED_BYTES = 48 << 10  # of a block, without a request to the driver for more


class LaunchError(RuntimeError):
    """A kernel that could not be compiled, or broke a rule that tests check; the message has its arguments."""


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """A kernel: the extern "C" function `name` of the file `source` in the folder above.

    types: its parameters in order, each a pointer (POINTERS; null where a launch passes None) or a number
    (SCALARS).
    """

    source: str
    name: str
    types: Mapping[str, str]


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


_backends: list[Backend] = []  # the last one is current


def backend() -> Backend:
    """The current backend: CuPy's, made at first use. Raises KernelChoiceError if a GPU or CuPy is missing."""
    if not _backends:
        from cierzo.kernels.cuda.launch.device import CupyBackend

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


def program(source: str) -> str:
    """Source for NVRTC, with a digest of the headers, so that a cache of binaries notices when one changes."""
    included = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.cuh")))
    return (SOURCES / source).read_text(encoding="utf-8") + f"\n// {hashlib.sha256(included).hexdigest()}\n"


def is_aligned(tensor: Tensor, elements: int) -> bool:
    """Whether every row of a matrix starts at a multiple of `elements` of its elements."""
    whole = tensor.data_ptr() % (elements * tensor.element_size()) == 0
    return whole and tensor.stride(0) % elements == 0


def divide_up(count: int, by: int) -> int:
    """Quotient count / by, rounded up."""
    return -(-count // by)
