"""Answers of Triton's compiler to tests, which have its interpreter in their own process: prints JSON.

triton_worker.py compile NAME...   the configurations of these names, compiled for sm_90 on all cores: their lines
                                   of the report, and all instructions
triton_worker.py bind              each configuration's difference from what Triton's launcher would compile
triton_worker.py warm NAME...      the configurations of these names are compiled in processes; how many were
triton_worker.py missing NAME...   those that a launch would not find
triton_worker.py launch NAME...    for each, whether a launch finds it in the cache, and its launcher
"""

from __future__ import annotations

import json
import sys
from functools import cached_property
from subprocess import CalledProcessError
from typing import Any

import torch
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.compiler import ASTSource, get_cache_key, make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from cierzo.bench.gpu import ceilings
from cierzo.bench.gpu.compiled import compile_all, faults
from cierzo.bench.gpu.configurations import configurations
from cierzo.kernels.triton import compile as compiling
from cierzo.kernels.triton.launch import POINTER, Configuration, take_digests

DTYPES = {pointer: dtype for dtype, pointer in POINTER.items()}


class Launching:
    """In the place of Triton's driver, as if there were an sm_90: launches get as far as the kernel's code."""

    launcher_cls = CudaLauncher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @cached_property
    def utils(self) -> Any:
        return CudaUtils()


def launched(configuration: Configuration) -> Any:
    """Kernel that Triton has for a launch with tensors, and integers that it would like to specialise."""
    values: dict[str, Any] = {}
    for name, kind in configuration.types.items():
        if kind.startswith("*"):
            values[name] = torch.empty(64, dtype=DTYPES[kind])
            if name in configuration.blocks:
                block = list(configuration.blocks[name])
                values[name] = TensorDescriptor.from_tensor(torch.empty(256, 256, dtype=DTYPES[kind]), block)
        else:
            values[name] = 0.5 if kind.startswith("fp") else 16
    driver.set_active(Launching())  # type: ignore[arg-type]
    take_digests()  # as `launch` does
    return configuration.kernel.run(
        grid=(1,), warmup=True, **values, **configuration.constants, **configuration.options
    )


def difference(configuration: Configuration) -> str:
    """Difference from what a launch compiles: its key in memory, its source's hash, its key on disk; "" if none."""
    asked: list[tuple[str, ...]] = []

    def noted(
        kernel: JITFunction,
        key: str,
        signature: Any,
        device: Any,
        constants: Any,
        options: Any,
        attributes: Any,
        warmup: bool,
    ) -> None:
        source = ASTSource(kernel, signature, constants, attributes)
        backend = make_backend(GPUTarget("cuda", 90, 32))
        asked.append(
            (key, source.hash(), get_cache_key(source, backend, options, get_cache_invalidating_env_vars()))
        )

    before = JITFunction._do_compile
    JITFunction._do_compile = noted  # type: ignore[method-assign]
    try:
        for ask in (compiling.compile_ahead, launched):
            ask(configuration)
    finally:
        JITFunction._do_compile = before  # type: ignore[method-assign]
    ahead, behind = asked
    return "" if ahead == behind else f"{ahead} is not {behind}"


def from_the_cache(configuration: Configuration) -> dict[str, Any]:
    """Tell of each kernel that a launch asks for, whether Triton had it; and whether its launcher is there, or a C
    compiler that makes it."""
    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    compiled = launched(configuration)
    try:
        CudaLauncher(compiled.src, compiled.metadata)
    except CalledProcessError:
        return {"hits": hits, "launcher": False}
    return {"hits": hits, "launcher": True}


def main(command: str, *names: str) -> None:
    """Run a command; see the module."""
    result: dict[str, Any] = {}
    if command == "warm":
        done: list[None] = []
        compiling.compile_all([configurations()[name] for name in names], 90, lambda: done.append(None))
        result = {"done": len(done)}
    if command == "missing":
        driver.set_active(Launching())  # type: ignore[arg-type]
        asked = {name: configurations()[name] for name in names}
        missing = compiling.missing([*asked.values()])
        assert knobs.cache.manager_class is None
        result = {"missing": [name for name, configuration in asked.items() if configuration in missing]}
    if command == "bind":
        result = {name: difference(configuration) for name, configuration in configurations().items()}
    if command == "launch":
        result = {name: from_the_cache(configurations()[name]) for name in names}
    if command == "compile":
        for name, configuration, compiled, error in compile_all(names):
            if compiled is None:
                raise SystemExit(f"{name}: {error}")
            told = {"instructions": compiled.turn.everything, "faults": faults(configuration, compiled)}
            result[name] = {**told, **ceilings.entry(configuration, compiled)}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
