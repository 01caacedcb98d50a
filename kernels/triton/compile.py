"""Compilation ahead of a launch, for any GPU and without one."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cierzo.kernels.triton.launch import ALIGNMENT, Configuration

WARP_THREADS = 32


def compile_ahead(configuration: Configuration, capability: int = 90) -> Any:
    """Triton's compiled kernel, for compute capability 9.0 (H100, H200) by default; also put into Triton's cache on
    disk, where a launch of the same configuration finds it. Raises what the compiler raises."""
    target = GPUTarget("cuda", capability, WARP_THREADS)
    return triton.compile(source(configuration), target=target, options=configuration.options)


def source(configuration: Configuration) -> ASTSource:
    """The source, signature and attributes that Triton's launcher would compile for a launch (a test compares)."""
    kernel = configuration.kernel
    names = list(kernel.arg_names)
    signature = {name: configuration.signature.get(name, "constexpr") for name in names}
    missing = [name for name in names if signature[name] == "constexpr" and name not in configuration.constants]
    if missing:
        raise ValueError(f"{configuration.name}: neither types nor constants name {', '.join(missing)}")
    attributes = {
        (index,): [["tt.divisibility", ALIGNMENT]]
        for index, name in enumerate(names)
        if signature[name].startswith("*")
    }
    return ASTSource(kernel, signature, dict(configuration.constants), attributes)
