"""CUDA errors, by the names of the kernels that may have caused them. No torch here.

A CUDA error comes late: a launch returns before its kernel runs, so an error that a launch or a synchronisation
reports may be that of any launch before it. And it stays: after an illegal address every later call of the process
fails too. So launches are noted as they go, an error tells which they were, and whoever gets a DeviceFault must not
go on in this process.

    with watching("step 7"):        # around whatever may meet the device
        note("rms_norm")            # before each launch
        ...
    DeviceFault: step 7: CUDA error: an illegal memory access was encountered; one of the last 3 launches:
    sample_peaks (1), rms_norm (2)
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

MOST_NOTED = 2048  # more than the two steps launch that may run before their error is told
# Beginnings of errors: of torch and of cuBLAS through it, of Triton's launcher, of CuPy (driver and runtime).
_BEGINNINGS = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]", "CUDA_ERROR_", "cudaError")
_OUT_OF_MEMORY = "out of memory"  # in the text of each of them


class DeviceFault(RuntimeError):
    """A CUDA error: this process can use its device no more. The message names what was launched."""


_noted: deque[str] = deque(maxlen=MOST_NOTED)
note = _noted.append  # of a name; a launch pays for no more than this


def is_device_error(error: BaseException) -> bool:
    """Whether torch, Triton or CuPy reports a CUDA error with it. Out of memory is none: the device lives on."""
    return _is_of_cuda(error) and not _is_out_of_memory(error)


def _is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or (_is_of_cuda(error) and _OUT_OF_MEMORY in str(error))


def _is_of_cuda(error: BaseException) -> bool:
    return type(error).__name__ == "AcceleratorError" or str(error).startswith(_BEGINNINGS)


def launched() -> str:
    """The last launches, kernel by kernel with their numbers, the latest first."""
    names = Counter(name.lstrip("_") for name in reversed(_noted))
    kernels = ", ".join(f"{name} ({count})" for name, count in names.items())
    return f"one of the last {len(_noted)} launches: {kernels or 'none of ours'}"


def kernels_since(mark: str) -> str:
    """The kernels launched since `mark` was noted, each once; "[rms_norm, linear]"."""
    names: list[str] = []
    for name in reversed(_noted):
        if name == mark:
            break
        names.append(name.lstrip("_"))
    return f"[{', '.join(dict.fromkeys(reversed(names)))}]"


def described(name: str, arguments: Mapping[str, Any]) -> str:
    """A launch as a call: tensors by dtype, shape and address, other values as they are."""
    return f"{name}({', '.join(f'{key}={shown(value)}' for key, value in arguments.items())})"


def shown(value: Any) -> str:
    """An argument in short."""
    if hasattr(value, "data_ptr"):
        return f"{value.dtype} {list(value.shape)} at {value.data_ptr():#x}"
    return str(value)


def fault_of(launch: str, error: BaseException) -> DeviceFault:
    """The fault that an error at a launch means: of this launch, if not of an earlier one."""
    return DeviceFault(f"{launch}: {_in_short(error)}; this launch, or {launched()}")


@contextmanager
def watching(doing: str) -> Iterator[None]:
    """CUDA errors from within become DeviceFaults, and a device that is out of memory a MemoryError.

    The latter is not the fault of what happened to run: it is told as memory of the host is, with torch's numbers.
    """
    try:
        yield
    except DeviceFault:
        raise
    except RuntimeError as error:
        if _is_out_of_memory(error):
            raise MemoryError(f"{doing}: {_in_short(error)}") from error
        if is_device_error(error):
            raise DeviceFault(f"{doing}: {_in_short(error)}; {launched()}") from error
        raise


def _in_short(error: BaseException) -> str:
    """The first line: torch adds several of advice."""
    return str(error).partition("\n")[0]
