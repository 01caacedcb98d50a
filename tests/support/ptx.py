"""Inline PTX of the kernels, run on the CPU: the few instructions that they use, on uint32 arrays, a register each.

Triton hands an inline assembly `pack` elements of every tensor at a time, and does not say which; here they are
neighbours along the last axis. A kernel whose elements are computed apart is right whichever they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Registers = NDArray[np.uint32]
REGISTER_BITS = 32


def run(
    text: str, inputs: Sequence[NDArray[Any]], outputs: Sequence[np.dtype[Any]], pack: int
) -> list[NDArray[Any]]:
    """What inline assembly returns: an array of the inputs' shape for each of the outputs' integer dtypes."""
    values: dict[str, Any] = {}
    registers = [one for array in inputs for one in _registers(array, pack)]
    of_outputs = [max(1, pack * kind.itemsize * 8 // REGISTER_BITS) for kind in outputs]
    values |= {f"${sum(of_outputs) + number}": register for number, register in enumerate(registers)}
    for line in re.sub(r"//[^\n]*", "", text).strip(" \n{}").split(";"):
        if line.strip() and not line.strip().startswith(".reg"):
            operation, target, *operands = re.split(r"[\s,]+", line.strip())
            if operation not in OPERATIONS:
                raise NotImplementedError(f"no PTX instruction {operation} here: tests/support/ptx.py")
            read = [values[one] if one in values else np.uint32(int(one, 0)) for one in operands]
            values[target] = OPERATIONS[operation](*read)
    found, first = [], 0
    for kind, count in zip(outputs, of_outputs, strict=True):
        joined = np.stack([np.asarray(values[f"${first + number}"], np.uint32) for number in range(count)], -1)
        first += count
        per = REGISTER_BITS // (8 * kind.itemsize) if pack > 1 else 1
        elements = joined.view(kind) if pack > 1 else joined.astype(kind)
        found.append(elements.reshape(inputs[0].shape) if per else elements)
    return found


def _registers(array: NDArray[Any], pack: int) -> list[Registers]:
    """Registers that hold `pack` elements each time, as many of them in one as fit."""
    unsigned = np.ascontiguousarray(array).view(f"u{array.itemsize}")
    if pack == 1:
        return [unsigned.reshape(-1).astype(np.uint32)]
    words = unsigned.reshape(-1, pack).view(np.uint32)
    return [words[:, number] for number in range(words.shape[1])]


def _shift_left(value: Any, count: Any) -> Any:
    return (np.asarray(value, np.uint64) << np.uint64(count)).astype(np.uint32)


def _lop3(a: Any, b: Any, c: Any, table: Any) -> Any:
    """Bit by bit what the table has at place 4a + 2b + c."""
    result = np.uint32(0)
    for place in range(8):
        if int(table) >> place & 1:
            picked = [one if place & bit else ~np.asarray(one, np.uint32) for one, bit in ((a, 4), (b, 2), (c, 1))]
            result = result | (picked[0] & picked[1] & picked[2])
    return result


def _prmt(a: Any, b: Any, selector: Any) -> Any:
    """Each byte one of the eight, or with bit 3 of its selector eight copies of that one's sign."""
    bytes_of = [
        np.asarray(one, np.uint32) >> np.uint32(8 * place) & np.uint32(255) for one in (a, b) for place in range(4)
    ]
    result = np.uint32(0)
    for place in range(4):
        chosen = int(selector) >> 4 * place & 15
        byte = bytes_of[chosen & 7]
        byte = np.where(byte >> np.uint32(7) > 0, np.uint32(255), np.uint32(0)) if chosen & 8 else byte
        result = result | byte << np.uint32(8 * place)
    return result


def _multiply_pairs(a: Any, b: Any) -> Any:
    """bf16x2, subnormal numbers included, as PTX has it without .ftz."""
    result = np.uint32(0)
    for shift in (0, 16):
        factors = [
            np.asarray((np.asarray(one) >> np.uint32(shift) & np.uint32(0xFFFF)) << np.uint32(16)) for one in (a, b)
        ]
        numbers = [torch.from_numpy(np.atleast_1d(one).view(np.float32).copy()) for one in factors]
        rounded = (numbers[0] * numbers[1]).bfloat16().view(torch.int16).numpy().view(np.uint16)
        result = result | rounded.astype(np.uint32) << np.uint32(shift)
    return result


OPERATIONS: dict[str, Callable[..., Any]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "add.u32": lambda a, b: a + b,
    "setp.ne.u32": lambda a, b: a != b,
    "selp.b32": lambda a, b, picked: np.where(picked, a, b),
    "shl.b32": _shift_left,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "mul.rn.bf16x2": _multiply_pairs,
}
