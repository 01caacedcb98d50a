"""CUDA kernels on the CPU, in the order of threads and in two others; what launchers allocate is watched."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import cuda_on_cpu
import pytest
import torch
from torch import Tensor

from cierzo.kernels import registry
from cierzo.kernels.cuda.launch.launcher import running_on

GUARD, POISON = 0xA5, 0xFF
GUARD_BYTES = 256


@pytest.fixture(params=[0, 1, 2], ids=["in-order", "shuffled-1", "shuffled-2"])
def backend(request: pytest.FixtureRequest) -> Iterator[cuda_on_cpu.CpuBackend]:
    """The CUDA kernels are bound, and run on the CPU."""
    if not cuda_on_cpu.available():
        pytest.skip("no g++ on Linux")
    before = dict(vars(registry.bound))
    rows = [row for row in registry.IMPLEMENTATIONS if row.name == "cuda"]
    vars(registry.bound).update({row.operation: row.load() for row in rows})
    with running_on(cuda_on_cpu.CpuBackend(request.param)) as found:
        yield found
    vars(registry.bound).clear()
    vars(registry.bound).update(before)


@pytest.fixture(autouse=True)
def _guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives memory full of NaN (as integers -1) between guard bytes, which must be there at the end."""
    buffers: list[tuple[Tensor, int]] = []

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
        sizes = shape if not shape or isinstance(shape[0], int) else tuple(shape[0])
        num_bytes = math.prod(sizes) * dtype.itemsize
        buffer = torch.full((num_bytes + 2 * GUARD_BYTES + 64,), GUARD, dtype=torch.uint8)
        start = GUARD_BYTES + -(buffer.data_ptr() + GUARD_BYTES) % 64
        inside = buffer[start : start + num_bytes]
        inside.fill_(POISON)
        buffers.append((buffer, num_bytes))
        return inside.view(dtype).view(sizes) if num_bytes else inside.view(dtype).reshape(sizes)

    monkeypatch.setattr(torch, "empty", functools.wraps(torch.empty)(empty))
    yield
    for buffer, num_bytes in buffers:
        start = GUARD_BYTES + -(buffer.data_ptr() + GUARD_BYTES) % 64
        assert (buffer[:start] == GUARD).all(), "written before an output"
        assert (buffer[start + num_bytes :] == GUARD).all(), "written past an output"
