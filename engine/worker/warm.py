"""Warming up, on a GPU and before a server is ready: kernels are compiled and loaded, decode steps recorded. No
step does any of it then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from tqdm import tqdm

from cierzo.engine.config import EngineConfig
from cierzo.engine.environment import cache_dir
from cierzo.engine.worker.launches import Launches, launches
from cierzo.kernels.cuda.launch.launcher import backend
from cierzo.kernels.fault import watching
from cierzo.kernels.formats.number_formats import NUMBER_FORMATS
from cierzo.kernels.ops.block import DecoderWeights
from cierzo.kernels.triton import compile as compiling
from cierzo.kernels.triton import widths


class Compilation:
    """All kernels that a server of this configuration can launch, while they are compiled: beside whatever their
    caller does, such as loading weights. Plain torch's operations meta tensors tell nothing: where some are asked
    for, kernels are compiled as they are launched.

    A progress bar appears on a terminal if it takes more than two seconds.
    """

    def __init__(self, config: EngineConfig, weights: Callable[[], DecoderWeights]) -> None:
        """weights: the model's, or such as them on meta tensors (launches.py)."""
        self._found: Launches | None = None
        if "torch" in config.kernels.implementations.values():
            return
        self._device = torch.device(config.device)
        with watching("compiling"):
            widths.settle(formats(config), self._device)
            self._found = launches(config, weights())
            self._missing = compiling.missing(self._found.configurations)
        thread = ThreadPoolExecutor(1)
        self._compiled: Future[float] = thread.submit(self._compile)
        thread.shutdown(wait=False)

    def _compile(self) -> float:
        assert self._found is not None
        start, (major, minor) = time.perf_counter(), torch.cuda.get_device_capability(self._device)
        backend().prepare(self._found.kernels, self._device, cache_dir() / "cuda")
        with bar("compiling kernels", len(self._missing)) as done:
            compiling.compile_all(self._missing, 10 * major + minor, done)
        return time.perf_counter() - start

    def finish(self) -> str:
        """Wait, and load the kernels; says in a line what was done.

        Raises CompileError, LaunchError, DeviceFault.
        """
        if self._found is None:
            return "kernels compiled as they are launched: some operations are plain torch's"
        with watching("compiling"):
            seconds = self._compiled.result()
            for configuration in self._found.configurations:
                compiling.load(configuration)
        return f"{len(self._found.configurations) + len(self._found.kernels)} kernels compiled in {seconds:.1f} s"


def formats(config: EngineConfig) -> list[tuple[str, str]]:
    """Formats of weights and of the activations that they meet, where those are in 16 bits or fewer."""
    weights_in = NUMBER_FORMATS[config.weights]
    products = (weights_in.name, weights_in.of("linear", "cuda", "bf16"))
    return [*((one, config.activations) for one in products), (config.head, "bf16"), ("bf16", "bf16")]


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
