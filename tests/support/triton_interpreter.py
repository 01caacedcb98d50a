"""Triton's interpreter, mended: kernels run on the CPU, and either compute what a GPU would or raise.

As it is (Triton 3.6 to 3.9), bf16 and e4m3 values are integers to it: a dot or a product of them is garbage, in
silence; a cast of fp32 to bf16 truncates; to e4m3 it misrounds, and NaN of e4m3 is read as 480. A dot's bits depend
on the processor, and integers that overflow wrap round. Here casts go through torch's own, dots of 8- and 16-bit
floats are computed in fp32, every dot adds its products in order to what it is given, and arithmetic on bf16 or
e4m3 raises, as do integers that overflow: kernels compute in fp32, and addresses in 64 bits. What this proves is
loops, masks, addresses and the order of splits; the bits of an MMA's sum are the device's. Inline PTX runs in
ptx.py.

TRITON_INTERPRET must be set before a kernel's module is imported (tests/conftest.py does), `repair` called once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ptx
import torch
import triton.language as tl
import triton_shortcuts
from ordered_product import ordered_product
from triton.language.extra import cuda
from triton.runtime import interpreter

TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
CODES = (tl.bfloat16, tl.float8e4nv, tl.float8e5)  # what the interpreter holds as unsigned integers
CODE_NAMES = {kind.name for kind in CODES}
LARGEST_E4M3 = 448.0


def repair() -> None:
    """Mend the interpreter of this process."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "repaired", False):
        return
    builder.repaired = True
    original_cast = builder.cast_impl
    original_convert = builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if _is_code(source.dtype) or _is_code(target):
            return _converted(source, target)
        return original_cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source.dtype.scalar in TORCH and target.scalar in TORCH:
            return _converted(source, target)
        return original_convert(self, source, target, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        return interpreter.TensorHandle(ordered_product(_floats(a), _floats(b), d.data), d.dtype.scalar)

    def create_inline_asm(self: Any, text: str, _: str, values: Any, types: Any, __: bool, pack: int) -> Any:
        kinds = [one.scalar for one in types]
        found = ptx.run(text, [one.data for one in values], [_integers(kind) for kind in kinds], pack)
        return _Results(
            [
                interpreter.TensorHandle(data.view(interpreter._get_np_dtype(kind)), kind)
                for data, kind in zip(found, kinds, strict=True)
            ]
        )

    builder.cast_impl = cast_impl
    builder.create_inline_asm = create_inline_asm
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_dot = create_dot
    for name in ("binary_op", "unary_op", "ternary_op"):
        if hasattr(builder, name):
            setattr(builder, name, _refusing(getattr(builder, name)))
    semantic: Any = interpreter.interpreter_semantic
    semantic.binary_op_sanitize_overflow_impl = _refuse_overflow
    cuda.gdc_wait = cuda.gdc_launch_dependents = lambda: None  # programs run one after the other
    triton_shortcuts.take()


class _Results:
    """What inline assembly returns."""

    def __init__(self, found: list[Any]) -> None:
        self._found = found

    def get_result(self, number: int) -> Any:
        return self._found[number]


def _integers(kind: Any) -> np.dtype[Any]:
    """Unsigned integers as wide as a type."""
    return np.dtype(f"u{kind.primitive_bitwidth // 8}")


def _refuse_overflow(left: Any, right: Any, operation: Any) -> None:
    """Raise if `+`, `-` or `*` of integers leaves their type. The interpreter's own check computes as much, in many
    more operations, and drops the answer unless its `debug` option is set."""
    kind = left.type.scalar
    if kind.int_bitwidth >= 64:
        return
    exact = EXACT[operation.__name__](left.handle.data, right.handle.data, dtype=np.int64)
    if exact.min() < kind.get_int_min_value() or exact.max() > kind.get_int_max_value():
        raise OverflowError(f"{kind} overflows in {operation.__name__}")


def _refusing(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation, unless one of its operands is a float that the interpreter holds as an integer."""

    def checked(self: Any, *operands: Any) -> Any:
        for operand in operands:
            if isinstance(operand, interpreter.TensorHandle) and _is_code(operand.dtype):
                raise TypeError(f"arithmetic on {operand.dtype}: kernels convert to fp32 first")
        with np.errstate(all="ignore"):  # infinity by infinity is NaN, and no warning, on a GPU
            return operation(self, *operands)

    return checked


def _is_code(dtype: Any) -> bool:
    return dtype.scalar.name in CODE_NAMES


def _converted(source: Any, target: Any) -> Any:
    kind = target.scalar
    values = torch.from_numpy(np.ascontiguousarray(_floats(source)))
    if kind == tl.float8e4nv:  # the GPU's conversion saturates; torch's makes NaN of what is too large
        values = torch.where(values.isnan(), values, values.clamp(-LARGEST_E4M3, LARGEST_E4M3))
    data: Any
    if kind in TORCH:
        result = values.to(TORCH[kind])
        data = result.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[result.element_size()]).numpy()
        data = data.view(interpreter._get_np_dtype(kind))
    else:
        data = values.numpy().astype(interpreter._get_np_dtype(kind))
    return interpreter.TensorHandle(data.reshape(source.data.shape), kind)


def _floats(handle: Any) -> Any:
    """fp32 values of any handle's data; exact for 8- and 16-bit floats."""
    kind = handle.dtype.scalar
    if kind in CODES:
        stored = torch.from_numpy(np.ascontiguousarray(handle.data)).view(TORCH[kind])
        return stored.float().numpy().reshape(handle.data.shape)
    return handle.data.astype(np.float64 if kind == tl.float64 else np.float32)
