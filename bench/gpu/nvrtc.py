"""NVRTC without a GPU or a driver: a .cu -> a cubin, and what ptxas made of each kernel."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "nvidia/cu13/lib/libnvrtc.so.13"  # of the package nvidia-cuda-nvrtc


@dataclass(frozen=True, slots=True)
class Usage:
    """registers, stack_bytes (spills, indexed arrays): of a thread. shared_bytes: static, of a block."""

    registers: int
    stack_bytes: int
    shared_bytes: int


def library() -> Path | None:
    """libnvrtc, as the package installs it."""
    spec = importlib.util.find_spec("nvidia")
    found = [Path(place).parent / LIBRARY for place in (spec.submodule_search_locations or ())] if spec else []
    return next((path for path in found if path.exists()), None)


def compile_cubin(text: str, options: tuple[str, ...]) -> bytes:
    """Raises AssertionError with the compiler's words."""
    path = library()
    assert path is not None, "nvidia-cuda-nvrtc is not installed"
    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):  # NVRTC asks for it by its name alone
        ctypes.CDLL(str(builtins))
    nvrtc = ctypes.CDLL(str(path))
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None) == 0
    words = [option.encode() for option in options]
    status = nvrtc.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
    log = _fetch(nvrtc, program, "ProgramLog").rstrip(b"\0").decode()
    assert status == 0, log
    cubin = _fetch(nvrtc, program, "CUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin


def _fetch(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    assert getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    buffer = ctypes.create_string_buffer(size.value)
    assert getattr(nvrtc, f"nvrtcGet{what}")(program, buffer) == 0
    return buffer.raw


def usage(cubin: bytes) -> dict[str, Usage]:
    """Kernel -> what it uses."""
    found = re.findall(
        r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", _dump(cubin, "-res-usage")
    )
    return {
        name: Usage(int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in found
    }


def disassembled(cubin: bytes) -> str:
    """The instructions of all kernels with labels, for loops.py."""
    return _dump(cubin, "-c", "nvdisasm")


def _dump(cubin: bytes, option: str, name: str = "cuobjdump") -> str:
    """The output of a tool in Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
