"""The compiled library: where it lies, which of its instruction sets runs, with how many threads.

One binary holds every kernel once per instruction set; `select` picks the set, at start. The library is compiled
against OpenMP but not linked to a runtime: it uses the one that torch has brought into the process, so that there
is one pool of threads and not two.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2")  # best first
_BITS = {"avx2": 1, "avx512": 2, "avx512_bf16": 4}
_OPENMP = re.compile(r"lib(gomp|iomp5|omp)[-.][^/]*$")


class NativeError(RuntimeError):
    """The native library is not there, cannot be loaded, or lacks what was asked for."""


@dataclass(slots=True)
class _State:
    library: ctypes.CDLL | None = None
    instruction_set: str = ""
    threads: int = 0  # 0: torch's number
    functions: dict[str, Any] = field(default_factory=dict)


_state = _State()


def library_path() -> Path | None:
    """The built library beside this file, or None where the package was installed without it."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.is_file():
            return path
    return None


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process; more than one would fight over the cores."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = dict.fromkeys(line.split(maxsplit=5)[5] for line in maps if line.count(" ") > 5 and "/" in line)
    return [path for path in paths if _OPENMP.search(path)]


def load() -> ctypes.CDLL:
    """The library, loaded once per process. Raises NativeError."""
    if _state.library is None:
        path = library_path()
        if path is None:
            raise NativeError("the native kernels are not built: install without CIERZO_NATIVE=0")
        torch.get_num_threads()  # importing torch has mapped its OpenMP runtime
        for runtime in openmp_runtimes():
            ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        try:
            _state.library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeError(f"the native kernels cannot be loaded: {error}") from error
    return _state.library


def available() -> tuple[str, ...]:
    """The instruction sets of this library that this CPU has, best first; empty without library or AVX2."""
    if library_path() is None:
        return ()
    found = load().cierzo_instruction_sets()
    return tuple(name for name in INSTRUCTION_SETS if found & _BITS[name])


def select(instruction_set: str = "auto") -> str:
    """Have all further calls use `instruction_set`, or the best one. Raises NativeError."""
    names = available()
    if instruction_set == "auto" and names:
        instruction_set = names[0]
    if instruction_set not in names:
        raise NativeError(f"instruction set {instruction_set!r} is not available; this CPU has {', '.join(names)}")
    if instruction_set != _state.instruction_set:
        _state.instruction_set = instruction_set
        _state.functions.clear()
    return instruction_set


def instruction_set() -> str:
    """The set in use."""
    return _state.instruction_set or select()


def set_threads(threads: int) -> None:
    """Threads of each operation from now on."""
    _state.threads = threads


def call(operation: str, args: ctypes.Structure) -> None:
    """Run `cierzo_<set>_<operation>(args, threads)`."""
    function = _state.functions.get(operation)
    if function is None:
        function = getattr(load(), f"cierzo_{instruction_set()}_{operation}")
        function.argtypes = (ctypes.c_void_p, ctypes.c_int)
        _state.functions[operation] = function
    function(ctypes.addressof(args), _state.threads or torch.get_num_threads())
