"""Registers, memory and instructions of a compiled kernel, by the disassembler in Triton's wheel."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from subprocess import run
from tempfile import NamedTemporaryFile

import triton

from cierzo.kernels.triton.compile import compile_ahead
from cierzo.kernels.triton.launch import Configuration

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Compiled:
    """Registers and spill bytes of a thread, shared bytes of a program.

    instructions: how often each machine instruction occurs in the code, with its modifiers ("LDG.E.128").
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]

    def count(self, prefix: str) -> int:
        """Number of instructions whose name begins with `prefix`, such as "HGMMA" or "LDGSTS"."""
        return sum(number for name, number in self.instructions.items() if name.startswith(prefix))


def inspect(configuration: Configuration, capability: int = 90) -> Compiled:
    """Compile for a compute capability, and read the machine code. Raises what the compiler raises."""
    compiled = compile_ahead(configuration, capability)
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)
    found: dict[str, int] = {}
    for match in re.finditer(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", sass, re.MULTILINE):
        found[match[1]] = found.get(match[1], 0) + 1
    spill_bytes = _field(usage, "STACK") + _field(usage, "LOCAL")
    return Compiled(_field(usage, "REG"), spill_bytes, compiled.metadata.shared, found)


def _field(usage: str, name: str) -> int:
    match = re.search(rf"\b{name}:(\d+)", usage)
    if match is None:
        raise ValueError(f"cuobjdump gives no {name}: {usage[:200]}")
    return int(match[1])


def _tool(name: str, option: str, path: str) -> str:
    return run([_BINARIES / name, option, path], check=True, capture_output=True, text=True).stdout
