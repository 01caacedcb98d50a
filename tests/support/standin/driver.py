"""Triton's driver on the stand-in: its own compiler, launcher and descriptors; a launch that runs is interpreted.

    with on_card() as machine:
        ...                         # tensors made on "cuda"; kernels launched as on a card

A launch's parameters are read back from the bytes that the launcher handed over, by the machine code's own table,
and held against the signature that the kernel was compiled for.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import triton

from standin.library import (
    BUILD,
    ILLEGAL_ADDRESS,
    LAUNCH_FAILED,
    MISALIGNED_ADDRESS,
    SUCCESS,
    IllegalAddress,
    Library,
    RunKernel,
    build,
)
from standin.memory import StreamedCard

ALIGNMENT = 16  # bytes: what kernels are compiled for
MAP_MAGIC = 0x70616D2D72736E74
MAP = struct.Struct("<3Q5Q4Q5I3I")  # device.c's Map
DESCRIPTOR = re.compile(r"tensordesc<(\w+)\[([\d, ]+)\]")
FORMATS = {  # of parameters, by the signature's types
    "i1": "<?",
    "i8": "<b",
    "i16": "<h",
    "i32": "<i",
    "i64": "<q",
    "u1": "<?",
    "u8": "<B",
    "u16": "<H",
    "u32": "<I",
    "u64": "<Q",
    "fp32": "<f",
    "f32": "<f",
    "fp64": "<d",
    "*": "<Q",
}


class BadParameters(RuntimeError):
    """A launch whose parameters are not what the machine code takes."""


@dataclass(frozen=True, slots=True)
class Pointer:
    """A parameter that is an address, and the bytes of its memory from there on."""

    address: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A parameter that is a tensor map: sizes and strides in elements, outermost first; the block of one load."""

    pointer: Pointer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A launch for the twin: a kernel by its module and name, and its arguments by theirs; of pointers and
    descriptors also the element's type."""

    module: str
    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    kinds: dict[str, str]


class Machine:
    """A card: library, memory, Triton's driver, and the process that computes."""

    def __init__(self) -> None:
        include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
        self.library = Library(build(include))
        self._callback = RunKernel(self._run)
        self.library.raw("standin_runs_kernels", self._callback)
        self.sources: dict[int, Any] = {}  # by the driver's handle of a function: what it was compiled from
        self.ran: list[str] = []  # kernels, in the order in which they ran
        ours, theirs = Pipe()
        command = [sys.executable, "-m", "standin.twin", str(theirs.fileno()), str(self.library.file)]
        command.append(str(self.library.path))
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        files = (theirs.fileno(), self.library.file)
        self._process = subprocess.Popen(command, env=environment, pass_fds=files)
        theirs.close()
        self._twin = ours
        self.card = StreamedCard(self.library)
        folder = str(self.library.path.parent)
        os.environ |= {"TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder}  # the latter for other processes
        triton.runtime.driver.set_active(self._driver())

    def close(self) -> None:
        """End the process that computes."""
        self._twin.close()
        self._process.wait(timeout=60)

    def _driver(self) -> Any:
        """Triton's own, with what it asks torch for."""
        from triton.backends.nvidia.driver import CudaDriver, CudaLauncher

        machine = self

        class Launcher(CudaLauncher):  # type: ignore[misc]
            """Triton's, which notes what the function that it launches was compiled from."""

            def __init__(self, source: Any, metadata: Any) -> None:
                super().__init__(source, metadata)
                self._source = source

            def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
                machine.sources[function] = self._source
                super().__call__(x, y, z, stream, function, *rest)

        driver = CudaDriver()
        driver.launcher_cls = Launcher
        driver.get_current_device = lambda: 0
        driver.set_current_device = lambda device: None
        driver.get_current_stream = lambda device: self.card.stream.handle
        driver.get_device_capability = lambda device=None: (9, 0)
        return driver

    def _run(self, function: int, grid: Any, parameters: int, recorded: int) -> int:
        try:
            call = self._call(function, (grid[0], grid[1], grid[2]), parameters)
            self.ran.append(call.name)
            self._twin.send(call)
            result, reason = self._twin.recv()
            if result != SUCCESS:
                raise IllegalAddress(reason) if result == ILLEGAL_ADDRESS else RuntimeError(reason)
        except IllegalAddress as error:
            return self._failed(error, ILLEGAL_ADDRESS)
        except Misaligned as error:
            return self._failed(error, MISALIGNED_ADDRESS)
        except BaseException as error:
            traceback.print_exc()
            return self._failed(error, LAUNCH_FAILED)
        return SUCCESS

    def _failed(self, error: BaseException, result: int) -> int:
        self.library.failures.append(error)
        return result

    def _call(self, function: int, grid: tuple[int, ...], parameters: int) -> Call:
        """A launch as its bytes say it, checked."""
        source = self.sources[function]
        names = source.fn.arg_names
        values = self._values(function, parameters)
        arguments, kinds = {}, {}
        for name, kind in source.signature.items():
            if kind == "constexpr":
                continue
            arguments[name] = self._argument(source.name, name, kind, values)
            kinds[name] = kind
        for name in ("global scratch", "profile scratch"):
            if self._next(source.name, name, "<Q", values) != 0:
                raise BadParameters(f"{source.name}: {name} is used, which nobody interprets")
        if values:
            raise BadParameters(f"{source.name}: the machine code takes {len(values)} more parameters")
        for path, value in source.constants.items():
            arguments[path if isinstance(path, str) else names[path[0]]] = value
        return Call(source.fn.fn.__module__, source.fn.fn.__name__, grid, arguments, kinds)

    def _values(self, function: int, parameters: int) -> list[bytes]:
        found: list[bytes] = []
        while (where := self.library.raw("standin_parameter", function, ctypes.c_uint(len(found)))) != 0:
            found.append(ctypes.string_at(parameters + (where >> 32), where & 0xFFFFFFFF))
        return found

    def _next(self, kernel: str, name: str, form: str, values: list[bytes]) -> Any:
        size = struct.calcsize(form)
        if not values or len(values[0]) != size:
            has = f"one of {len(values[0])}" if values else "none"
            raise BadParameters(f"{kernel}: {name} is a parameter of {size} bytes, the machine code has {has}")
        return struct.unpack(form, values.pop(0))[0]

    def _argument(self, kernel: str, name: str, kind: str, values: list[bytes]) -> Any:
        match = DESCRIPTOR.match(kind)
        if match is None:
            found = self._next(kernel, name, FORMATS[kind[0] if kind[0] == "*" else kind], values)
            return self._pointer(kernel, name, found, 1) if kind[0] == "*" else found
        block = tuple(int(size) for size in match[2].split(","))
        raw = self._next(kernel, name, f"{128}s", values)
        magic, _, address, *rest = MAP.unpack_from(raw)
        if magic != MAP_MAGIC:
            raise BadParameters(f"{kernel}: {name} is no tensor map of cuTensorMapEncodeTiled")
        dims, strides, rank = rest[:5], rest[5:9], rest[14]
        shape = tuple(self._next(kernel, f"{name}.shape", "<i", values) for _ in block)
        steps = tuple(self._next(kernel, f"{name}.strides", "<q", values) for _ in block)
        if rank != len(block) or tuple(reversed(dims[:rank])) != shape:
            raise BadParameters(f"{kernel}: {name}'s map has sizes {dims[:rank]}, the kernel is told {shape}")
        bytes = sum((dims[axis] - 1) * strides[axis - 1] for axis in range(1, rank)) + dims[0]
        return Descriptor(self._pointer(kernel, name, address, bytes), shape, steps, block)

    def _pointer(self, kernel: str, name: str, address: int, bytes: int) -> Pointer:
        extent = self.library.extent(address)
        if extent < bytes:
            raise IllegalAddress(f"{kernel}: {name} is {address:#x}, with {extent} bytes of memory, of {bytes}")
        if address % ALIGNMENT:
            raise Misaligned(
                f"{kernel}: {name} is {address:#x}, {address % ALIGNMENT} past a multiple of {ALIGNMENT}"
            )
        return Pointer(address, extent)


class Misaligned(RuntimeError):
    """A kernel was given an address that it was not compiled for."""


@contextmanager
def on_card() -> Iterator[Machine]:
    """A card for a `with` block: tensors made on "cuda" within are its own. One in a process, which loads the
    library and maps its memory once. What Triton compiles is kept below build/, by the content of all that it
    depends on."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(BUILD / "triton"))
    machine = Machine()
    try:
        with machine.card:
            yield machine
    finally:
        machine.close()
