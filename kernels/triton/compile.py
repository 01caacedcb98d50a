"""Compilation ahead of time, on machines without a GPU: a configuration -> a cubin and what is known of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from subprocess import run
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cierzo.kernels.triton.launch import ALIGNMENT, Configuration

WARP_THREADS = 32
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Compiled:
    """registers: of a thread. spill_bytes: local memory of a thread. shared_bytes: of a program.

    instructions: how often each machine instruction stands in the code, with its modifiers ("LDG.E.128").
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]

    def count(self, prefix: str) -> int:
        """Instructions that begin so: "HGMMA", "LDGSTS"."""
        return sum(number for name, number in self.instructions.items() if name.startswith(prefix))


def source(configuration: Configuration) -> ASTSource:
    """What Triton's own launcher would compile for these arguments (tests compare)."""
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


def compile_ahead(configuration: Configuration, capability: int = 90) -> Compiled:
    """For compute capability 9.0 (H100, H200) unless another is given. Raises what the compiler raises."""
    target = GPUTarget("cuda", capability, WARP_THREADS)
    compiled = triton.compile(source(configuration), target=target, options=configuration.options)
    return inspect_cubin(compiled.asm["cubin"], compiled.metadata.shared)


def inspect_cubin(cubin: bytes, shared_bytes: int) -> Compiled:
    """Registers and spills, and the instructions, as the disassembler of Triton's own wheel has them."""
    usage = _tool("cuobjdump", "-res-usage", cubin)
    sass = _tool("nvdisasm", "-c", cubin)
    found: dict[str, int] = {}
    for match in re.finditer(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", sass, re.MULTILINE):
        found[match[1]] = found.get(match[1], 0) + 1
    return Compiled(_field(usage, "REG"), _field(usage, "STACK") + _field(usage, "LOCAL"), shared_bytes, found)


def _field(usage: str, name: str) -> int:
    match = re.search(rf"\b{name}:(\d+)", usage)
    if match is None:
        raise ValueError(f"cuobjdump gives no {name}: {usage[:200]}")
    return int(match[1])


def _tool(name: str, option: str, cubin: bytes) -> str:
    from tempfile import NamedTemporaryFile

    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command: list[Any] = [_BINARIES / name, option, file.name]
        return run(command, check=True, capture_output=True, text=True).stdout
