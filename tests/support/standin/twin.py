"""The process that computes what launches on the stand-in ask for: `python -m standin.twin PIPE MEMORY LIBRARY`.

It has Triton's interpreter where the other has the compiler, imports the same kernels, and maps the card's memory
at the same addresses. Every load and store is held to the memory that the launch was given.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import triton_interpreter
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from cierzo.kernels.triton.launch import POINTER
from standin.driver import DESCRIPTOR, Call, Descriptor, Pointer
from standin.library import ILLEGAL_ADDRESS, LAUNCH_FAILED, SUCCESS, IllegalAddress, Library
from standin.memory import memory_at

DTYPES = {pointer.lstrip("*"): dtype for dtype, pointer in POINTER.items()}


class Bounds:
    """The memory of the launch that runs."""

    def __init__(self) -> None:
        self._starts = self._ends = np.zeros(0, np.uint64)

    def set(self, pointers: list[Pointer]) -> None:
        """Allow these, and nothing else."""
        spans = sorted({(pointer.address, pointer.address + pointer.bytes) for pointer in pointers})
        self._starts = np.array([start for start, _ in spans], np.uint64)
        self._ends = np.maximum.accumulate(np.array([end for _, end in spans], np.uint64))

    def check(self, doing: str, addresses: Any, mask: Any, size: int) -> None:
        """Raise IllegalAddress if one of the addresses with a mask is not allowed."""
        wanted = np.asarray(addresses)[np.broadcast_to(np.asarray(mask, bool), np.shape(addresses))]
        if not wanted.size:
            return
        span = np.searchsorted(self._starts, wanted, side="right").astype(np.int64) - 1
        wrong = (span < 0) | (wanted + np.uint64(size) > self._ends[np.maximum(span, 0)])
        if wrong.any():
            raise IllegalAddress(
                f"{doing} {int(wrong.sum())} values at {int(wanted[wrong][0]):#x}, nobody's memory"
            )


def _guard(bounds: Bounds) -> None:
    """Let the interpreter's loads and stores be checked first."""
    builder: Any = interpreter.InterpreterBuilder

    def guarded(name: str, doing: str, mask_at: int) -> None:
        original = getattr(builder, name)

        def checked(self: Any, pointers: Any, *rest: Any, **named: Any) -> Any:
            size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
            bounds.check(doing, pointers.data, rest[mask_at].data, size)
            return original(self, pointers, *rest, **named)

        setattr(builder, name, checked)

    guarded("create_masked_load", "reads", 0)
    guarded("create_masked_store", "writes", 1)


def _tensor(pointer: Pointer, kind: str) -> Tensor:
    dtype = DTYPES[kind]
    return memory_at(pointer.address, pointer.bytes // dtype.itemsize * dtype.itemsize).view(dtype)


def _value(value: Any, kind: str) -> Any:
    if isinstance(value, Pointer):
        return _tensor(value, kind.lstrip("*"))
    if isinstance(value, Descriptor):
        match = DESCRIPTOR.match(kind)
        assert match is not None
        whole = _tensor(value.pointer, match[1]).as_strided(value.shape, value.strides)
        return TensorDescriptor(whole, list(value.shape), list(value.strides), list(value.block))
    return value


def run(call: Call, bounds: Bounds) -> None:
    """Interpret a launch."""
    kernel = getattr(importlib.import_module(call.module), call.name)
    pointers = [value for value in call.arguments.values() if isinstance(value, Pointer)]
    pointers += [value.pointer for value in call.arguments.values() if isinstance(value, Descriptor)]
    bounds.set(pointers)
    kernel[call.grid](**{name: _value(value, call.kinds.get(name, "")) for name, value in call.arguments.items()})


def main(pipe: str, file: str, library: str) -> int:
    """Compute until the other process goes."""
    Library(Path(library), int(file))
    connection, bounds = Connection(int(pipe)), Bounds()
    triton_interpreter.repair()
    _guard(bounds)
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return 0
        try:
            run(call, bounds)
            connection.send((SUCCESS, ""))
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:  # the interpreter's errors have the one before as their cause
                cause = cause.__cause__
            illegal = isinstance(cause, IllegalAddress)
            reason = f"{call.name}, grid {call.grid}: {cause}"
            if not illegal:
                reason += "\n" + traceback.format_exc()
            connection.send((ILLEGAL_ADDRESS if illegal else LAUNCH_FAILED, reason))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
