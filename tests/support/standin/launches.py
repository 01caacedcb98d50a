"""Launches on the stand-in: `python -m standin launches FOLDER` runs every case below and prints JSON, what went
wrong by the case's name. Tensors that cases keep are written to the folder, for whoever compares them."""

from __future__ import annotations

import gc
import json
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.language as tl
from card import OnCard
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cierzo.engine.worker.staging import Staging
from cierzo.kernels.check import ArgumentError
from cierzo.kernels.fault import DeviceFault, kernels_since, note, watching
from cierzo.kernels.formats.device import quantise
from cierzo.kernels.ref import moe as ref
from cierzo.kernels.triton import heuristics, moe, norm
from cierzo.kernels.triton import launch as ours
from cierzo.kernels.triton.launch import Configuration, kernel, launch
from standin import calls  # noqa: F401 (its cases)
from standin.cases import CASES, COPY, case, copy, raising, sent
from standin.driver import Machine, on_card
from standin.library import ILLEGAL_ADDRESS, LAUNCH_FAILED, OUT_OF_MEMORY
from standin.machine import Graph, torch_cuda
from standin.memory import Place

D, F, E = 96, 64, 5


@kernel
def _copy_tile(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(out_ptr + at, x_ptr.load([0, 0]))


COPY_TILE = Configuration(
    _copy_tile,
    {"x_ptr": "*fp32", "out_ptr": "*fp32"},
    {"ROWS": 16, "COLUMNS": 16},
    num_warps=1,
    blocks={"x_ptr": (16, 16)},
)


def copy_tile(x: Tensor) -> Tensor:
    out = x.new_empty(16, 16)
    launch(COPY_TILE, (1,), x_ptr=x, out_ptr=out)
    return out


@case
def a_launch_has_the_interpreters_values(machine: Machine, folder: Path) -> None:
    random = torch.Generator().manual_seed(1)
    x, weight = torch.randn(5, 96, generator=random).bfloat16(), torch.randn(96, generator=random).bfloat16()
    out = norm.rms_norm(sent(machine, x), sent(machine, weight), 1e-5)
    torch.save((x, weight, machine.card.values(out)), folder / "norm.pt")


@case
def experts_through_descriptors_have_the_interpreters_values(machine: Machine, folder: Path) -> None:
    random = torch.Generator().manual_seed(7)
    shapes = (E, 2 * F, D), (E, D, F), (2 * F, D), (D, F)
    matrices = [quantise(torch.randn(*shape, generator=random).bfloat16(), "nvfp4") for shape in shapes]
    x = torch.randn(20, D, generator=random).bfloat16()
    ids = torch.stack([torch.randperm(E, generator=random)[:2] for _ in range(20)])
    weights = torch.rand(20, 2, generator=random)
    order, starts = ref.group_by_expert(ids, E)
    with machine.card.loading():
        there = [matrix.to("cuda") for matrix in matrices]
    inputs = [sent(machine, tensor) for tensor in (x, weights, order, starts)]
    heuristics.DESCRIBED_TOKENS = 20
    out = moe.expert_mlp(inputs[0], *there[:2], *inputs[1:], *there[2:])
    torch.save((x, matrices, weights, order, starts, machine.card.values(out)), folder / "experts.pt")
    assert machine.ran[-3:] == ["_expert_gate_up", "_expert_down", "_sum_terms"], machine.ran


@case
def nothing_runs_before_it_is_waited_for(machine: Machine, folder: Path) -> None:
    x = sent(machine, torch.arange(64.0))
    before = len(machine.ran)
    out = copy(x) + 1.0
    assert len(machine.ran) == before
    assert machine.card.now(out).isnan().all()
    event = torch.cuda.Event()
    event.record()
    copy(x)
    event.synchronize()
    assert machine.ran[before:] == ["_copy"]
    assert torch.equal(machine.card.now(out), torch.arange(1.0, 65.0))


@case
def memory_that_nobody_has_written_is_poison(machine: Machine, folder: Path) -> None:
    out = copy(torch.empty(64, device="cuda"))
    assert machine.card.values(out).isnan().all()


@case
def a_launch_queued_before_its_memory_is_freed_is_sound(machine: Machine, folder: Path) -> None:
    x = sent(machine, torch.arange(64.0))
    out = copy(x)
    del x
    gc.collect()
    assert torch.equal(machine.card.values(out), torch.arange(64.0))


@case
def freed_memory_in_use_is_an_illegal_address_that_stays(machine: Machine, folder: Path) -> None:
    x = sent(machine, torch.arange(64.0))
    stale = Place.of(x).tensor().as_subclass(OnCard)
    del x
    other = torch.ones(64, device="cuda")
    copy(stale)
    with raising(DeviceFault, "results: CUDA error: an illegal memory access was encountered", "copy ("):  # noqa: SIM117
        with watching("results"):
            torch.cuda.synchronize()
    assert "x_ptr" in str(machine.library.reason())
    with raising(DeviceFault, "copy(", "Triton Error [CUDA]: an illegal memory access was encountered"):
        copy(other)
    with raising(DeviceFault, "CUDA error: an illegal memory access"), watching("memory"):
        torch.cuda.synchronize()


@case
def torch_is_held_to_its_memory_too(machine: Machine, folder: Path) -> None:
    x = sent(machine, torch.arange(64.0))
    stale = Place.of(x).tensor().as_subclass(OnCard)
    del x
    stale + 1.0
    with raising(torch.AcceleratorError, "an illegal memory access was encountered"):
        torch.cuda.synchronize()


@case
def an_index_beyond_the_end_is_an_assert_on_the_device(machine: Machine, folder: Path) -> None:
    x, at = sent(machine, torch.arange(64.0)), sent(machine, torch.tensor([64]))
    x[at]
    with raising(torch.AcceleratorError, "device-side assert triggered"):
        torch.cuda.synchronize()


@case
def a_read_beyond_the_end_is_an_illegal_address(machine: Machine, folder: Path) -> None:
    copy(sent(machine, torch.arange(64.0)), beyond=1)
    with raising(torch.AcceleratorError, "an illegal memory access was encountered"):
        torch.cuda.synchronize()
    assert "reads 1 values" in str(machine.library.reason())


@case
def a_misaligned_address_is_found(machine: Machine, folder: Path) -> None:
    x, out = sent(machine, torch.arange(80.0)), torch.empty(64, device="cuda")
    compiled = COPY.kernel[(1,)](x, out, 64, 0, **COPY.constants, **COPY.options)
    compiled[(1, 1, 1)](x[1:], out, 64, 0, 64)  # as compiled for aligned addresses
    with raising(torch.AcceleratorError, "misaligned address"):
        torch.cuda.synchronize()


@case
def the_hosts_memory_is_refused(machine: Machine, folder: Path) -> None:
    with raising(ValueError, "cannot be accessed from Triton"):
        copy(torch.ones(64))


@case
def a_second_launch_goes_past_the_compiler_and_not_past_the_checks(machine: Machine, folder: Path) -> None:
    x = sent(machine, torch.arange(80.0))
    machine.card.values(copy(x))
    kernel, machine.ran[:] = COPY.kernel, []
    run, kernel.run = kernel.run, None  # a launch that goes there has nothing to call
    try:
        note("here")
        assert torch.equal(machine.card.values(copy(x)), torch.arange(64.0))
        assert kernels_since("here") == "[copy]"
        with raising(ArgumentError, "copy: x_ptr starts 4 bytes past a multiple of 16"):
            copy(x[1:])
        with raising(ArgumentError, "copy: x_ptr has dtype torch.bfloat16, the kernel takes *fp32"):
            launch(COPY, (1,), x_ptr=x.bfloat16(), out_ptr=x, count=64, beyond=0)
        with raising(ArgumentError, "copy: beyond is 2147483648, more than i32 holds"):
            copy(x, beyond=1 << 31)
        with raising(ArgumentError, "copy: out_ptr is on cuda, not on cpu"):
            launch(COPY, (1,), x_ptr=torch.ones(64), out_ptr=x, count=64, beyond=0)
        copy(x, grid=(1, 0))
    finally:
        kernel.run = run
    with raising(KeyError, "aligned"):
        launch(COPY, (1,), x_ptr=x, out_ptr=x, count=64, beyond=0, aligned=True)
    torch.cuda.synchronize()
    assert machine.ran == ["_copy"]


@case
def a_tensor_map_of_a_misaligned_address_is_refused(machine: Machine, folder: Path) -> None:
    x = sent(machine, torch.arange(1024.0).view(32, 32))
    assert torch.equal(machine.card.values(copy_tile(x[4:, 4:])), torch.arange(1024.0).view(32, 32)[4:20, 4:20])
    make = ours._descriptor

    def misaligned(*arguments: Any) -> TensorDescriptor:
        map = make(*arguments)
        map.base = map.base[:, 1:]  # Triton's own class and our launch refuse it earlier
        return map

    ours._descriptor = misaligned
    try:
        with raising(DeviceFault, "copy_tile(", "Failed to create tensor map descriptor: invalid argument"):
            copy_tile(x)
    finally:
        ours._descriptor = make


@case
def a_tensor_map_of_odd_rows_is_refused(machine: Machine, folder: Path) -> None:
    """Sizes as well, and whatever Triton's own class would let through."""
    x, out = sent(machine, torch.arange(1024.0).view(32, 32)), torch.empty(16, 16, device="cuda")
    for strides, shape in (([30, 1], [32, 32]), ([32, 1], [0, 32]), ([1 << 38, 1], [32, 32])):
        map = TensorDescriptor(x, [32, 32], [32, 1], [16, 16])
        map.strides, map.shape = strides, shape
        with raising(RuntimeError, "Triton Error [CUDA]: Failed to create tensor map descriptor: invalid argument"):
            COPY_TILE.kernel[(1,)](map, out, **COPY_TILE.constants, **COPY_TILE.options)


@case
def a_grid_beyond_the_limits_is_refused(machine: Machine, folder: Path) -> None:
    x = sent(machine, torch.arange(64.0))
    with raising(DeviceFault, "grid (1, 65536)", "Triton Error [CUDA]: invalid argument"):
        copy(x, grid=(1, 65536))
    copy(x)  # such an error does not stay
    torch.cuda.synchronize()


@case
def an_error_of_a_launch_is_told_and_stays(machine: Machine, folder: Path) -> None:
    x = sent(machine, torch.arange(64.0))
    machine.library.inject("cuLaunchKernelEx", 1, LAUNCH_FAILED)
    copy(x)
    for _ in range(2):
        with raising(DeviceFault, "Triton Error [CUDA]: unspecified launch failure", "this launch, or one of"):
            copy(x)


@case
def an_error_of_a_kernel_comes_late(machine: Machine, folder: Path) -> None:
    x = sent(machine, torch.arange(64.0))
    machine.library.inject("kernel", 1, ILLEGAL_ADDRESS)
    copy(x)
    copy(x)
    copy(x)
    ran = len(machine.ran)
    with raising(DeviceFault, "step 7: CUDA error: an illegal memory access"), watching("step 7"):
        torch.cuda.synchronize()
    assert len(machine.ran) == ran + 1


@case
def a_full_card_is_no_fault(machine: Machine, folder: Path) -> None:
    x = sent(machine, torch.arange(64.0))
    machine.library.inject("cuLaunchKernelEx", 0, OUT_OF_MEMORY)
    with raising(MemoryError, "Triton Error [CUDA]: out of memory"), watching("step 7"):
        copy(x)
    with raising(MemoryError, "CUDA out of memory"), watching("step 7"):
        torch.empty(1 << 40, device="cuda")
    assert torch.equal(machine.card.values(copy(x)), torch.arange(64.0))


def staged(staging: Staging) -> list[Tensor]:
    """Values that launches found in arrays that were sent one after the other, as a long prompt's chunks are."""
    arrays = [np.full(64, step, np.float32) for step in range(5)]
    return [copy(staging.to_device([array])[0]) for array in arrays]


@case
def staged_arrays_arrive_though_memory_is_used_in_turn(machine: Machine, folder: Path) -> None:
    found = staged(Staging(torch.device("cuda")))
    assert [machine.card.values(there).tolist() for there in found] == [[float(step)] * 64 for step in range(5)]


@case
def staged_memory_that_is_used_again_too_early_is_found(machine: Machine, folder: Path) -> None:
    """A deliberate fault: nobody waits for the copy that still reads the memory."""
    staging = Staging(torch.device("cuda"))
    staging._event = lambda: None  # type: ignore[method-assign]
    staged(staging)
    with raising(DeviceFault, "step 3: CUDA error: device-side assert"), watching("step 3"):
        torch.cuda.synchronize()
    assert "memory was written to while a copy from it could still run" in str(machine.library.reason())


@case
def a_recording_replays_what_was_launched(machine: Machine, folder: Path) -> None:
    x = sent(machine, torch.arange(64.0))
    recordings, graph = Graph.recordings, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = copy(copy(x)) * 2.0
    assert Graph.recordings == recordings + 1
    x += 1.0
    graph.replay()
    assert torch.equal(machine.card.values(out), torch.arange(1.0, 65.0) * 2.0)
    x += 1.0
    graph.replay()
    assert torch.equal(machine.card.values(out), torch.arange(2.0, 66.0) * 2.0)


@case
def a_recording_that_reads_freed_memory_is_found(machine: Machine, folder: Path) -> None:
    x = sent(machine, torch.arange(64.0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copy(x)
    graph.replay()
    torch.cuda.synchronize()
    del x
    graph.replay()
    with raising(torch.AcceleratorError, "an illegal memory access was encountered"):
        torch.cuda.synchronize()


@case
def a_recordings_own_memory_is_nobody_elses(machine: Machine, folder: Path) -> None:
    x = sent(machine, torch.arange(64.0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        between = copy(x)
        stale = Place.of(between).tensor().as_subclass(OnCard)
        copy(between)
        del between
    graph.replay()
    copy(stale)
    with raising(torch.AcceleratorError, "an illegal memory access was encountered"):
        torch.cuda.synchronize()


@case
def nobody_waits_within_a_recording(machine: Machine, folder: Path) -> None:
    x = sent(machine, torch.arange(64.0))
    with raising(torch.AcceleratorError, "failed due to a previous error during capture"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            copy(x)
            with raising(torch.AcceleratorError, "not permitted when stream is capturing"):
                torch.cuda.synchronize()


@case
def parameters_are_held_to_the_machine_code(machine: Machine, folder: Path) -> None:
    """The launcher of another signature: a number where the code has an address."""
    x, out = sent(machine, torch.arange(64.0)), torch.empty(64, device="cuda")
    compiled = COPY.kernel[(1,)](x, out, 64, 0, **COPY.constants, **COPY.options)
    source = machine.sources[compiled.function]
    signature, names = dict(source.signature), list(source.signature)
    source.signature.clear()
    source.signature.update({name: "i32" if name == names[1] else kind for name, kind in signature.items()})
    try:
        with raising(torch.AcceleratorError, "unspecified launch failure"):
            torch.cuda.synchronize()
    finally:
        source.signature.update(signature)
    assert "out_ptr is a parameter of 4 bytes, the machine code has one of 8" in str(machine.library.reason())


def main(folder: str) -> int:
    """Run them all."""
    found: dict[str, str] = {}
    with on_card() as machine, torch_cuda(machine.card):
        for name, function in CASES.items():
            machine.library.failures.clear()
            try:
                function(machine, Path(folder))
                found[name] = ""
            except BaseException:
                reason = machine.library.reason()
                found[name] = traceback.format_exc() + (f"\nthe card: {reason}" if reason else "")
            machine.library.raw("standin_reset")
    print(json.dumps(found))
    return 0
