"""What the machine can do, measured at the start of every round: a shared host's bandwidth drifts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from cierzo.bench.machine import Ceilings
from cierzo.bench.peers.process import run_tool
from cierzo.bench.stats import median

MEASURE = (
    "import msgspec; from cierzo.bench.machine import measure_ceilings; "
    "print(msgspec.json.encode(measure_ceilings()).decode())"
)


class Limits(msgspec.Struct, frozen=True):
    """Of all threads together, in 1e9 a second: bytes read, operations of a product in bf16 and in int8."""

    read_gb_per_s: float
    bf16_gop_per_s: float
    int8_gop_per_s: float


def measure(folder: Path) -> Ceilings:
    """`bench.machine.measure_ceilings`, from a process of its own. Raises EngineFailed."""
    output, _ = run_tool([sys.executable, "-c", MEASURE], folder / "logs" / "ceilings.log")
    return msgspec.json.decode(output, type=Ceilings)


def limits(measured: Sequence[Any]) -> Limits | None:
    """The median over rounds of each ceiling (as builtins); None where there are none.

    Where nothing measures int8 products, the bf16 rate stands for theirs.
    """
    each = [msgspec.convert(raw, Ceilings) for raw in measured]
    if not each:
        return None
    return Limits(
        read_gb_per_s=median([one.read.rate for one in each]),
        bf16_gop_per_s=median([one.bf16.rate for one in each]),
        int8_gop_per_s=median([(one.int8 or one.bf16).rate for one in each]),
    )
