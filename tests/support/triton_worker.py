"""What tests ask of Triton's compiler, which is not there where its interpreter is: prints JSON.

triton_worker.py compile NAME...    each named configuration, compiled for sm_90
triton_worker.py bind               each configuration's difference from what Triton's launcher would compile
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

import cierzo.kernels.triton as package
from cierzo.kernels.triton.compile import compile_ahead, source
from cierzo.kernels.triton.launch import POINTER, Configuration

DTYPES = {pointer: dtype for dtype, pointer in POINTER.items()}


def configurations() -> dict[str, Configuration]:
    """Those of every module of the package, as "module: name"."""
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, configuration in getattr(module, "configurations", dict)():
            found[f"{info.name}: {name}"] = configuration
    return found


def difference(configuration: Configuration) -> str:
    """Empty if the launcher, given tensors and an integer that it would like to specialise, compiles the same."""
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
    """See the module."""
    known = configurations()
    result: dict[str, Any]
    if command == "compile":
        result = {name: dataclasses.asdict(compile_ahead(known[name])) for name in names}
    else:
        result = {name: difference(configuration) for name, configuration in known.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
