"""Cards as their maker describes them. No msgspec: see __init__.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DataSheet:
    """A card: bytes a second from memory; dense operations a second of the tensor cores; bytes of memory.

    The sizes below those are Hopper's: streaming multiprocessors (data sheet of the SXM cards), and of each of them
    (CUDA programming guide, technical specifications and arithmetic instructions of compute capability 9.0):
    registers, bytes of shared memory and what each program takes besides its own, warps and programs that are
    resident, schedulers (an instruction a clock each), results a clock of an integer or logic operation and of a
    conversion, products a clock of the tensor cores in bf16 (in FP8 twice as many: the data sheet's rates).
    """

    name: str
    bytes_per_s: float
    bf16: float
    fp8: float
    memory_bytes: int
    multiprocessors: int = 132
    registers: int = 65_536
    shared_bytes: int = 228 << 10
    program_shared_bytes: int = 1 << 10
    warps: int = 64
    programs: int = 32
    schedulers: int = 4
    integers: int = 64
    conversions: int = 16
    products: int = 2048

    @property
    def clock(self) -> float:
        """Clocks a second at which the data sheet's rates are reached: 1.83e9."""
        return self.bf16 / (2 * self.products * self.multiprocessors)


DATA_SHEETS = {
    "h100": DataSheet("H100 SXM", 3.35e12, 989.5e12, 1979e12, 80_000_000_000),
    "h200": DataSheet("H200", 4.8e12, 989.5e12, 1979e12, 141_000_000_000),
}
