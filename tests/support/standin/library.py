"""libcuda.c and device.c, compiled and bound.

The library is loaded under the name libcuda.so.1, by which whoever wants the driver then finds it: Triton's
launcher by dlopen and by linking. An error of a call becomes what torch makes of it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
BUILD = HERE.parents[2] / "build" / "standin"
NAME = "libcuda.so.1"
FLAGS = ["-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
SOURCES = ("libcuda.c", "device.c")
ARENA, ARENA_BYTES = 0x1000_0000_0000, 64 << 30  # addresses of the card's memory
POISON = 0xFF  # every byte of memory that nobody has written
SUCCESS, OUT_OF_MEMORY, NOT_READY = 0, 2, 600
ILLEGAL_ADDRESS, ASSERT, MISALIGNED_ADDRESS, LAUNCH_FAILED = 700, 710, 716, 719

RunKernel = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint64, ctypes.c_int
)
HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_uint64)
_RESULTS = {
    "standin_extent": ctypes.c_uint64,
    "standin_parameter": ctypes.c_uint64,
    "standin_count": ctypes.c_uint64,
}


def is_of_card(address: int) -> bool:
    """Whether an address is one of the card's."""
    return ARENA <= address < ARENA + ARENA_BYTES


def available() -> bool:
    """Whether there are Triton wheels for this platform."""
    return sys.platform == "linux" and os.uname().machine == "x86_64"


def build(include: Path) -> Path:
    """The library, with CUDA's header in the folder `include`; compiled unless the same is there."""
    files = [*(HERE / name for name in SOURCES), HERE / "libcuda.h", include / "cuda.h"]
    digest = hashlib.sha256(repr(FLAGS).encode() + b"".join(file.read_bytes() for file in files))
    target = BUILD / digest.hexdigest()[:16] / NAME
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        sources = [str(HERE / name) for name in SOURCES]
        command = ["gcc", *FLAGS, f"-Wl,-soname,{NAME}", f"-I{include}", *sources, "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        unfinished.replace(target)
    return target


class Library:
    """The library of this process. file: the memory of another process's card, mapped at the same addresses."""

    def __init__(self, path: Path, file: int = -1) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.file = self.raw("standin_arena", ctypes.c_int(file))
        assert self.file >= 0, "the card's memory cannot be mapped"
        self._functions: dict[int, Callable[[], None]] = {}
        self._numbers = 0
        self._callback = HostFunction(self._run)
        self.failures: list[BaseException] = []  # of what was queued, in order: the reasons of CUDA's errors

    def raw(self, name: str, *arguments: Any) -> int:
        """Call a function; integers are passed as 64 bits."""
        function = getattr(self._library, name)
        function.restype = _RESULTS.get(name, ctypes.c_int)
        result: int = function(
            *(ctypes.c_uint64(value) if isinstance(value, int) else value for value in arguments)
        )
        return result

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver. Raises torch.AcceleratorError, or OutOfMemoryError, as torch does."""
        result = self.raw(name, *arguments)
        if result == OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"CUDA out of memory. {name} finds no room")
        if result != SUCCESS:
            raise torch.AcceleratorError(f"CUDA error: {self.text(result)}") from self.reason()

    def made(self, name: str, *arguments: Any) -> int:
        """Call a function that writes a handle, an address or a number to its first argument; what it wrote."""
        found = ctypes.c_uint64()
        self.call(name, ctypes.byref(found), *arguments)
        return found.value

    def text(self, result: int) -> str:
        """The driver's words for an error."""
        words = ctypes.c_char_p()
        self.raw("cuGetErrorString", result, ctypes.byref(words))
        return (words.value or b"").decode()

    def reason(self) -> BaseException | None:
        """Why what was queued failed first, if that is known."""
        return self.failures[0] if self.failures else None

    def inject(self, call: str, after: int, result: int) -> None:
        """Let the call number `after` from now return a result; "kernel": fail the launch that runs as that one."""
        self.raw("standin_inject", call.encode(), ctypes.c_int(after), ctypes.c_int(result))

    def enqueue(self, stream: int, function: Callable[[], None], *, kept: bool = False) -> None:
        """Run a function when its turn comes; what it raises is the card's fault. kept: it is recorded."""
        self._numbers += 1
        number = self._numbers if not kept else -self._numbers
        self._functions[number] = function
        self.call("cuLaunchHostFunc", stream, self._callback, ctypes.c_int64(number))

    def _run(self, number: int) -> None:
        number = ctypes.c_int64(number).value
        function = self._functions[number] if number < 0 else self._functions.pop(number)
        try:
            function()
        except BaseException as error:
            self.fault(error, ILLEGAL_ADDRESS if isinstance(error, IllegalAddress) else ASSERT)

    def fault(self, error: BaseException, result: int) -> None:
        """Return the error of queued work that failed from every later call."""
        self.failures.append(error)
        self.raw("standin_fault", result)

    def extent(self, address: int) -> int:
        """Bytes from an address to the end of the memory that it lies in; 0 where what runs has no business."""
        return self.raw("standin_extent", address)


class IllegalAddress(RuntimeError):
    """Queued work reaches for memory that is not there, or not any more."""
