"""Time of a call by replaying a CUDA graph of it, with inputs in turn; and what the card can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

SAMPLES = 7
SAMPLE_S = 0.02
COPY_BYTES = 1 << 30
SIDE = 8192


def samples(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], device: torch.device
) -> tuple[list[float], bool]:
    """Seconds of a call, several samples; and whether a graph was replayed (else the calls were launched)."""
    if device.type != "cuda":
        return _launched(function, calls, time.perf_counter, lambda: None), False
    for arguments in calls:
        function(*arguments)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for arguments in calls:
                function(*arguments)
    except RuntimeError:  # it waits for the device, as torch's loop over experts does
        torch.cuda.synchronize()
        return _launched(function, calls, time.perf_counter, torch.cuda.synchronize), False
    graph.replay()
    torch.cuda.synchronize()
    once = _events(graph.replay, 1)
    repeats = max(1, int(SAMPLE_S / max(once, 1e-6)))
    return [_events(graph.replay, repeats) / repeats / len(calls) for _ in range(SAMPLES)], True


def _events(work: Callable[[], None], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _launched(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    clock: Callable[[], float],
    wait: Callable[[], Any],
) -> list[float]:
    found = []
    for _ in range(SAMPLES):
        wait()
        start = clock()
        for arguments in calls:
            function(*arguments)
        wait()
        found.append((clock() - start) / len(calls))
    return found


def ceilings(device: torch.device) -> dict[str, float]:
    """copy_gb_per_s (bytes read and written), and TFLOP/s of square products: bf16, and FP8 where torch has it."""
    small = device.type != "cuda"
    source = torch.empty((COPY_BYTES >> 6 if small else COPY_BYTES) // 4, device=device)
    target = torch.empty_like(source)
    copy_s = min(samples(target.copy_, [(source,)], device)[0])
    side = 256 if small else SIDE
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = {
        "copy_gb_per_s": 2 * source.nbytes / copy_s / 1e9,
        "bf16_tflop_per_s": 2 * side**3 / min(samples(torch.mm, [(a, b)], device)[0]) / 1e12,
    }
    if not small:
        one = torch.ones((), device=device)
        codes, other = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()

        def product() -> torch.Tensor:
            return torch._scaled_mm(codes, other, one, one, out_dtype=torch.bfloat16)

        found["fp8_tflop_per_s"] = 2 * side**3 / min(samples(product, [()], device)[0]) / 1e12
    return found
