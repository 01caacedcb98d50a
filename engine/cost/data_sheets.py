"""Cards as their maker describes them. No msgspec: see __init__.py."""

from __future__ import annotations

from dataclasses import dataclass

from cierzo.engine.cost.operations import Work


@dataclass(frozen=True, slots=True)
class DataSheet:
    """A card: bytes a second from memory; dense operations a second of the tensor cores; bytes of memory."""

    name: str
    bytes_per_s: float
    bf16: float
    fp8: float
    memory_bytes: int

    def limit_s(self, work: Work, fp8: bool) -> tuple[float, str]:
        """The least time that work takes, and which limit says so. fp8: whether its products' operands are."""
        memory_s = float(work.num_bytes) / self.bytes_per_s
        arithmetic_s = float(work.operations) / (self.fp8 if fp8 else self.bf16)
        return max((memory_s, "memory"), (arithmetic_s, "arithmetic"))


DATA_SHEETS = {
    "h100": DataSheet("H100 SXM", 3.35e12, 989.5e12, 1979e12, 80_000_000_000),
    "h200": DataSheet("H200", 4.8e12, 989.5e12, 1979e12, 141_000_000_000),
}
