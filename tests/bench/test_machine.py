"""The machine's ceilings are measured by what is there, and say by what."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cierzo.bench import machine
from cierzo.bench.machine import Ceiling, Ceilings, measure_apart, measure_ceilings, middle
from cierzo.kernels import registry
from cierzo.kernels.check import ArgumentError
from cierzo.kernels.cpu import native
from cierzo.kernels.cpu.launch.memory import read_memory


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(machine, "SIDE", 64)
    monkeypatch.setattr(machine, "ROUNDS", 3)


def rates(found: Ceilings) -> list[float]:
    measured = (found.read, found.bf16, found.float32, found.int8)
    return [ceiling.rate for ceiling in measured if ceiling is not None]


def test_rates_are_bytes_and_operations_by_the_time_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of reads counts and the best of products, on a clock that only they move."""
    now_s = 0.0

    def taking(*seconds: float) -> Any:
        turns = iter(seconds)

        def run(*arguments: Any) -> None:
            nonlocal now_s
            now_s += next(turns)

        return run

    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: now_s))
    monkeypatch.setattr(registry, "has_native", lambda: False)
    monkeypatch.setattr(torch, "sum", taking(4.0, 1.0, 0.5))
    monkeypatch.setattr(torch, "mm", taking(3.0, 2.0, 5.0, 8.0, 4.0, 6.0))  # bf16, then float32
    found = measure_ceilings()
    assert found.read.rate == pytest.approx((1 << 16) / 1.0 / 1e9)
    assert found.bf16.rate == pytest.approx(2 * 64**3 / 2.0 / 1e9)
    assert found.float32.rate == pytest.approx(2 * 64**3 / 4.0 / 1e9)


def test_every_ceiling_is_measured() -> None:
    found = measure_ceilings()
    assert all(rate > 0 for rate in rates(found))
    assert found.threads == torch.get_num_threads()


def test_a_process_apart_tells_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "measure_ceilings", os.getpid)  # which the process looks up by name
    assert measure_apart() not in (os.getpid(), os.getppid())


def test_the_middle_of_several_measurements_is_each_rate_s_own() -> None:
    def measured(read: float, bf16: float, int8: float | None) -> Ceilings:
        made = [Ceiling(rate=rate, reached_by="us") for rate in (read, bf16, 1.0)]
        last = None if int8 is None else Ceiling(rate=int8, reached_by="us")
        return Ceilings(threads=2, read=made[0], bf16=made[1], float32=made[2], int8=last)

    found = [measured(3.0, 10.0, None), measured(1.0, 30.0, 5.0), measured(2.0, 20.0, 7.0)]
    assert middle(found) == measured(2.0, 20.0, 6.0)


def test_torch_measures_where_the_library_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "has_native", lambda: False)
    found = measure_ceilings()
    assert found.read.reached_by == "torch.sum"
    assert found.bf16.reached_by == found.float32.reached_by == "torch.mm"
    assert found.int8 is None


@pytest.mark.parametrize("name", native.available())
def test_every_float_is_read_once(name: str) -> None:
    native.select(name)
    try:
        for threads, count in ((1, 0), (1, 1), (2, 16), (1, 300_001), (2, 1_000_003)):
            native.set_threads(threads)
            assert read_memory(torch.ones(count)) == count
        with pytest.raises(ArgumentError, match="contiguous"):
            read_memory(torch.ones(9)[::2])
    finally:
        native.select()
        native.set_threads(0)
