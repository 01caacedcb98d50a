"""The compiled library: where it lies, which of its instruction sets runs, with how many threads, on which CPUs.

One binary holds every kernel once per instruction set; `select` picks the set, at start. The library is compiled
against OpenMP but not linked to a runtime: it uses the one that torch has brought into the process, so that there
is one pool of threads and not two.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cierzo.kernels.cpu import MAX_THREADS

INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2")  # best first
_BITS = {"avx2": 1, "avx512": 2, "avx512_bf16": 4}
Observer = Callable[[str, ctypes.Structure, float], None]
_OPENMP = re.compile(r"lib(gomp|iomp5|omp)[-.][^/]*$")
_REBUILD = "build them again (make venv, or python setup.py build_ext --inplace)"


class NativeError(RuntimeError):
    """The native library is not there, cannot be loaded, or lacks what was asked for."""


@dataclass(slots=True)
class _State:
    library: ctypes.CDLL | None = None
    instruction_set: str = ""
    threads: int = 0  # 0: torch's number
    all_cpus: tuple[int, ...] = ()  # those of the process, while its threads are pinned to one each
    functions: dict[str, Any] = field(default_factory=dict)
    observer: Observer | None = None


_state = _State()


def library_path() -> Path | None:
    """The built library beside this file, or None where the package was installed without it."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.is_file():
            return path
    return None


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes in this process, torch's first; a second one would fight for the cores."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    mapped = dict.fromkeys(line.split(maxsplit=5)[5] for line in maps if "/" in line)
    torchs = str(Path(torch.__file__).parent)  # torch/lib or torch.libs
    return sorted(filter(_OPENMP.search, mapped), key=lambda path: not path.startswith(torchs))


def load() -> ctypes.CDLL:
    """The library, loaded once per process. Raises NativeError."""
    if _state.library is None:
        path = library_path()
        if path is None:
            raise NativeError("cierzo was installed without its native kernels (CIERZO_NATIVE=0)")
        torch.get_num_threads()  # importing torch has mapped its OpenMP runtime
        for runtime in openmp_runtimes():
            ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeError(f"the native kernels cannot be loaded: {error}; {_REBUILD}") from error
        _check_abi(library)
        _state.library = library
    return _state.library


def _check_abi(library: ctypes.CDLL) -> None:
    """A library of another version would read other arguments than Python writes."""
    try:
        library.cierzo_abi.restype = ctypes.c_char_p
        built = library.cierzo_abi()
    except AttributeError:
        built = b"none"
    ours = hashlib.sha256(Path(__file__).with_name("abi.py").read_bytes()).hexdigest().encode()
    if built not in (ours, b""):
        raise NativeError(f"the native kernels were built for another version of cierzo; {_REBUILD}")


def available() -> tuple[str, ...]:
    """The instruction sets of this library that this CPU has, best first; empty without library or AVX2.

    Raises NativeError for a library that is there and cannot be used.
    """
    if library_path() is None:
        return ()
    library = load()
    found = library.cierzo_instruction_sets()
    return tuple(
        name for name in INSTRUCTION_SETS if found & _BITS[name] and hasattr(library, f"cierzo_{name}_norm")
    )


def missing() -> str:
    """Why `available` is empty."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"there are none for {platform.machine()}"
    if library_path() is None:
        return "installed with CIERZO_NATIVE=0"
    built = "the CPU has none of the instruction sets that were built"
    return built if load().cierzo_instruction_sets() else "the CPU has no AVX2"


def supported(instruction_set: str = "auto") -> str:
    """The set that is meant: this one, or the best one. Raises NativeError if it cannot run here."""
    names = available()
    if instruction_set == "auto" and names:
        instruction_set = names[0]
    if instruction_set not in names:
        there = f"there are {', '.join(names)}" if names else missing()
        raise NativeError(f"instruction set {instruction_set!r} cannot run here: {there}")
    return instruction_set


def select(instruction_set: str = "auto") -> str:
    """Have all further calls use `instruction_set`, or the best one. Raises NativeError."""
    instruction_set = supported(instruction_set)
    if instruction_set != _state.instruction_set:
        _state.instruction_set = instruction_set
        _state.functions.clear()
    return instruction_set


def instruction_set() -> str:
    """The set in use."""
    return _state.instruction_set or select()


def set_threads(threads: int, pinned: bool = False) -> None:
    """Threads of each operation that the calling thread runs from now on; `pinned`: each stays on one CPU.

    The CPUs are those that the process may use, one of each core first. A thread that is started from a pinned one
    inherits its CPU. Without `pinned` an earlier pinning is undone, for every thread of the process. 0 is torch's
    number. Raises NativeError for more than MAX_THREADS, and where the system refuses.
    """
    if not 0 <= threads <= MAX_THREADS:
        raise NativeError(f"threads must be 0 to {MAX_THREADS}, got {threads}")
    if _state.all_cpus:
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):  # it has just ended
                os.sched_setaffinity(int(thread), _state.all_cpus)
        _state.all_cpus = ()
    _state.threads = threads
    if pinned:
        cpus = sorted(os.sched_getaffinity(0))
        ordered = (ctypes.c_int * len(cpus))(*cores_first(cpus))
        failed = load().cierzo_pin_threads(threads, ordered, len(cpus))
        _state.all_cpus = tuple(cpus)
        if failed:
            raise NativeError(f"{failed} of {threads} threads cannot be bound to CPUs {', '.join(map(str, cpus))}")


def cores_first(cpus: Sequence[int], topology: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """Order CPUs so that no core has two threads while another has none."""

    def place_in_core(cpu: int) -> int:
        try:
            listed = (topology / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
        except OSError:
            return 0
        siblings = {int(number) for part in re.findall(r"\d+-\d+|\d+", listed) for number in _span(part)}
        return sum(other < cpu for other in siblings.intersection(cpus))

    return sorted(cpus, key=lambda cpu: (place_in_core(cpu), cpu))


def _span(text: str) -> range:
    """ "3" or "0-7" as Linux lists CPUs."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def call(operation: str, args: ctypes.Structure) -> None:
    """Run `cierzo_<set>_<operation>(args, threads)`."""
    function = _state.functions.get(operation)
    if function is None:
        try:
            function = getattr(load(), f"cierzo_{instruction_set()}_{operation}")
        except AttributeError:
            raise NativeError(f"the native kernels have no {operation}; {_REBUILD}") from None
        function.argtypes = (ctypes.c_void_p, ctypes.c_int)
        _state.functions[operation] = function
    threads = _state.threads or torch.get_num_threads()
    if _state.observer is None:
        function(ctypes.addressof(args), threads)
        return
    begin = time.perf_counter()
    function(ctypes.addressof(args), threads)
    _state.observer(operation, args, time.perf_counter() - begin)


def observe(observer: Observer | None) -> None:
    """Have `observer` told of every call from now on: operation, arguments, seconds. None: nobody any more."""
    _state.observer = observer
