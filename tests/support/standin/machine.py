"""torch.cuda, as far as the engine uses it, on the stand-in's streams, events and recordings."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import nan
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from cuda_on_cpu import CpuBackend

from cierzo.kernels.cuda.launch.kernel import Kernel
from standin.library import ARENA_BYTES, NOT_READY, IllegalAddress
from standin.memory import Stream, StreamedCard, undisturbed


class Event:
    """In the place of torch.cuda.Event."""

    def __init__(self, stream: Stream, *, enable_timing: bool = False, **_: Any) -> None:
        self._stream, self._timed = stream, enable_timing
        self._reached_s = nan
        self.handle = stream.library.made("cuEventCreate", 0)

    def record(self) -> None:
        """Behind all that was queued."""
        if self._timed:
            self._stream.enqueue(self._reached)
        self._stream.library.call("cuEventRecord", self.handle, self._stream.handle)

    def _reached(self) -> None:
        self._reached_s = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this one to another, as the interpreter took them."""
        return (end._reached_s - self._reached_s) * 1e3

    def synchronize(self) -> None:
        """Wait."""
        self._stream.library.call("cuEventSynchronize", self.handle)

    def query(self) -> bool:
        """Whether it has been reached."""
        return self._stream.library.raw("cuEventQuery", self.handle) != NOT_READY


class CudaStream:
    """In the place of torch.cuda.Stream."""

    def __init__(self, library: Any, handle: int | None = None) -> None:
        self._library = library
        self.cuda_stream: int = library.made("cuStreamCreate", 0) if handle is None else handle

    def wait_stream(self, other: CudaStream) -> None:
        """Let what is queued here from now on wait for what is queued there."""
        event = self._library.made("cuEventCreate", 0)
        self._library.call("cuEventRecord", event, other.cuda_stream)
        self._library.call("cuStreamWaitEvent", self.cuda_stream, event, 0)


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    recordings = replays = 0

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._ready = 0

    def capture_end(self, handle: int) -> None:
        """Keep as this graph what was recorded on a stream."""
        graph = ctypes.c_uint64()
        self._stream.library.call("cuStreamEndCapture", handle, ctypes.byref(graph))
        self._ready = self._stream.library.made("cuGraphInstantiateWithFlags", graph.value, 0)
        Graph.recordings += 1

    def replay(self) -> None:
        """Queue it."""
        Graph.replays += 1
        self._stream.library.call("cuGraphLaunch", self._ready, self._stream.handle)


class Backend(CpuBackend):
    """CUDA C++ kernels, queued; their pointers are checked as a launch's are."""

    device_type = "cuda"

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def run(
        self,
        kernel: Kernel,
        device: torch.device,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        values: Sequence[np.generic],
    ) -> None:
        """See cuda.launch.launcher.Backend."""
        host, run = torch.device("cpu"), super().run

        def compute() -> None:
            for (name, kind), value in zip(kernel.types.items(), values, strict=True):
                if kind.startswith("*") and int(value) and not self._stream.library.extent(int(value)):
                    raise IllegalAddress(f"{kernel.name}: {name} is {int(value):#x}, nobody's memory")
            run(kernel, host, grid, threads, shared_bytes, values)

        self._stream.enqueue(undisturbed(compute))


def replacements(card: StreamedCard) -> dict[str, Any]:
    """By name, what stands in for attributes of torch.cuda."""
    current, library = card.stream, card.stream.library

    @contextmanager
    def switched(other: CudaStream) -> Iterator[None]:
        before, current.handle = current.handle, other.cuda_stream
        try:
            yield
        finally:
            current.handle = before

    @contextmanager
    def graph(made: Graph, pool: Any = None, stream: CudaStream | None = None) -> Iterator[None]:
        library.call("cuCtxSynchronize")  # as torch's does
        with card.serving(), switched(stream or CudaStream(library)):
            library.call("cuStreamBeginCapture_v2", current.handle, 0)
            current.recording = True
            try:
                yield
            finally:
                current.recording = False
                made.capture_end(current.handle)

    return {
        "Event": lambda **options: Event(current, **options),
        "Stream": lambda *_, **__: CudaStream(library),
        "CUDAGraph": lambda: Graph(current),
        "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
        "stream": switched,
        "current_stream": lambda device=None: CudaStream(library, current.handle),
        "synchronize": lambda device=None: library.call("cuCtxSynchronize"),
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="stand-in", major=9, minor=0, multi_processor_count=132, total_memory=ARENA_BYTES
        ),
    }


@contextmanager
def torch_cuda(card: StreamedCard) -> Iterator[None]:
    """Let torch.cuda be the stand-in's."""
    found = replacements(card)
    before = {name: getattr(torch.cuda, name) for name in found}
    for name, value in found.items():
        setattr(torch.cuda, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(torch.cuda, name, value)
