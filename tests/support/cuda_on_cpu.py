"""The backend that runs CUDA C++ sources on the CPU: cuda_on_cpu.h before the .cu, g++, ctypes.

Libraries are kept below build/ by the content of all that goes into them. A kernel's launch comes from the launcher
that a GPU uses; a fault that the header finds is a LaunchError.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cierzo.kernels.cuda.launch.kernel import SOURCES, Kernel, LaunchError

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
FOLDER = Path(__file__).resolve().parents[2] / "build" / "cuda_on_cpu"
FLAGS = ["-std=gnu++17", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += [
    "-U_FORTIFY_SOURCE",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-Werror",
]
KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(')


def available() -> bool:
    """Whether g++ is here, on Linux, where the header's fibers work."""
    return platform.system() == "Linux" and shutil.which(_compiler()) is not None


def _compiler() -> str:
    return os.environ.get("CXX", "g++").split()[0]


def kernel_names(text: str) -> list[str]:
    """Of the kernels that a source defines."""
    return KERNEL.findall(text)


def build(source: Path) -> ctypes.CDLL:
    """Compile a .cu, unless the same is there. Raises AssertionError with the compiler's words."""
    text = source.read_text(encoding="utf-8")
    digest = hashlib.sha256(repr((_compiler(), FLAGS, text)).encode())
    for path in (HEADER, *sorted(SOURCES.glob("*.cuh"))):
        digest.update(path.read_bytes())
    target = FOLDER / f"{source.stem}-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        unit = target.with_suffix(f".{os.getpid()}.cpp")
        exports = "".join(f"CUDA_ON_CPU_KERNEL({name})\n" for name in kernel_names(text))
        unit.write_text(f'#include "{HEADER}"\n#include "{source.resolve()}"\n{exports}', encoding="utf-8")
        unfinished = target.with_suffix(f".{os.getpid()}")
        command = [_compiler(), *FLAGS, f"-I{SOURCES}", str(unit), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        unfinished.replace(target)
        unit.unlink()
    return ctypes.CDLL(str(target))


class CpuBackend:
    """seed: 0 runs threads in order; another number shuffles them, in the same way each time it is given."""

    device_type = "cpu"

    def __init__(self, seed: int = 0, folder: Path = SOURCES) -> None:
        self.seed = seed
        self.launches: list[str] = []
        self._folder = folder
        self._libraries: dict[str, ctypes.CDLL] = {}

    def prepare(self, kernels: Sequence[Kernel], device: torch.device, folder: Path) -> None:
        """See cuda.launch.launcher.Backend."""
        self._libraries |= {source: build(self._folder / source) for source in {one.source for one in kernels}}

    def run(
        self,
        kernel: Kernel,
        device: torch.device,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        values: Sequence[np.generic],
    ) -> None:
        """See cuda.launch.launcher.Backend."""
        if kernel.source not in self._libraries:
            self._libraries[kernel.source] = build(self._folder / kernel.source)
        function = getattr(self._libraries[kernel.source], f"run_{kernel.name}")
        function.restype = ctypes.c_char_p
        buffers = [ctypes.create_string_buffer(value.tobytes(), value.nbytes) for value in values]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(buffer) for buffer in buffers))
        widths = (ctypes.c_int * max(1, len(values)))(*(value.nbytes for value in values))
        sizes = (ctypes.c_int64 * 7)(*grid, threads, 1, 1, shared_bytes)
        self.launches.append(kernel.name)
        error = function(sizes, ctypes.c_uint(self.seed), pointers, widths, ctypes.c_int(len(values)))
        if error is not None:
            raise LaunchError(error.decode())
