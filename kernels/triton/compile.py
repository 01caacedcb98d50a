"""Compilation ahead of a launch, for any GPU and without one.

Everything goes through Triton's own way to a launch (JITFunction.run), with stand-ins for the driver and for the
tensors: a key of its cache that was made in another way would be another key sooner or later. `compile_all` does it
in processes side by side, which know no GPU: a process that asks a driver costs the card half a gigabyte.

    python -m cierzo.kernels.triton.compile 90      one of them: Configurations come, pickled; a line of JSON goes
                                                    for each, {"error": ""} or the compiler's words
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from queue import Empty, SimpleQueue
from subprocess import PIPE, Popen
from typing import IO, Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime.cache import FileCacheManager
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from cierzo.kernels.triton.launch import POINTER, Configuration, take_digests

WARP_THREADS = 32
MOST_PROCESSES = 16  # of half a gigabyte of memory each; Small 4 has less than a hundred configurations
DTYPES = {pointer: dtype for dtype, pointer in POINTER.items()}


class CompileError(RuntimeError):
    """A kernel does not compile; the message names it, with the compiler's words."""


class _Ended(CompileError):
    """The process that compiled it ended: whoever is short of memory may have killed it."""


class _Missing(Exception):
    """Something is not in Triton's cache."""


class _Ahead:
    """In the place of Triton's driver: a card of a compute capability, for which there is nothing but code."""

    launcher_cls = CudaLauncher

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, WARP_THREADS)

    def get_current_device(self) -> str:
        """A name that no real device has: a kernel keeps what it compiled by device."""
        return f"ahead of sm_{self._target.arch}"

    def get_current_stream(self, device: str) -> int:
        """None is used."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """The card."""
        return self._target

    @cached_property
    def utils(self) -> Any:
        """Triton's own C code, compiled once for all launchers of Triton 3.9; it links to libcuda."""
        return CudaUtils()


@contextmanager
def _ahead(capability: int) -> Iterator[None]:
    before = driver._active
    driver.set_active(_Ahead(capability))
    try:
        yield
    finally:
        driver.set_active(before)


def compile_ahead(configuration: Configuration, capability: int = 90) -> Any:
    """Triton's compiled kernel, for compute capability 9.0 (H100, H200) by default; also put into Triton's cache on
    disk, where a launch of the same configuration finds it. Raises what the compiler raises."""
    with _ahead(capability):
        return warmed(configuration)


def compile_launcher(configuration: Configuration, capability: int = 90) -> None:
    """`compile_ahead`, and the C function that Triton calls to launch it: 3.6 compiles one for each signature.

    Needs a C compiler and libcuda, but no GPU. Raises what the compilers raise."""
    with _ahead(capability):
        _with_launcher(configuration)


def load(configuration: Configuration) -> None:
    """Load a kernel and its launcher for the current GPU: a launch then finds them in memory."""
    warmed(configuration).run  # noqa: B018 (a property that loads)


def missing(configurations: Sequence[Configuration]) -> list[Configuration]:
    """Configurations that a launch on the current GPU would not find in Triton's cache, launchers in C included.

    Nothing is compiled, in no thread of this process, until it returns.
    """
    present: Any = knobs.cache.manager_class or FileCacheManager

    class Present(present):
        """A cache into which nothing comes."""

        def get_file(self, filename: str) -> str:
            return self._found(super().get_file(filename))

        def get_group(self, filename: str) -> dict[str, str]:
            return self._found(super().get_group(filename))

        def put(self, *_: Any, **__: Any) -> Any:
            raise _Missing

        def _found(self, value: Any) -> Any:
            if value is None:
                raise _Missing
            return value

    found = []
    with knobs.cache.scope():
        knobs.cache.manager_class = Present
        for configuration in configurations:
            try:
                _with_launcher(configuration)
            except _Missing:
                found.append(configuration)
    return found


def compile_all(
    configurations: Sequence[Configuration], capability: int, done: Callable[[], object] = lambda: None
) -> None:
    """compile_launcher of all, in processes side by side. done: called after each, in any thread.

    Where a process ends, the others go on, and what it has left is compiled by one more, alone. Raises CompileError
    after the first that fails.
    """
    waiting: SimpleQueue[Configuration] = SimpleQueue()
    ended: list[Configuration] = []  # with their process
    for configuration in configurations:
        waiting.put(configuration)

    def work(alone: bool) -> None:
        environment = ("env", "-u", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES=")
        command = [*environment, sys.executable, "-m", __name__, str(capability)]
        with Popen(command, bufsize=0, stdin=PIPE, stdout=PIPE) as process:
            try:
                while True:
                    configuration = waiting.get_nowait()
                    _ask(process, configuration)
                    done()
            except Empty:
                return
            except _Ended:
                if alone:
                    raise
                ended.append(configuration)
            except BaseException:
                while not waiting.empty():  # the others need not go on
                    waiting.get_nowait()
                raise

    count = min(len(configurations), MOST_PROCESSES, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(max(1, count)) as threads:
        for working in [threads.submit(work, False) for _ in range(count)]:
            working.result()
    for configuration in ended:
        waiting.put(configuration)
    if not waiting.empty():
        work(alone=True)


def _ask(process: Popen[bytes], configuration: Configuration) -> None:
    """Have a process compile a configuration."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(pickle.dumps(configuration))
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = b""
    if not answer:
        raise _Ended(f"{configuration.name}: its compiler ended with status {process.wait()}")
    if error := json.loads(answer)["error"]:
        raise CompileError(f"{configuration.name} {dict(configuration.constants)}: {error}")


def warmed(configuration: Configuration) -> Any:
    """Have Triton compile, or find in a cache, what a launch on the active driver's device wants."""
    take_digests()
    arguments = {name: _argument(configuration, name, kind) for name, kind in configuration.types.items()}
    return configuration.kernel.warmup(grid=(1,), **arguments, **configuration.constants, **configuration.options)


def _with_launcher(configuration: Configuration) -> None:
    compiled = warmed(configuration)
    CudaLauncher(compiled.src, compiled.metadata)


def _argument(configuration: Configuration, name: str, kind: str) -> Any:
    """A value that a launch could pass. Of a number it counts only what holds it: none is specialised."""
    if not kind.startswith("*"):
        return 0.5 if kind.startswith("fp") else 1 << 20
    if name in configuration.blocks:
        rows, columns = configuration.blocks[name]
        tensor = torch.empty(rows, columns, dtype=DTYPES[kind], device="meta")
        return TensorDescriptor.from_tensor(tensor, [rows, columns])
    return torch.empty(1, dtype=DTYPES[kind], device="meta")  # at address 0, which is aligned


def _serve(capability: int, asked: IO[bytes], answers: IO[str]) -> None:
    while True:
        try:
            configuration = pickle.load(asked)
        except EOFError:
            return
        error = ""
        try:
            compile_launcher(configuration, capability)
        except Exception as found:  # whatever a compiler says goes to who has asked
            error = f"{type(found).__name__}: {found.__cause__ or found}"
        print(json.dumps({"error": error}), file=answers, flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is no answer
    _serve(int(sys.argv[1]), sys.stdin.buffer, answers)
