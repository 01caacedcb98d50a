"""Host's time for a launch and for an operation: `python -m standin host_time` prints microseconds.

    launch          of a prepared Configuration, and the same through Triton's JITFunction.run; of a CUDA C++
                    kernel, as far as CuPy
    operations      a call of each operation that a step of Mistral Small 4 makes on a GPU, by its registered host
                    function, with all its launches and the tensors that it makes

The launches go through Triton's launcher to the stand-in's libcuda, which queues them; nothing ever runs them. So
the time of a driver is not in it, nor that of torch's allocator for a card: tensors are the host's here. Times are
the least of several runs, of this thread alone. Sizes are the model's, which choose the kernels; experts are few
and narrow, as no launch depends on that. The last line is JSON for tests, which compare its figures with each
other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cierzo.bench.gpu.calls import expert_outputs
from cierzo.bench.gpu.cases import CASES, SMALL4, Maker, Size
from cierzo.kernels import registry
from cierzo.kernels.cuda.launch.device import CupyBackend
from cierzo.kernels.cuda.launch.kernel import Kernel
from cierzo.kernels.cuda.launch.launcher import launch as launch_cuda
from cierzo.kernels.cuda.launch.launcher import running_on
from cierzo.kernels.ops.terms import Terms
from cierzo.kernels.triton.compile import load, warmed
from cierzo.kernels.triton.launch import Configuration, dry_run, launch, prepared
from standin.cases import COPY
from standin.driver import Machine

ROUNDS, CALLS = 7, 200
TURNS = 4  # over all of them, each with its rounds
MODEL = replace(SMALL4, name="few experts", vocab=1024, experts=16, expert_width=128, shared_width=128)
DECODE = Size(name="decode", sequences=8, rows_each=1, context=256)
PRODUCTS = ("fp8", "static fp8 x fp8")  # of a step with experts in NVFP4, and of one in FP8
# What a step calls, and the number formats in which. A norm and the first product have before them what the
# operation before leaves: parts of a product, and experts' terms.
STEP = {
    **dict.fromkeys(("latents_of", "absorbed_queries", "linear_terms"), PRODUCTS),
    "expert_terms": ("nvfp4", PRODUCTS[1]),
    **dict.fromkeys(("mla_values", "add_rms_norm", "route_groups", "rope_tables"), ("bf16",)),
    **dict.fromkeys(("sum_terms", "lm_head"), ("bf16",)),
}


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


def again(found: Found, function: Callable[..., Any], arguments: Sequence[Any]) -> Found:
    """The same, measured once more: what else the machine does comes and goes within seconds."""
    return replace(found, host_us=min(found.host_us, least_us(lambda: function(*arguments))))


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


def arguments_of(operation: str, format: str) -> tuple[Any, ...]:
    """Arguments as a step gives them."""
    maker = Maker(format, cold_bytes=0)
    ((first, *given), *_), _ = CASES[operation].make(MODEL, DECODE, maker)
    if operation == "latents_of":
        first = expert_outputs(MODEL, DECODE, maker)
    if operation == "add_rms_norm":
        first = parts_of(PRODUCTS[0])
    return first, *given


def parts_of(format: str) -> Terms:
    """The result of the product behind attention, as shapes: its parts of k."""
    (arguments, *_), _ = CASES["linear_terms"].make(MODEL, DECODE, Maker(format, "meta", cold_bytes=0))
    found: list[Terms] = []
    dry_run(lambda *given: found.append(on_gpu("linear_terms")(*given)), *map(on_meta, arguments))
    return replace(found[0], values=torch.empty_like(found[0].values, device="cpu"))


def on_gpu(operation: str) -> Callable[..., Any]:
    """The host function that a GPU's engine calls."""
    return registry.implementations(operation, "cuda")[0].load()


def main() -> int:
    """Measure and print."""
    machine = Machine()
    try:
        alone = [of_launch(machine)]
        with running_on(_Queueing()):
            cuda = [of_cuda_launch()]
            calls = {
                f"{operation}, {format}": (on_gpu(operation), arguments_of(operation, format))
                for operation, formats in STEP.items()
                for format in formats
            }
            found = {name: measured(*call) for name, call in calls.items()}
            for _ in range(TURNS - 1):
                alone.append(of_launch(machine))
                cuda.append(of_cuda_launch())
                found = {name: again(found[name], *call) for name, call in calls.items()}
    finally:
        machine.close()
    straight, through_triton = (min(times) for times in zip(*alone, strict=True))
    print(f"{'a launch':30}{straight:8.2f} us, {through_triton:.2f} us through JITFunction.run")
    print(f"{'a launch of CUDA C++':30}{min(cuda):8.2f} us")
    for name, one in found.items():
        print(f"{name:30}{one.host_us:8.2f} us, {one.launches} launches, {one.host_us / one.launches:.2f} us each")
    result = {"launch": straight, "through Triton": through_triton, "CUDA C++": min(cuda)}
    print(json.dumps(result | {"operations": {name: [one.launches, one.host_us] for name, one in found.items()}}))
    return 0
