"""The mended interpreter itself: every code, a million values, dots, and arithmetic that is refused."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError

from cierzo.kernels.triton.launch import POINTER, Configuration, kernel, launch

SIZE = 1 << 16  # values of one program
LARGEST_E4M3 = 448.0


@kernel
def _cast(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@kernel
def _dot(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b))


@kernel
def _double(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x + x)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    size = min(SIZE, x.numel())
    out = torch.empty(x.numel(), dtype=dtype)
    types = {"x_ptr": POINTER[x.dtype], "out_ptr": POINTER[dtype]}
    launch(Configuration(_cast, types, {"SIZE": size}), (x.numel() // size,), x_ptr=x, out_ptr=out)
    return out


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_every_code_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    integers = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    codes = torch.arange(1 << 8 * dtype.itemsize).to(integers).view(dtype)
    assert torch.equal(cast(codes, torch.float32).view(torch.int32), codes.float().view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_a_million_values_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=random).to(torch.int32)
    values = bits.view(torch.float32)
    values = torch.where(values.isnan(), torch.ones(()), values)
    halfway = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, 1.0625, 1.1875, 448, 464, 1e9, -1e9, 2**-9, 2**-10, 0.0, -0.0]
    )
    values[: len(halfway)] = halfway
    saturated = values.clamp(-LARGEST_E4M3, LARGEST_E4M3) if dtype == torch.float8_e4m3fn else values
    integers = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(cast(values, dtype).view(integers), saturated.to(dtype).view(integers))
    assert cast(torch.tensor([torch.nan] * 16), dtype).float().isnan().all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32], ids=str)
def test_a_dot_of_small_floats_is_a_dot_of_their_values(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    a, b = torch.randn(16, 32, generator=random).to(dtype), torch.randn(32, 16, generator=random).to(dtype)
    out = torch.empty(16, 16)
    types = {"a_ptr": POINTER[dtype], "b_ptr": POINTER[dtype], "out_ptr": "*fp32"}
    configuration = Configuration(_dot, types, {"M": 16, "N": 16, "K": 32})
    launch(configuration, (1,), a_ptr=a, b_ptr=b, out_ptr=out)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def test_arithmetic_on_bf16_is_refused() -> None:
    x = torch.ones(16).bfloat16()
    configuration = Configuration(_double, {"x_ptr": "*bf16", "out_ptr": "*bf16"}, {"SIZE": 16})
    with pytest.raises((InterpreterError, CompilationError, TypeError), match="convert to fp32"):
        launch(configuration, (1,), x_ptr=x, out_ptr=torch.empty_like(x))
