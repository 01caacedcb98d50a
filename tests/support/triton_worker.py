"""Answers of Triton's compiler to tests, which have its interpreter in their own process: prints JSON.

triton_worker.py compile NAME...   the configurations of these names, compiled for sm_90 on all cores: the fields of
                                   Compiled, and their line of the report
triton_worker.py bind              each configuration's difference from what Triton's launcher would compile
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from cierzo.bench.gpu import ceilings
from cierzo.bench.gpu.compiled import compile_all
from cierzo.bench.gpu.configurations import configurations
from cierzo.kernels.triton.compile import source
from cierzo.kernels.triton.launch import POINTER, Configuration

DTYPES = {pointer: dtype for dtype, pointer in POINTER.items()}


def difference(configuration: Configuration) -> str:
    """Difference from what the launcher compiles for tensors and an integer that it would like to specialise; ""
    if there is none."""
    kernel, ahead = configuration.kernel, source(configuration)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    values: dict[str, Any] = {}
    for name, kind in configuration.types.items():
        if kind.startswith("*"):
            values[name] = torch.empty(64, dtype=DTYPES[kind])
            if name in configuration.blocks:
                block = list(configuration.blocks[name])
                values[name] = TensorDescriptor.from_tensor(torch.empty(256, 256, dtype=DTYPES[kind]), block)
        else:
            values[name] = 0.5 if kind.startswith("fp") else 16 if kind == "i32" else 1 << 40
    bound, specialisation, options = binder(**values, **configuration.constants, **configuration.options)
    keywords = configuration.options
    _, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialisation, options)
    derived = {path: found for path, found in attributes.items() if found}  # the launcher lists the others too
    pairs = {
        "signature": (ahead.signature, signature),
        "constants": (ahead.constants, constants),
        "attributes": (ahead.attrs, derived),
    }
    found = [f"{what}: {a} is not {b}" for what, (a, b) in pairs.items() if a != b]
    return "; ".join(found)


def main(command: str, *names: str) -> None:
    """Run a command; see the module."""
    result: dict[str, Any] = {}
    if command == "bind":
        result = {name: difference(configuration) for name, configuration in configurations().items()}
    else:
        for name, configuration, compiled, error in compile_all(90, names):
            if compiled is None:
                raise SystemExit(f"{name}: {error}")
            result[name] = dataclasses.asdict(compiled) | {"line": ceilings.entry(configuration, compiled)}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
