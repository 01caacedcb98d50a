"""The machine's ceilings: bytes read from memory a second, products a second.

Bandwidth is the median of several reads of a buffer that no cache holds. A product's rate is the best of several
runs, by torch or by our own kernels: nobody's kernel, ours included, is the limit by definition.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from cierzo.bench.machine import Ceiling, Ceilings, describe_machine
from cierzo.kernels.cpu import native
from cierzo.kernels.cpu.launch import linear
from cierzo.kernels.cpu.launch.memory import read_memory
from cierzo.kernels.pack import pack
from cierzo.kernels.registry import has_native

READ_BYTES = 512 << 20
SIDE = 2048  # of the matrices that are multiplied
ROUNDS = 5


def measure_ceilings() -> Ceilings:
    """Measure for a few seconds, on the threads that torch is set to. Other work on the machine lowers rates."""
    threads = torch.get_num_threads()
    buffer = torch.ones(READ_BYTES // 4)
    reads = [(_read_rate(buffer, 1), _read_rate(buffer, threads)) for _ in range(ROUNDS)]
    reader = native.instruction_set() if has_native() else "torch.sum"
    one_thread, all_threads = (
        Ceiling(rate=sorted(rates)[ROUNDS // 2], reached_by=reader) for rates in zip(*reads, strict=True)
    )
    del buffer
    products = {
        format: _product(dtype, format) for format, dtype in _PRODUCTS.items() if has_native() or format != "int8"
    }
    return Ceilings(
        threads=threads,
        read_one_thread=one_thread,
        read=all_threads,
        bf16=products["bf16"],
        float32=products["float32"],
        int8=products.get("int8"),
    )


def _read_rate(buffer: Tensor, threads: int) -> float:
    """10^9 bytes a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        read: Callable[[Tensor], object] = read_memory if has_native() else torch.sum
        start = time.perf_counter()
        read(buffer)
        return READ_BYTES / (time.perf_counter() - start) / 1e9
    finally:
        torch.set_num_threads(before)


_PRODUCTS = {"bf16": torch.bfloat16, "float32": torch.float32, "int8": torch.bfloat16}  # dtype of the activations


def _product(dtype: torch.dtype, format: str) -> Ceiling:
    """The best rate of a square product whose weights are in `format`. torch takes part where they are plain."""
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(SIDE, SIDE, generator=random).to(dtype) for _ in range(2))
    runs: dict[str, Callable[[], object]] = {}
    if format != "int8":
        runs["torch.mm"] = lambda: torch.mm(x, weight.t())
    if has_native():
        packed = pack(weight, format)
        runs[native.instruction_set()] = lambda: linear.linear(x, packed)
    best = {name: min(_seconds(run) for _ in range(ROUNDS)) for name, run in runs.items()}
    winner = min(best, key=best.__getitem__)
    return Ceiling(rate=2 * SIDE**3 / best[winner] / 1e9, reached_by=winner)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> int:
    """Print the machine and its ceilings."""
    machine = describe_machine()
    sets = " ".join(machine.instruction_sets)
    print(f"{machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB, {sets}")
    print(measure_ceilings())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
