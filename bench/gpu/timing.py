"""Every kernel at the sizes of a serving step, beside torch's own, as shares of what the card can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from triton import testing

from cierzo.bench.gpu.baselines import BASELINES
from cierzo.bench.gpu.calls import make_call
from cierzo.bench.gpu.cases import BY_FP8, CASES, COLD_BYTES, Size
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels import registry
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
Calls = Sequence[tuple[Any, ...]]  # arguments of calls in turn


def measure(
    operation: str,
    model: ModelSizes,
    size: Size,
    format: str,
    device: torch.device,
    limits: Mapping[str, float],
    cold_bytes: int = COLD_BYTES,
) -> dict[str, Any] | None:
    """us, GB/s, TFLOP/s and share of the limit, ours and torch's; None where the model lacks the operation."""
    call = make_call(operation, model, size, format, device, cold_bytes=cold_bytes)
    if call is None:
        return None
    calls, work = call
    choice = registry.implementations(operation, "cuda")[0]
    num_bytes, flops = float(work.num_bytes), float(work.operations)
    rate = limits.get("fp8_tflop_per_s" if format in BY_FP8 else "bf16_tflop_per_s", limits["bf16_tflop_per_s"])
    limit_s = max(num_bytes / limits["copy_gb_per_s"] / 1e9, flops / rate / 1e12)

    def timed(function: Callable[..., Any], calls: Calls) -> dict[str, Any]:
        times, replayed = samples(function, calls, device)
        seconds = sorted(times)[len(times) // 2]
        return {
            "us": seconds * 1e6,
            "samples_us": [sample * 1e6 for sample in times],
            "gb_per_s": num_bytes / seconds / 1e9,
            "tflop_per_s": flops / seconds / 1e12,
            "share": limit_s / seconds,
            "replayed": replayed,
        }

    found: dict[str, Any] = {"bytes": num_bytes, "flops": flops, "implementation": choice.name}
    found |= timed(choice.load(), calls)
    if CASES[operation].weighted and not size.decodes:  # for heuristics.DESCRIBED_TOKENS
        with read_through_descriptors():
            found["described"] = timed(choice.load(), calls)
    if operation in BASELINES and not (model.window or model.sinks):  # SDPA has no sinks
        prepared = [(BASELINES[operation](*arguments),) for arguments in calls[:2]]
        found["torch"] = timed(lambda run: run(), prepared)
    return found


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
