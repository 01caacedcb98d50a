"""Backend of a GPU: NVRTC compiles the sources, CuPy launches kernels on torch's current stream.

CuPy's own compiler would add -ftz=true, which takes subnormal logits and weights of experts for zero, and tests
could not compile with the options that serve. So NVRTC is called through CuPy's binding.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cierzo.kernels.cuda.launch.kernel import Kernel, LaunchError, options, program
from cierzo.kernels.fault import DeviceFault, is_device_error
from cierzo.kernels.registry import KernelChoiceError

INSTALL = "pip install 'cierzo[cuda]'"


def missing() -> str:
    """Reason why the CUDA kernels cannot run here; "" if they can."""
    if not torch.cuda.is_available():
        return "torch finds no GPU, or was built without CUDA"
    try:
        importlib.import_module("cupy")
    except ImportError as error:
        return f"CuPy cannot be imported ({error}): {INSTALL}"
    return ""


def require() -> None:
    """Raise KernelChoiceError, with what is missing and how to get it, if the CUDA kernels cannot run."""
    reason = missing()
    if reason:
        raise KernelChoiceError(f"the CUDA kernels cannot run: {reason}")


class CupyBackend:
    """CuPy as a backend: a source is compiled and loaded ahead (`prepare`), or at the first launch of one of its
    kernels on a device, and kept."""

    device_type = "cuda"

    def __init__(self) -> None:
        require()
        self._cupy: Any = importlib.import_module("cupy")
        self._nvrtc: Any = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
        self._modules: dict[tuple[str, int], Any] = {}
        self._functions: dict[tuple[str, int], Any] = {}
        # CuPy's objects for a device and one of its streams
        self._places: dict[tuple[int, int], tuple[Any, Any]] = {}

    def run(
        self,
        kernel: Kernel,
        device: torch.device,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        values: Sequence[np.generic],
    ) -> None:
        """See Backend."""
        index = torch.cuda.current_device() if device.index is None else device.index
        try:
            place, stream = self._place(index, _stream_of(index))
            with place, stream:
                self._function(kernel, index)(grid, (threads, 1, 1), tuple(values), shared_mem=shared_bytes)
        except (self._cupy.cuda.driver.CUDADriverError, self._cupy.cuda.runtime.CUDARuntimeError) as error:
            if not is_device_error(error):
                raise
            raise DeviceFault(str(error)) from error

    def prepare(self, kernels: Sequence[Kernel], device: torch.device, folder: Path) -> None:
        """See Backend."""
        index = torch.cuda.current_device() if device.index is None else device.index
        wanted = {kernel.source for kernel in kernels}
        sources = sorted(source for source in wanted if (source, index) not in self._modules)
        with ThreadPoolExecutor(max(1, len(sources))) as threads:  # NVRTC lets go of Python's lock
            cubins = [*threads.map(lambda source: self._kept_cubin(source, index, folder), sources)]
        with self._cupy.cuda.Device(index):
            for source, cubin in zip(sources, cubins, strict=True):
                self._load(source, index, cubin)
            for kernel in kernels:
                self._function(kernel, index)

    def _place(self, index: int, stream: int) -> tuple[Any, Any]:
        key = (index, stream)
        if key not in self._places:
            self._places[key] = self._cupy.cuda.Device(index), self._cupy.cuda.ExternalStream(stream, index)
        return self._places[key]

    def _function(self, kernel: Kernel, index: int) -> Any:
        key, at = (kernel.name, index), (kernel.source, index)
        if key not in self._functions:
            if at not in self._modules:
                self._load(*at, self._cubin(*at))
            self._functions[key] = self._modules[at].get_function(kernel.name)
        return self._functions[key]

    def _load(self, source: str, index: int, cubin: bytes) -> None:
        module = self._cupy.cuda.function.Module()
        module.load(cubin)
        self._modules[source, index] = module

    def _kept_cubin(self, source: str, index: int, folder: Path) -> bytes:
        """Machine code from the folder, or compiled and put there, under a name that all it depends on makes."""
        made_of = program(source), options(_architecture(index)), self._nvrtc.getVersion()
        path = folder / f"{Path(source).stem}-{hashlib.sha256(repr(made_of).encode()).hexdigest()}.cubin"
        if path.exists():
            return path.read_bytes()
        cubin = self._cubin(source, index)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(cubin)
        unfinished.replace(path)
        return cubin

    def _cubin(self, source: str, index: int) -> bytes:
        """Machine code of a source for a device. Raises LaunchError with the compiler's words."""
        made = self._nvrtc.createProgram(program(source), source, (), ())
        try:
            self._nvrtc.compileProgram(made, options(_architecture(index)))
            cubin: bytes = self._nvrtc.getCUBIN(made)
        except self._nvrtc.NVRTCError as error:
            raise LaunchError(f"NVRTC: {error}: {self._nvrtc.getProgramLog(made)}") from error
        finally:
            self._nvrtc.destroyProgram(made)
        return cubin


def _stream_of(index: int) -> int:
    """Handle of torch's current stream, as Triton asks for it: without a Stream object, which takes longer."""
    found = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return int(torch.cuda.current_stream(index).cuda_stream if found is None else found(index))


def _architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
