"""Every kernel at the sizes of a serving step, and torch's own; what the card can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from math import prod
from typing import Any

import torch
from triton import testing

from cierzo.bench.gpu.baselines import BASELINES
from cierzo.bench.gpu.calls import Cell, cells, make_call
from cierzo.bench.gpu.cases import CASES, COLD_BYTES, Size
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels import registry
from cierzo.kernels.formats.device import DeviceMatrix
from cierzo.kernels.triton import heuristics

SIZES = (
    *(Size(name=f"decode {n}", sequences=n, rows_each=1, context=4096) for n in (1, 8, 64, 256)),
    Size(name="decode 64, one prefix", sequences=64, rows_each=1, context=4096, shared=3584),
    Size(name="decode 1 of 256k", sequences=1, rows_each=1, context=262_144),
    *(Size(name=f"prefill {n}", sequences=1, rows_each=n, context=n) for n in (4096, 8192, 16_384)),
)
SAMPLES, SAMPLE_MS = 7, 20
COPY_BYTES = 1 << 30
SIDE = 8192
# Of an element that is dequantised: its code as an index (8), then fp32 in three products; twice, as a graph that
# is recorded has memory of its own.
BASELINE_BYTES = 2 * (8 + 3 * 4)
Calls = Sequence[tuple[Any, ...]]  # arguments of calls in turn


def measure(
    operation: str,
    model: ModelSizes,
    size: Size,
    format: str,
    device: torch.device,
    *,
    cold_bytes: int = COLD_BYTES,
    subject: str = "kernels",
) -> dict[str, Any]:
    """Microseconds of a call, and its bytes and operations. subject: "kernels" are ours; "described" the same, read
    through descriptors (for heuristics.DESCRIBED_TOKENS); "torch" is what torch has, if it fits."""
    if subject == "torch" and device.type == "cuda":
        calls, _ = make_call(operation, model, size, format, torch.device("meta"), cold_bytes=0)
        needed, free = baseline_bytes(calls[0]), torch.cuda.mem_get_info(device)[0]
        if needed > free:
            return {"does not fit": f"it takes {needed >> 30} GiB, {free >> 30} are free"}
    calls, work = make_call(operation, model, size, format, device, cold_bytes=cold_bytes)
    choice = registry.implementations(operation, "cuda")[0]
    function, name = choice.load(), choice.name
    if subject == "torch":
        calls, name = [(BASELINES[operation](*arguments),) for arguments in calls[:2]], "torch"
        function = _run
    with read_through_descriptors() if subject == "described" else nullcontext():
        times, replayed = samples(function, calls, device)
    us = [seconds * 1e6 for seconds in times]
    found = {"bytes": float(work.num_bytes), "flops": float(work.operations), "implementation": name}
    return found | {"us": sorted(us)[len(us) // 2], "samples_us": us, "replayed": replayed}


def timed(subject: str) -> Iterator[tuple[str, Cell]]:
    """Cells of a subject of `measure`, at the sizes of a step: all; what descriptors may read; what torch has."""
    for size in SIZES:
        for name, (operation, model, _, format) in cells([size]):
            described = CASES[operation].weighted and not size.decodes
            known = operation in BASELINES and not (model.window or model.sinks)  # SDPA has no sinks
            if {"kernels": True, "described": described, "torch": known}[subject]:
                yield name, (operation, model, size, format)


def _run(baseline: Callable[[], Any]) -> Any:
    return baseline()


def baseline_bytes(arguments: tuple[Any, ...]) -> int:
    """Memory that torch's own function takes for arguments, at most: it dequantises whole matrices, all experts."""
    sizes = [prod(one.shape) for one in arguments if isinstance(one, DeviceMatrix) and one.activations != "fp8"]
    return BASELINE_BYTES * max(sizes, default=0) + 2 * sum(sizes)


@contextmanager
def read_through_descriptors() -> Iterator[None]:
    """Products with weights read them so within, whatever the number of tokens."""
    before, heuristics.DESCRIBED_TOKENS = heuristics.DESCRIBED_TOKENS, 0
    try:
        yield
    finally:
        heuristics.DESCRIBED_TOKENS = before


def samples(function: Callable[..., Any], calls: Calls, device: torch.device) -> tuple[list[float], bool]:
    """Seconds of a call, several samples; and whether a CUDA graph of the calls was replayed. On a CPU, and where a
    call waits for the device as torch's loop over experts does, they are launched."""

    def launch() -> None:
        for arguments in calls:
            function(*arguments)

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":
        with suppress(RuntimeError):
            times = testing.do_bench_cudagraph(launch, rep=SAMPLE_MS, return_mode="all")
            return [ms / 1e3 / len(calls) for ms in times], True
    found = []
    for _ in range(SAMPLES):
        wait()
        start = time.perf_counter()
        launch()
        wait()
        found.append((time.perf_counter() - start) / len(calls))
    return found, False


def ceilings(device: torch.device) -> dict[str, float]:
    """copy_gb_per_s (bytes read and written), and TFLOP/s of square products: bf16, and FP8 where torch has it."""
    small = device.type != "cuda"
    side, count = (256, COPY_BYTES >> 8) if small else (SIDE, COPY_BYTES >> 2)
    source = torch.empty(count, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def best_s(function: Callable[..., Any], *arguments: Any) -> float:
        return min(samples(function, [arguments], device)[0])

    found = {
        "copy_gb_per_s": 2 * source.nbytes / best_s(target.copy_, source) / 1e9,
        "bf16_tflop_per_s": 2 * side**3 / best_s(torch.mm, a, b) / 1e12,
    }
    if not small:
        one = torch.ones((), device=device)
        codes, other = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        product = partial(torch._scaled_mm, out_dtype=torch.bfloat16)
        found["fp8_tflop_per_s"] = 2 * side**3 / best_s(product, codes, other, one, one) / 1e12
    return found
