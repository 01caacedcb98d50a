"""Triton kernels, their configurations and their launch.

A kernel is compiled once for each `Configuration`: integers and floats at run time are not specialised (`kernel`
sees to that), pointers always count as aligned to 16 bytes (`launch` refuses others), and all else that the code
depends on is a constant. So a new number of rows compiles nothing, and the code that is compiled and inspected
without a GPU is the code that runs on one.

    @kernel
    def _scale(x_ptr, out_ptr, count, factor, BLOCK: tl.constexpr): ...

    launch(Configuration(_scale, {"x_ptr": "*bf16", "out_ptr": "*fp32", "count": "i32", "factor": "fp32"},
                         {"BLOCK": 256}, num_warps=4), grid, x_ptr=x, out_ptr=out, count=7, factor=0.5)
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.cuda.launch.launcher import running_on
from cierzo.kernels.fault import described, fault_of, is_device_error, note

ALIGNMENT = 16  # bytes: the widest load of one thread
POINTER = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
_LIMITS = {"i32": 1 << 31}  # Triton itself takes an integer for an i64 where it is larger, and compiles anew
_unsettled: list[Any] = []  # kernels, and functions that kernels call, in the order of their definition
_dry: list[Launch] | None = None  # launches of a dry run; None: launches run


def kernel(function: Callable[..., None]) -> Any:
    """Apply triton.jit. Parameters named `*_ptr` are pointers; others are constants, or numbers not specialised."""
    scalars = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if not name.endswith("_ptr") and "constexpr" not in str(parameter.annotation)
    ]
    found = triton.jit(do_not_specialize=scalars)(function)
    _unsettled.append(found)
    return found


def settle() -> None:
    """Have Triton take the digests of all kernels in one order, that of their definition.

    In Triton 3.6 a digest depends on whether those of the functions that a kernel calls were taken before it, or
    with it: processes that compile in different orders would look for the same kernel under different keys.
    """
    while _unsettled:
        getattr(_unsettled.pop(0), "cache_key", None)  # the interpreter's functions have none


@dataclass(frozen=True, slots=True, eq=False)
class Configuration:
    """A way to compile a kernel.

    types: the run-time arguments: "*bf16" and the like (POINTER), "i32", "fp32". constants: the constexprs.
    blocks: the pointers that become tensor descriptors, and the (rows, columns) that one load brings; their tensors
    are two-dimensional. Sums of products keep the order and rounding of the source: no contraction to fused
    multiply-adds, which every version of a compiler chooses anew.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    blocks: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the kernel by its name."""
        values = (self.types, self.constants, self.num_warps, self.num_stages, self.blocks)
        return _named, (self.kernel.fn.__module__, self.kernel.fn.__name__, *values)

    @property
    def key(self) -> str:
        """Text that is equal for equal configurations."""
        constants = sorted(self.constants.items())
        return repr((self.kernel.fn.__module__, self.name, self.signature, constants, sorted(self.options.items())))

    @property
    def signature(self) -> dict[str, str]:
        """`types` in the compiler's notation, tensor descriptors included."""
        return {name: self._type(name) for name in self.types}

    def _type(self, name: str) -> str:
        if name not in self.blocks:
            return self.types[name]
        return f"tensordesc<{self.types[name].lstrip('*')}{list(self.blocks[name])}>"

    @property
    def name(self) -> str:
        """The kernel's name, without the underscore of a private function."""
        return str(self.kernel.__name__).lstrip("_")

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch of a dry run, of a Configuration or of a CUDA C++ Kernel: programs along each axis, warps of each.
    shared_bytes: what the launch itself asks for. num_bytes: of Triton's tensors by argument, each tensor once."""

    kernel: Any
    grid: tuple[int, ...]
    warps: int
    shared_bytes: int = 0
    num_bytes: Mapping[str, int] = field(default_factory=dict)


class _Noting:
    """A backend of CUDA C++ kernels for a dry run."""

    device_type = "meta"

    def run(self, kernel: Any, _: Any, grid: tuple[int, ...], threads: int, shared_bytes: int, *__: object) -> None:
        """See cuda.launch.launcher.Backend."""
        assert _dry is not None
        _dry.append(Launch(kernel, grid, threads // 32, shared_bytes))

    def prepare(self, *_: object) -> None:
        """See cuda.launch.launcher.Backend."""


def _named(module: str, kernel: str, *values: Any) -> Configuration:
    """The configuration of a kernel by its name."""
    return Configuration(getattr(importlib.import_module(module), kernel), *values)


def launch(configuration: Configuration, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run `grid` programs on torch's current stream; a grid without programs does nothing.

    Raises ArgumentError, before anything runs, for a tensor of another dtype, on another device than the rest or
    not aligned, and for an integer that does not fit. Raises DeviceFault for a CUDA error, with the arguments; it
    may be that of an earlier launch.
    """
    if 0 in grid:
        return
    device: torch.device | None = None
    for name, kind in configuration.types.items():
        value = arguments[name]
        if isinstance(value, Tensor):
            _check_tensor(configuration.name, name, kind, value)
            if device is not None and value.device != device:
                raise ArgumentError(f"{configuration.name}: {name} is on {value.device}, not on {device}")
            device = value.device
        elif kind in _LIMITS and not -_LIMITS[kind] <= value < _LIMITS[kind]:
            raise ArgumentError(f"{configuration.name}: {name} is {value}, more than {kind} holds")
    descriptors = {
        name: _descriptor(configuration.name, name, arguments[name], block)
        for name, block in configuration.blocks.items()
    }
    if _dry is not None:
        tensors = {id(value): name for name, value in arguments.items() if isinstance(value, Tensor)}
        num_bytes = {name: arguments[name].nbytes for name in tensors.values()}
        _dry.append(Launch(configuration, grid, configuration.num_warps, 0, num_bytes))
        return
    note(configuration.kernel.__name__)
    settle()
    try:
        configuration.kernel[grid](**(arguments | descriptors), **configuration.constants, **configuration.options)
    except RuntimeError as error:
        if not is_device_error(error):
            raise
        raise fault_of(f"{described(configuration.name, arguments)}, grid {grid}", error) from error


def dry_run(function: Callable[..., Any], *arguments: Any) -> list[Launch]:
    """Call a function with meta tensors; what it would launch, in order, CUDA C++ kernels too. Nothing runs, in no
    thread of this process, until it returns."""
    global _dry
    found: list[Launch] = []
    _dry = found
    try:
        with running_on(_Noting()):
            function(*arguments)
    finally:
        _dry = None
    return found


def _check_tensor(operation: str, name: str, kind: str, value: Tensor) -> None:
    if POINTER.get(value.dtype) != kind:
        raise ArgumentError(f"{operation}: {name} has dtype {value.dtype}, the kernel takes {kind}")
    if value.data_ptr() % ALIGNMENT:
        raise ArgumentError(
            f"{operation}: {name} starts {value.data_ptr() % ALIGNMENT} bytes past a multiple of {ALIGNMENT}"
        )


def _descriptor(operation: str, name: str, value: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A tensor descriptor made on the host and passed by value, so that a captured graph keeps it."""
    if value.dim() != 2 or value.stride(1) != 1 or value.stride(0) * value.element_size() % ALIGNMENT:
        raise ArgumentError(
            f"{operation}: {name} has strides {list(value.stride())}; a tensor descriptor takes two dimensions, "
            f"a row's values side by side and rows that start every multiple of {ALIGNMENT} bytes"
        )
    return TensorDescriptor(value, list(value.shape), list(value.stride()), list(block))
