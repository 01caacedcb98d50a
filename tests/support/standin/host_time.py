"""Host's time for a launch and for an operation: `python -m standin host_time` prints microseconds.

    launch          of a prepared Configuration, and the same through Triton's JITFunction.run; of a CUDA C++
                    kernel, as far as CuPy
    operations      a call of a kernel's host function, with all its launches and the tensors that it makes

The launches go through Triton's launcher to the stand-in's libcuda, which queues them; nothing ever runs them. So
the time of a driver is not in it, nor that of torch's allocator for a card: tensors are the host's here. Times are
the least of several runs, of this thread alone. The last line is JSON for tests, which compare its figures with
each other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cierzo.kernels.cuda.launch import moe as cuda_moe
from cierzo.kernels.cuda.launch.device import CupyBackend
from cierzo.kernels.cuda.launch.kernel import Kernel
from cierzo.kernels.cuda.launch.launcher import launch as launch_cuda
from cierzo.kernels.cuda.launch.launcher import running_on
from cierzo.kernels.formats.device import quantise
from cierzo.kernels.triton import linear, moe, norm
from cierzo.kernels.triton.compile import load, warmed
from cierzo.kernels.triton.launch import Configuration, dry_run, launch, prepared
from standin.cases import COPY
from standin.driver import Machine

ROUNDS, CALLS = 7, 200
EXPERTS, SLOTS, WIDTH, INNER, TOKENS = 16, 4, 256, 128, 64


@dataclass(frozen=True, slots=True)
class Found:
    """launches: of one call. host_us: of one call."""

    launches: int
    host_us: float


def least_us(function: Callable[[], Any]) -> float:
    """Least mean time of a call."""
    found = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(CALLS):
            function()
        found.append((time.thread_time() - start) / CALLS)
    return min(found) * 1e6


def on_meta(value: Any) -> Any:
    """An argument, and the tensors in it, without memory."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: on_meta(getattr(value, field.name)) for field in fields(value)})
    return value


def measured(function: Callable[..., Any], arguments: Sequence[Any]) -> Found:
    """An operation whose kernels are loaded, and prepared for tensors of the host."""
    seen = dry_run(function, *map(on_meta, arguments))
    for one in seen:
        if isinstance(one.kernel, Configuration) and not one.kernel.ready:
            load(one.kernel)
            one.kernel.ready[0] = prepared(one.kernel, warmed(one.kernel), torch.device("cpu"))
    return Found(len(seen), least_us(lambda: function(*arguments)))


def of_launch(machine: Machine) -> tuple[float, float]:
    """Time of a launch with two pointers and two numbers, and through JITFunction.run."""
    x, out = (machine.card.stream.allocate(torch.empty(64)) for _ in range(2))
    launch(COPY, (1,), x_ptr=x, out_ptr=out, count=64, beyond=0)
    straight = least_us(lambda: launch(COPY, (1,), x_ptr=x, out_ptr=out, count=64, beyond=0))
    options = {**COPY.constants, **COPY.options}
    return straight, least_us(lambda: COPY.kernel[(1,)](x_ptr=x, out_ptr=out, count=64, beyond=0, **options))


class _Queueing(CupyBackend):
    """CuPy's backend without CuPy: its function only takes what it is given."""

    device_type = "cpu"

    def __init__(self) -> None:
        pass

    def run(self, kernel: Kernel, device: torch.device, *_: Any) -> None:
        """See Backend."""


def of_cuda_launch() -> float:
    """Time of a launch with four pointers and four numbers."""
    numbers = dict.fromkeys(("rows", "width", "stride", "wide"), "i32")
    kernel = Kernel("none.cu", "none", {**dict.fromkeys(("a", "b", "c", "d"), "*f32"), **numbers})
    given: dict[str, Any] = dict.fromkeys(("a", "b", "c", "d"), torch.empty(64)) | dict.fromkeys(numbers, 64)
    return least_us(lambda: launch_cuda(kernel, grid=(4, 2), threads=128, **given))


def operations() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Calls by name."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, WIDTH, generator=random).bfloat16()
    weight = torch.randn(WIDTH, generator=random).bfloat16()
    matrix = quantise(torch.randn(WIDTH, WIDTH, generator=random).bfloat16(), "fp8")
    gate_up = quantise(torch.randn(EXPERTS, 2 * INNER, WIDTH, generator=random).bfloat16(), "nvfp4")
    down = quantise(torch.randn(EXPERTS, WIDTH, INNER, generator=random).bfloat16(), "nvfp4")
    router = torch.randn(EXPERTS, WIDTH, generator=random).bfloat16()
    ids = torch.arange(TOKENS * SLOTS).view(TOKENS, SLOTS) % EXPERTS
    order, starts = torch.arange(TOKENS * SLOTS), torch.arange(EXPERTS + 1)
    shares = torch.rand(TOKENS, SLOTS, generator=random)
    return {
        "rms_norm": (norm.rms_norm, (x, weight, 1e-5)),
        "add_rms_norm": (norm.add_rms_norm, (x, x.clone(), weight, 1e-5)),
        "linear": (linear.linear, (x, matrix)),
        "expert_mlp": (moe.expert_mlp, (x, gate_up, down, shares, order, starts, None, None)),
        "route (CUDA C++)": (cuda_moe.route, (x, router, SLOTS, 1, 1, True, 1.0)),
        "group_by_expert (CUDA C++)": (cuda_moe.group_by_expert, (ids, EXPERTS)),
    }


def main() -> int:
    """Measure and print."""
    machine = Machine()
    try:
        straight, through_triton = of_launch(machine)
        with running_on(_Queueing()):
            cuda = of_cuda_launch()
            found = {name: measured(function, given) for name, (function, given) in operations().items()}
    finally:
        machine.close()
    print(f"{'a launch':30}{straight:8.2f} us, {through_triton:.2f} us through JITFunction.run")
    print(f"{'a launch of CUDA C++':30}{cuda:8.2f} us")
    for name, one in found.items():
        print(f"{name:30}{one.host_us:8.2f} us, {one.launches} launches, {one.host_us / one.launches:.2f} us each")
    result = {"launch": straight, "through Triton": through_triton, "CUDA C++": cuda}
    print(json.dumps(result | {"operations": {name: [one.launches, one.host_us] for name, one in found.items()}}))
    return 0
