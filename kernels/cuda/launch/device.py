"""Backend of a GPU: CuPy compiles the sources and launches kernels on torch's current stream."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cierzo.kernels.cuda.launch.kernel import OPTIONS, Kernel, LaunchError, program
from cierzo.kernels.fault import DeviceFault
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
    """CuPy as a backend: compiles a source at its first launch on a device, and keeps it (CuPy's cache, on
    disk)."""

    device_type = "cuda"

    def __init__(self) -> None:
        require()
        self._cupy: Any = importlib.import_module("cupy")
        self._functions: dict[tuple[str, int], Any] = {}

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
        stream = torch.cuda.current_stream(index).cuda_stream
        try:
            with self._cupy.cuda.Device(index), self._cupy.cuda.ExternalStream(stream, index):
                self._function(kernel, index)(grid, (threads, 1, 1), tuple(values), shared_mem=shared_bytes)
        except (self._cupy.cuda.driver.CUDADriverError, self._cupy.cuda.runtime.CUDARuntimeError) as error:
            raise DeviceFault(str(error)) from error
        except self._cupy.cuda.compiler.CompileException as error:
            raise LaunchError(f"NVRTC: {error}") from error

    def _function(self, kernel: Kernel, index: int) -> Any:
        key = (kernel.name, index)
        if key not in self._functions:
            module = self._cupy.RawModule(code=program(kernel.source), options=OPTIONS, backend="nvrtc")
            self._functions[key] = module.get_function(kernel.name)
        return self._functions[key]
