"""Triton kernels, their configurations and their launch.

A kernel is compiled once for each `Configuration`: integers and floats at run time are not specialised (`kernel`
sees to that), pointers always count as aligned to 16 bytes (`launch` refuses others), and all else that the code
depends on is a constant. So a new number of rows compiles nothing, and the code that is compiled and inspected
without a GPU is the code that runs on one.

    @kernel
    def _scale(x_ptr, out_ptr, count, factor, BLOCK: tl.constexpr): ...

    launch(Configuration(_scale, {"x_ptr": "*bf16", "out_ptr": "*fp32", "count": "i32", "factor": "fp32"},
                         {"BLOCK": 256}, num_warps=4), grid, x_ptr=x, out_ptr=out, count=7, factor=0.5)

The host's time counts: hundreds of launches make a step. So a function that makes a Configuration is `kept`, and
from its second launch on a Configuration goes straight to Triton's compiled launcher, with the same checks.

    @kept
    def scale_configuration(pointer: str) -> Configuration: ...
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.cuda.launch.launcher import running_on
from cierzo.kernels.fault import DeviceFault, described, fault_of, is_device_error, note

ALIGNMENT = 16  # bytes: the widest load of one thread
POINTER = {
    torch.int16: "*i16",
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
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_LIMITS = {"i32": 1 << 31}  # Triton itself takes an integer for an i64 where it is larger, and compiles anew
CHAINED: set[Any] = set()  # functions of kernels that are launched before those in front have ended (chain.py)
_unsettled: list[Any] = []  # kernels, and functions that kernels call, in the order of their definition
_dry: list[Launch] | None = None  # launches of a dry run; None: launches run
Prepared = Callable[[tuple[int, ...], Mapping[str, Any]], bool]
KEPT_RESULTS = 4096  # of one function; a model has tens
KEPT: list[Callable[..., Any]] = []  # the functions that are `kept`


def kept(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Keep what a function makes of its arguments, all hashable, so that it is made once for each of them.

    The result must follow from the arguments alone. Whatever can change while a process runs (heuristics' choices,
    and what `heuristics.tile` and `heuristics.reading` make of them) comes in as an argument; tests hold kept
    functions to that. There must be few different arguments: sizes of a model, not numbers of tokens.
    """
    KEPT.append(function)
    return lru_cache(maxsize=KEPT_RESULTS, typed=True)(function)  # type: ignore[return-value]


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


def take_digests() -> None:
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
    # By the number of a device, what launches the kernel that was compiled and loaded there (`prepared`).
    ready: dict[int, Prepared] = field(default_factory=dict, init=False, repr=False)

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
        chained = {"launch_pdl": True} if self.kernel.fn in CHAINED else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False, **chained}


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
    if configuration.ready and _dry is None:
        straight = configuration.ready.get(_current_device())
        if straight is not None and straight(grid, arguments):
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
    take_digests()
    try:
        compiled = configuration.kernel[grid](
            **(arguments | descriptors), **configuration.constants, **configuration.options
        )
    except RuntimeError as error:
        if not is_device_error(error):
            raise
        raise _fault(error, configuration.name, grid, arguments) from error
    if compiled is not None:  # the interpreter compiles nothing
        configuration.ready[_current_device()] = prepared(configuration, compiled, device)


def prepared(configuration: Configuration, compiled: Any, home: torch.device | None) -> Prepared:
    """A function that launches a compiled kernel with a grid and arguments, and returns whether they are right, and
    on the device `home`; if not, nothing was launched, and `launch` tells why, or has Triton do it. It goes past
    JITFunction.run, which finds the kernel anew each time, and so past Triton's hooks for profilers of launches."""
    kernel, places = configuration.kernel, {name: at for at, name in enumerate(configuration.kernel.arg_names)}
    dtypes = {kind: dtype for dtype, kind in POINTER.items()}
    types, blocks = configuration.types, configuration.blocks
    pointers = [(name, places[name], dtypes[kind]) for name, kind in types.items() if kind in dtypes]
    numbers = [(name, places[name], _LIMITS.get(kind)) for name, kind in types.items() if kind not in dtypes]
    template = [configuration.constants.get(name) for name in kernel.arg_names]
    run = _launcher(compiled)
    current_stream, index = triton.runtime.driver.active.get_current_stream, _current_device()
    noted, operation, count = kernel.__name__, configuration.name, len(types)
    # As get_device tells it, in half the time that a torch.device takes; the host's tensors are on -1.
    where = -1 if home is None or home.type != "cuda" else index if home.index is None else home.index

    def straight(grid: tuple[int, ...], arguments: Mapping[str, Any]) -> bool:
        if len(arguments) != count:
            return False
        values = template.copy()
        for name, place, dtype in pointers:
            tensor = arguments[name]
            address = tensor.data_ptr()
            if tensor.dtype is not dtype or address % ALIGNMENT or tensor.get_device() != where:
                return False
            values[place] = address
        for name, place, limit in numbers:
            value = values[place] = arguments[name]
            if limit is not None and not -limit <= value < limit:
                return False
        for name, block in blocks.items():
            values[places[name]] = _descriptor(operation, name, arguments[name], block)
        x, y, z, *_ = (*grid, 1, 1)
        note(noted)
        try:
            run(x, y, z, current_stream(index), values)
        except RuntimeError as error:
            if not is_device_error(error):
                raise
            raise _fault(error, operation, grid, arguments) from error
        return True

    return straight


def _launcher(compiled: Any) -> Callable[[int, int, int, int, list[Any]], None]:
    """Triton's function in C that launches a kernel, given a grid, a stream, and all arguments in their order. What
    it takes besides differs between Triton 3.6 and 3.9."""
    found, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    if found.global_scratch_size or found.profile_scratch_size:  # memory at each launch: none of our kernels
        return lambda x, y, z, stream, values: found(x, y, z, stream, function, metadata, None, None, None, *values)
    call, how = found.launch, (found.launch_cooperative_grid, found.launch_pdl)
    if hasattr(found, "kernel_signature"):
        rest = (*how, metadata, None, None, None, None, None, found.arg_annotations, found.kernel_signature)
        return lambda x, y, z, stream, values: call(x, y, z, stream, function, *rest, values)
    ahead = (*how, None, None, metadata, None, None, None)
    return lambda x, y, z, stream, values: call(x, y, z, stream, function, *ahead, *values)


def _current_device() -> int:
    device: int = triton.runtime.driver.active.get_current_device()
    return device


def _fault(error: RuntimeError, operation: str, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> DeviceFault:
    return fault_of(f"{described(operation, arguments)}, grid {grid}", error)


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
