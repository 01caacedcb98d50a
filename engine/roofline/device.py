"""A device as the roofline sees it: what it can do at most, and which share of that kernels reach.

Named ones are data sheets with stated shares: `h100`, `h200`, and several of one kind, as in `4xh100`. A file (JSON
of a `Device`) describes any other, the CPU of this machine too (`python -m cierzo.bench.calibrate`).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from cierzo.engine.errors import ConfigError

Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[
    float, Meta(gt=0, le=4)
]  # above 1: of a ceiling that was read at a bad moment of a shared machine
Rate = Literal["fp32", "bf16", "fp8", "int8"]
Kind = Literal["memory", "experts", "products", "attention"]
Number = float | NDArray[np.float64]  # of one step, or of several
GB = 1e9


class MeasuredShare(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call of an operation that takes `limit_s` at the device's ceilings reaches `share` of them."""

    limit_s: Positive
    share: Share


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One card, or `cards` equal ones that serve one model together.

    Rates are those of one card: bytes per second from memory, operations per second by the number format that is
    multiplied (a multiplication and an addition are two). `stated` holds a share of the limit by kind of operation:
    "memory" for all that waits for memory, "experts", "products", "attention" for what waits for arithmetic.
    `measured` holds shares found at several sizes of an operation, ascending; they take the stated ones' place.
    `step_overhead_s` passes in each step whatever it computes, `row_overhead_s` for each sequence in it.

    Several cards: weights are divided (experts and dense products), attention and its cache by sequences, so that
    each latent lies on one card; two exchanges a layer carry every row's hidden state over `link_bytes_per_s`.
    """

    name: str
    source: str
    bytes_per_s: Positive
    operations_per_s: dict[Rate, Positive]
    memory_bytes: Annotated[int, Meta(ge=1)]
    cards: Annotated[int, Meta(ge=1)] = 1
    kind: Literal["cuda", "cpu"] = "cuda"
    link_bytes_per_s: Annotated[float, Meta(ge=0)] = 0.0
    stated: dict[Kind, Share]
    measured: dict[str, list[MeasuredShare]] = {}
    step_overhead_s: Annotated[float, Meta(ge=0)] = 0.0
    row_overhead_s: Annotated[float, Meta(ge=0)] = 0.0

    @property
    def total_memory_bytes(self) -> int:
        """Of all cards."""
        return self.cards * self.memory_bytes

    def measured_share(self, operation: str, limit_s: Number) -> Number | None:
        """The share found for calls of this size: linear in log(limit_s) between two, the nearest outside them.
        None for an operation that was not measured."""
        found = self.measured.get(operation)
        if not found:
            return None
        sizes, shares = [math.log(point.limit_s) for point in found], [point.share for point in found]
        return np.interp(np.log(np.maximum(limit_s, 1e-12)), sizes, shares)

    def describe(self) -> str:
        """One line: limits, and where the shares come from."""
        rates = ", ".join(f"{rate / 1e12:,.4g} TFLOP/s {name}" for name, rate in self.operations_per_s.items())
        shares = f"{len(self.measured)} operations measured" if self.measured else "shares stated, not measured"
        cards = f"{self.cards} cards of " if self.cards > 1 else ""
        memory = f"{self.bytes_per_s / GB:,.4g} GB/s, {rates}, {self.memory_bytes / GB:,.0f} GB"
        return f"{self.name}: {cards}{memory}; {shares}"


# What to plan with: four fifths of the memory's rate (the best published decode kernels reach 85 to 89 % on these
# cards); of the arithmetic 40 % in grouped products, 60 % in dense ones and attention (their best published rows:
# 60 to 78 %); launches and host 1.0 ms a step, 1.8 with exchanges between cards.
STATED: dict[Kind, float] = {"memory": 0.8, "experts": 0.4, "products": 0.6, "attention": 0.6}
ONE_CARD_OVERHEAD_S, CARDS_OVERHEAD_S = 1.0e-3, 1.8e-3
NVLINK_BYTES_PER_S = 450e9  # 900 GB/s both ways
HOPPER_RATES: dict[Rate, float] = {"bf16": 989.5e12, "fp8": 1979e12}
DATA_SHEETS = {"h100": (3.35e12, 80_000_000_000), "h200": (4.8e12, 141_000_000_000)}
_NAMED = re.compile(rf"(?:([1-9]\d*)x)?({'|'.join(DATA_SHEETS)})")


def named(name: str) -> Device | None:
    """A card of the data sheets, or several, as `4xh100`; None for another name."""
    match = _NAMED.fullmatch(name)
    if match is None:
        return None
    cards, card = int(match[1] or 1), match[2]
    bytes_per_s, memory_bytes = DATA_SHEETS[card]
    return Device(
        name=name,
        source=f"data sheet of the {card.upper()} SXM; shares stated in engine/roofline/device.py",
        bytes_per_s=bytes_per_s,
        operations_per_s=HOPPER_RATES,
        memory_bytes=memory_bytes,
        cards=cards,
        link_bytes_per_s=NVLINK_BYTES_PER_S if cards > 1 else 0.0,
        stated=STATED,
        step_overhead_s=ONE_CARD_OVERHEAD_S if cards == 1 else CARDS_OVERHEAD_S,
    )


def find_device(name: str) -> Device:
    """A named device, or the one in a file. Raises ConfigError for an unknown name and for a malformed file."""
    found = named(name)
    if found is not None:
        return found
    path = Path(name)
    if not path.is_file():
        limit = f"{', '.join(DATA_SHEETS)}, several as in 4xh100, or a JSON file"
        raise ConfigError(f"device {name!r}: must be {limit}", field="device", limit=limit, value=name)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Device)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"device file {name}: {error}", field="device", value=name) from error
