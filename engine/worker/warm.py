"""Warming up, on a GPU and before a server is ready: kernels are compiled and loaded, decode steps recorded. No
step does any of it then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

from cierzo.engine.config import EngineConfig, cache_dir
from cierzo.engine.worker import launches
from cierzo.kernels.cuda.launch.launcher import backend
from cierzo.kernels.fault import watching
from cierzo.kernels.ops.block import DecoderWeights
from cierzo.kernels.triton import compile as compiling


def compile_kernels(config: EngineConfig, weights: DecoderWeights) -> str:
    """Compile all kernels that a server of this configuration can launch, and load them; says in a line what was
    done. Nothing where plain torch is asked for, which meta tensors tell nothing.

    A progress bar appears on a terminal if it takes more than two seconds. Raises CompileError, LaunchError,
    DeviceFault.
    """
    if "torch" in config.kernels.implementations.values():
        return "kernels compiled as they are launched: some operations are plain torch's"
    start, device = time.perf_counter(), torch.device(config.device)
    with watching("compiling"):
        found = launches.launches(config, weights)
        major, minor = torch.cuda.get_device_capability(device)
        backend().prepare(found.kernels, device, cache_dir() / "cuda")
        with bar("compiling kernels", len(found.configurations)) as done:
            compiling.compile_all(found.configurations, 10 * major + minor, done)
        for configuration in found.configurations:
            compiling.load(configuration)
    number = len(found.configurations) + len(found.kernels)
    return f"{number} kernels compiled in {time.perf_counter() - start:.1f} s"


def record_steps(record: Callable[[Callable[[], None]], None], number: int) -> str:
    """Have steps recorded; says in a line what was done. Raises what recording raises."""
    start = time.perf_counter()
    with watching("recording"), bar("recording steps", number) as done:
        record(done)
    return f"{number} steps recorded in {time.perf_counter() - start:.1f} s"


@contextmanager
def bar(doing: str, number: int) -> Iterator[Callable[[], None]]:
    """A progress bar of so many things; the function is called after each."""
    with tqdm(desc=doing, total=number, delay=2.0, disable=None, leave=False) as found:

        def done() -> None:
            found.update()

        yield done
