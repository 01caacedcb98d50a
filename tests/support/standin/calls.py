"""The driver's calls, made directly: what each refuses, and what memory and events then are. Run by launches.py."""

from __future__ import annotations

import ctypes
import gc
import struct
from pathlib import Path

import torch

from standin.cases import COPY, case, copy, raising, sent
from standin.driver import Machine
from standin.library import NOT_READY, SUCCESS
from standin.memory import Place


@case
def a_block_beyond_the_limits_is_refused(machine: Machine, folder: Path) -> None:
    """Threads beyond those that the code is for, and shared memory beyond what was asked for, or can be."""
    x, out = sent(machine, torch.arange(64.0)), torch.empty(64, device="cuda")
    function = COPY.kernel[(1,)](x, out, 64, 0, **COPY.constants, **COPY.options).function
    values = [ctypes.c_uint64(x.data_ptr()), ctypes.c_uint64(out.data_ptr()), *map(ctypes.c_int32, (64, 0))]
    values += [ctypes.c_uint64(), ctypes.c_uint64()]
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))

    def launch_with(threads: int, shared: int, grid: tuple[int, int, int] = (1, 1, 1)) -> None:
        machine.library.call("cuLaunchKernel", function, *grid, threads, 1, 1, shared, 0, pointers, 0)

    launch_with(32, 48 << 10)
    for threads, shared in ((64, 0), (0, 0), (32, (48 << 10) + 1)):
        with raising(torch.AcceleratorError, "invalid argument"):
            launch_with(threads, shared)
    for grid in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (1 << 31, 1, 1), (1, 65536, 1), (1, 1, 65536)):
        with raising(torch.AcceleratorError, "invalid argument"):
            launch_with(32, 0, grid)
    machine.library.call("cuFuncSetAttribute", function, 8, 227 << 10)
    launch_with(32, 227 << 10)
    with raising(torch.AcceleratorError, "invalid argument"):
        machine.library.call("cuFuncSetAttribute", function, 8, (227 << 10) + 1)
    assert torch.equal(machine.card.values(out), torch.arange(64.0))


@case
def a_block_with_more_registers_than_there_are_is_refused(machine: Machine, folder: Path) -> None:
    """As of code for any number of threads: Triton's is for those of its launch, and made to fit."""
    x, out = sent(machine, torch.arange(64.0)), torch.empty(64, device="cuda")
    compiled = COPY.kernel[(1,)](x, out, 64, 0, **COPY.constants, **COPY.options)
    image = bytearray(compiled.asm["cubin"])
    for kind in (b"\x04\x05\x0c\x00", b"\x04\x10\x0c\x00"):  # most threads, and those that a launch must have
        image = image.replace(kind + struct.pack("<III", 32, 1, 1), kind + struct.pack("<III", 1024, 1, 1))
    (sections,), (size, count) = struct.unpack_from("<Q", image, 0x28), struct.unpack_from("<HH", image, 0x3A)
    code = [at for at in range(sections, sections + size * count, size) if image[at + 8] & 4]  # what is executed

    def launch_with(registers: int) -> None:
        for at in code:
            image[at + 47] = registers
        module = machine.library.made("cuModuleLoadData", bytes(image))
        function = machine.library.made("cuModuleGetFunction", module, compiled.metadata.name.encode())
        machine.sources[function] = compiled.src
        values = [ctypes.c_uint64(x.data_ptr()), ctypes.c_uint64(out.data_ptr()), *map(ctypes.c_int32, (64, 0))]
        values += [ctypes.c_uint64(), ctypes.c_uint64()]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        machine.library.call("cuLaunchKernel", function, 1, 1, 1, 1024, 1, 1, 0, 0, pointers, 0)

    launch_with(64)
    with raising(torch.AcceleratorError, "too many resources requested for launch"):
        launch_with(65)


@case
def released_memory_is_poison_when_its_turn_has_come(machine: Machine, folder: Path) -> None:
    x = sent(machine, torch.arange(64.0))
    stale = Place.of(x).tensor()
    del x
    gc.collect()
    assert torch.equal(machine.card.now(stale), torch.arange(64.0))
    torch.cuda.synchronize()
    assert machine.card.now(stale).isnan().all()


@case
def memory_is_released_once_and_whole(machine: Machine, folder: Path) -> None:
    address = machine.library.made("cuMemAllocAsync", 64, 0)
    for wrong in (address + 32, address + (1 << 30)):
        with raising(torch.AcceleratorError, "invalid argument"):
            machine.library.call("cuMemFreeAsync", wrong, 0)
    machine.library.call("cuMemFreeAsync", address, 0)
    torch.cuda.synchronize()
    with raising(torch.AcceleratorError, "invalid argument"):
        machine.library.call("cuMemFreeAsync", address, 0)


@case
def memory_ends_at_its_limit(machine: Machine, folder: Path) -> None:
    unused, total = ctypes.c_uint64(), ctypes.c_uint64()
    torch.cuda.synchronize()
    machine.library.call("cuMemGetInfo_v2", ctypes.byref(unused), ctypes.byref(total))
    machine.library.raw("standin_limit", total.value - unused.value + 4096)
    try:
        addresses = [machine.library.made("cuMemAllocAsync", 2048, 0) for _ in range(2)]
        with raising(torch.OutOfMemoryError, "out of memory"):
            machine.library.made("cuMemAllocAsync", 1, 0)
        for address in addresses:
            machine.library.call("cuMemFreeAsync", address, 0)
        torch.cuda.synchronize()
        machine.library.call("cuMemFreeAsync", machine.library.made("cuMemAllocAsync", 4096, 0), 0)
    finally:
        machine.library.raw("standin_limit", total.value)


@case
def an_event_is_ready_when_the_work_before_it_has_run(machine: Machine, folder: Path) -> None:
    copy(sent(machine, torch.arange(64.0)))
    event = machine.library.made("cuEventCreate", 0)
    machine.library.call("cuEventRecord", event, 0)
    assert machine.library.raw("cuEventQuery", event) == NOT_READY
    machine.library.call("cuEventSynchronize", event)
    assert machine.library.raw("cuEventQuery", event) == SUCCESS


@case
def a_timed_event_is_reached_when_the_work_before_it_has_run(machine: Machine, folder: Path) -> None:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    copy(sent(machine, torch.arange(64.0)))
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) > 0


@case
def what_torch_composes_waits_its_turn_in_inference_mode_too(machine: Machine, folder: Path) -> None:
    """A conversion may be a view there, and comes undivided: it is none of what has not been computed yet."""
    x = sent(machine, torch.arange(64.0))
    with torch.inference_mode():
        wide = copy(x).double()
    assert torch.equal(machine.card.values(wide), torch.arange(64.0).double())


@case
def a_recorded_event_is_not_waited_for(machine: Machine, folder: Path) -> None:
    stream, event = (machine.library.made(name, 0) for name in ("cuStreamCreate", "cuEventCreate"))
    machine.library.call("cuStreamBeginCapture_v2", stream, 0)
    machine.library.call("cuEventRecord", event, stream)
    with raising(torch.AcceleratorError, "not permitted on an event last recorded in a capturing stream"):
        machine.library.call("cuEventSynchronize", event)
    with raising(torch.AcceleratorError, "failed due to a previous error during capture"):
        machine.library.call("cuStreamEndCapture", stream, ctypes.byref(ctypes.c_uint64()))


@case
def the_legacy_stream_is_not_recorded(machine: Machine, folder: Path) -> None:
    with raising(torch.AcceleratorError, "not permitted when stream is capturing"):
        machine.library.call("cuStreamBeginCapture_v2", 0, 0)


@case
def a_tensor_map_of_a_wrong_block_is_refused(machine: Machine, folder: Path) -> None:
    """Rows of a block that are no multiple of 16 bytes, or wider than their swizzle (1 to 3: 32, 64, 128 bytes)."""
    x, memory = sent(machine, torch.arange(4096.0).view(64, 64)), ctypes.create_string_buffer(192)
    map, float32 = -(-ctypes.addressof(memory) // 64) * 64, 7
    dims, strides, steps = (ctypes.c_uint64 * 2)(64, 64), (ctypes.c_uint64 * 1)(256), (ctypes.c_uint32 * 2)(1, 1)

    def encode(columns: int, swizzle: int) -> None:
        box, where = (ctypes.c_uint32 * 2)(columns, 8), x.data_ptr()
        options = dims, strides, box, steps, 0, swizzle, 0, 0
        machine.library.call("cuTensorMapEncodeTiled", map, float32, 2, where, *options)

    for columns, swizzle in ((4, 0), (64, 0), (8, 1), (16, 2), (32, 3)):
        encode(columns, swizzle)
    for columns, swizzle in ((2, 0), (5, 0), (12, 1), (20, 2), (36, 3)):
        with raising(torch.AcceleratorError, "invalid argument"):
            encode(columns, swizzle)
