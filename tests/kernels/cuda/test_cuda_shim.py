"""The header that runs kernels on the CPU: what it computes, and the faults that it must not let pass."""

from __future__ import annotations

from pathlib import Path

import cuda_on_cpu
import pytest
import torch
from torch import Tensor

from cierzo.kernels.check import ArgumentError
from cierzo.kernels.cuda.launch import device, launcher
from cierzo.kernels.cuda.launch.kernel import Kernel, LaunchError
from cierzo.kernels.cuda.launch.launcher import launch, running_on
from cierzo.kernels.registry import KernelChoiceError

pytestmark = pytest.mark.skipif(not cuda_on_cpu.available(), reason="no g++ on Linux")
FOLDER = Path(__file__).parent


def run(name: str, types: dict[str, str], threads: int, seed: int = 0, blocks: int = 1, **rest) -> None:
    with running_on(cuda_on_cpu.CpuBackend(seed, FOLDER)):
        launch(Kernel("faults.cu", name, types), grid=(blocks,), threads=threads, **rest)


def out_of(name: str, threads: int = 64, seed: int = 0) -> Tensor:
    out = torch.zeros(threads, dtype=torch.int64)
    run(name, {"out": "*i64"}, threads, seed, out=out)
    return out


def test_a_block_adds_up_in_every_order() -> None:
    values = torch.randn(200)
    totals = []
    for seed in range(6):
        total = torch.zeros(1)
        run(
            "block_sum",
            {"values": "*f32", "total": "*f32", "count": "i32"},
            256,
            seed,
            values=values,
            total=total,
            count=200,
        )
        totals.append(float(total))
    assert len(set(totals)) == 1
    assert totals[0] == pytest.approx(float(values.double().sum()), abs=1e-4)


def test_votes_and_shuffles_are_cudas() -> None:
    out = torch.zeros(64, 4, dtype=torch.int64)
    for seed in (0, 1):
        run("votes", {"out": "*i64"}, 64, seed, out=out)
        for thread in range(64):
            lane = thread % 32
            eight = lane // 8 * 8
            up = lane - 3 if lane - 3 >= eight else lane
            down = lane + 3 if lane + 3 < eight + 8 else lane
            assert out[thread].tolist() == [sum(1 << i for i in range(0, 32, 3)), 0xFF << eight, up, down]


def test_a_race_is_seen_when_the_order_changes() -> None:
    found = {tuple(out_of("race", 128, seed).tolist()) for seed in range(5)}
    assert len(found) == 5
    atomics = set()
    for seed in range(5):
        out, following = torch.zeros(64, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        run("atomic_order", {"out": "*i64", "next": "*i64"}, 64, seed, out=out, next=following)
        assert sorted(out.tolist()) == list(range(64))
        atomics.add(tuple(out.tolist()))
    assert len(atomics) == 5
    assert torch.equal(out_of("race", 128, 3), out_of("race", 128, 3))  # a seed says which order


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_barrier", r"cannot go on: .*thread 0 is in __syncthreads .*thread \d+ has returned"),
        ("two_barriers", r"cannot go on: .*thread 0 is in __syncthreads \(line (\d+)\), thread 40 is in __sync"),
        ("divergent_shuffle", r"cannot go on: .*thread \d+ .*__shfl_sync|cannot go on: .*__syncthreads"),
        (
            "returned_lane",
            r"lane 5 of mask ffffffff has returned|cannot go on: .*__shfl_sync.*thread 5 has returned",
        ),
    ],
)
def test_divergence_is_refused(name: str, message: str, seed: int) -> None:
    with pytest.raises(LaunchError, match=message):
        out_of(name, seed=seed)


@pytest.mark.parametrize(
    ("mask", "lane", "threads", "message"),
    [
        (0xFFFF, 3, 32, ""),
        (0xFFFE, 3, 32, "mask 0000fffe leaves out lane 0, the caller"),
        (0xFFFF, 20, 32, "reads lane 20, which is not in mask 0000ffff"),
        (0xFFFFFF, 3, 20, "mask 00ffffff names lanes that do not exist"),
        (0x1FFFF, 3, 32, "lane 16 of mask 0001ffff has returned|thread 16 has returned"),
    ],
)
def test_masks_are_held_to(mask: int, lane: int, threads: int, message: str) -> None:
    out = torch.zeros(16, dtype=torch.int64)
    arguments = {"out": out, "mask": mask, "from": lane}
    types = {"out": "*i64", "mask": "i64", "from": "i32"}
    if not message:
        run("masked_shuffle", types, threads, **arguments)
        assert out.tolist() == [9] * 16
        return
    with pytest.raises(LaunchError, match=message):
        run("masked_shuffle", types, threads, **arguments)


def test_shared_memory_is_poisoned_and_guarded() -> None:
    out = torch.zeros(3)
    run("uninitialised", {"out": "*f32"}, 1, blocks=3, shared_bytes=4, out=out)
    assert out.isnan().all()
    arguments = {"out": torch.zeros(1, dtype=torch.int64), "bytes": 40}
    types = {"out": "*i64", "bytes": "i32"}
    run("write_shared", types, 1, shared_bytes=40, **arguments)
    with pytest.raises(LaunchError, match="wrote byte 39 of 39 bytes of shared memory"):
        run("write_shared", types, 1, shared_bytes=39, **arguments)


def test_a_failure_names_the_kernel_and_its_arguments() -> None:
    message = r"faults.cu: divergent_barrier\(out=torch.int64 \[64\] at 0x\w+\), grid \(1, 1, 1\), 64 threads"
    with pytest.raises(LaunchError, match=message):
        out_of("divergent_barrier")
    assert out_of("race")[5] == -1  # and the next launch is none the worse


def test_arguments_are_checked_before_a_launch() -> None:
    types, out = {"out": "*i64", "mask": "i64", "from": "i32"}, torch.zeros(16, dtype=torch.int64)
    good = {"out": out, "mask": 1, "from": 0}
    for changed, message in (
        ({"out": out.float()}, "masked_shuffle: out must be a tensor of torch.int64, is torch.float32"),
        ({"out": 7}, "out must be a tensor of torch.int64, is 7"),
        ({"from": 2**31}, "from is 2147483648, more than i32 holds"),
        ({"out": out.to("meta")}, "out is on meta, the kernel runs on cpu"),
        ({"grid": (2**31,)}, r"grid\[0\] is 2147483648, at most 2147483647"),
        ({"threads": 2048}, r"threads is 2048, must be 1 \.\. 1024"),
        ({"shared_bytes": 50000}, "shared_bytes is 50000, at most 49152"),
        ({"more": 1}, "takes out, mask, from, got"),
    ):
        with (
            running_on(cuda_on_cpu.CpuBackend(0, FOLDER)),
            pytest.raises(ArgumentError, match=message),
        ):
            launch(Kernel("faults.cu", "masked_shuffle", types), **({"grid": (1,), "threads": 32} | good | changed))


def test_without_a_gpu_the_error_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_backends", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelChoiceError, match="the CUDA kernels cannot run: torch finds no GPU"):
        launcher.backend()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device.importlib, "import_module", _absent)
    with pytest.raises(
        KernelChoiceError, match=r"CuPy cannot be imported \(not here\): pip install 'cierzo\[cuda\]'"
    ):
        launcher.backend()


def _absent(name: str) -> None:
    raise ImportError("not here")
