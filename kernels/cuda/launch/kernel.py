"""Description of a CUDA C++ kernel; launcher.py runs it.

    SCALE = Kernel("scale.cu", "scale", {"values": "*f32", "count": "i32", "factor": "f32"})

names a function of a source in the folder above, and its parameters in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SOURCES = Path(__file__).parents[1]
# Options of NVRTC. Sums keep the order and the rounding of the sources, and subnormal numbers.
OPTIONS = ("-std=c++17", "--fmad=false", "--ftz=false", f"-I{SOURCES}")
POINTERS = {
    "*f32": torch.float32,
    "*f64": torch.float64,
    "*bf16": torch.bfloat16,
    "*i64": torch.int64,
    "*i32": torch.int32,
    "*bytes": torch.uint8,
}
SCALARS: dict[str, type[np.generic]] = {"i32": np.int32, "i64": np.int64, "f32": np.float32}


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


def options(architecture: str) -> tuple[str, ...]:
    """All that NVRTC is told to compile for an architecture, such as "sm_90"."""
    return (*OPTIONS, f"--gpu-architecture={architecture}")


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
