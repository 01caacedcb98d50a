"""The mended interpreter itself: every code, a million values, dots, and arithmetic that is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import ordered_product
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
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 16), (16, 16, 32), (64, 16, 128), (16, 128, 64)])
def test_a_dot_adds_the_products_of_its_values_in_order(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    a, b = torch.randn(m, k, generator=random).to(dtype), torch.randn(k, n, generator=random).to(dtype)
    out = torch.empty(m, n)
    types = {"a_ptr": POINTER[dtype], "b_ptr": POINTER[dtype], "out_ptr": "*fp32"}
    launch(Configuration(_dot, types, {"M": m, "N": n, "K": k}), (1,), a_ptr=a, b_ptr=b, out_ptr=out)
    products = a.float()[:, :, None] * b.float()
    assert np.array_equal(out.numpy(), products.numpy().cumsum(1)[:, -1])  # a running sum adds one by one


# A process of its own, because numpy's BLAS reads the variable when it is loaded.
ROWS_AND_COLUMNS = """
import itertools
import numpy as np
from ordered_product import ordered_product

random = np.random.default_rng(0)
for m, n, k in itertools.product((1, 2, 7, 16, 33, 64), (1, 2, 16, 40, 64), (1, 16, 33, 128)):
    for dtype in (np.float32, np.float64):
        a, b = random.standard_normal((m, k)).astype(dtype), random.standard_normal((k, n)).astype(dtype)
        whole = ordered_product(a, b)
        assert whole.dtype == dtype
        assert np.array_equal(whole, (a[:, :, None] * b).cumsum(1)[:, -1]), (m, n, k)
        assert np.array_equal(whole, ordered_product(np.asfortranarray(a), np.asfortranarray(b))), (m, n, k)
        for row in range(0, m, 5):
            assert np.array_equal(whole[row : row + 1], ordered_product(a[row : row + 1], b)), (m, n, k)
        for column in range(0, n, 5):
            one = slice(column, column + 1)
            assert np.array_equal(whole[:, one], ordered_product(a, b[:, one])), (m, n, k)
"""


@pytest.mark.parametrize("core", ["Haswell", "SkylakeX", "Zen"])
def test_a_dots_row_and_column_have_their_bits_alone_and_in_company(core: str) -> None:
    """Whichever kernel numpy's BLAS is told to use, and if it is one that this processor cannot run."""
    environment = {"OPENBLAS_CORETYPE": core, "PYTHONPATH": str(Path(ordered_product.__file__).parent)}
    command = [sys.executable, "-c", ROWS_AND_COLUMNS]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or f"status {done.returncode}"


def test_integers_that_overflow_are_refused() -> None:
    """An address past 32 bits must be computed in 64."""
    configuration = Configuration(_double, {"x_ptr": "*i32", "out_ptr": "*i32"}, {"SIZE": 16})
    x = torch.tensor([2**30 - 1, -(2**30)] * 8, dtype=torch.int32)
    out = torch.empty_like(x)
    launch(configuration, (1,), x_ptr=x, out_ptr=out)
    assert torch.equal(out, 2 * x)
    for beyond in (2**30, -(2**30) - 1):
        x[7] = beyond
        with pytest.raises(InterpreterError, match="int32 overflows in add"):
            launch(configuration, (1,), x_ptr=x, out_ptr=out)


def test_arithmetic_on_bf16_is_refused() -> None:
    x = torch.ones(16).bfloat16()
    configuration = Configuration(_double, {"x_ptr": "*bf16", "out_ptr": "*bf16"}, {"SIZE": 16})
    with pytest.raises((InterpreterError, CompilationError, TypeError), match="convert to fp32"):
        launch(configuration, (1,), x_ptr=x, out_ptr=torch.empty_like(x))
