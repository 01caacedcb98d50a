"""A device: what it can do at most, and which share of that kernels reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, get_args

import msgspec
from msgspec import Meta

if TYPE_CHECKING:  # a server's settings hold a Device, and a server starts without numpy
    import numpy as np
    from numpy.typing import NDArray

Positive = Annotated[float, Meta(gt=0)]
PerSecond = Annotated[float, Meta(ge=1)]
LEAST_SHARE, MOST_SHARE = 1e-6, 4
Share = Annotated[
    float, Meta(ge=LEAST_SHARE, le=MOST_SHARE)
]  # above 1 where a ceiling was read at a bad moment of the machine
Rate = Literal["fp32", "bf16", "fp8", "int8"]
Kind = Literal["memory", "experts", "products", "attention"]
Number: TypeAlias = "float | NDArray[np.float64]"  # of one step, or of several


class Curve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An operation as it was predicted at several sizes, by a call's seconds at the device's rates, in order:
    seconds of a call, the roof that limits them (roofs.py), kernels that it launches."""

    limits_s: list[Positive]
    seconds: list[Positive]
    roofs: list[str]
    launches: list[int]

    def __post_init__(self) -> None:
        """Raise ValueError for what is no curve."""
        sizes = self.limits_s
        if len(sizes) < 2 or sizes != sorted({*sizes}):
            raise ValueError("limits_s: there must be two sizes or more, each above the one before")
        if {len(self.seconds), len(self.roofs), len(self.launches)} != {len(sizes)}:
            raise ValueError("seconds, roofs, launches: there must be as many as limits_s")

    def seconds_of(self, limit_s: Number) -> Number:
        """Seconds of calls of a size: between two sizes by a straight line in logarithms; a smaller call takes as
        long as the smallest, a larger one as much longer than the largest as it is larger."""
        import numpy as np

        least, *_, most = self.limits_s
        places, place = np.log(self.limits_s), np.log(np.clip(limit_s, least, most))
        return np.exp(np.interp(place, places, np.log(self.seconds))) * np.maximum(limit_s / most, 1.0)

    def measured(self, found: Mapping[float, float]) -> Curve:
        """The curve as measured, at some sizes: between those, and beyond, it is wrong by as much as there. found:
        seconds by size."""
        import numpy as np

        sizes = sorted(found)
        ratios = [np.log(found[size] / self.seconds_of(size)) for size in sizes]
        wrong = np.exp(np.interp(np.log(self.limits_s), np.log(sizes), ratios))
        return msgspec.structs.replace(self, seconds=(np.array(self.seconds) * wrong).tolist())


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A card, or `cards` equal ones that serve one model together.

    Rates are those of one card: bytes per second from memory, operations per second by the number format that is
    multiplied (a multiplication and an addition are two). `stated` holds a share of the limit by kind of operation:
    "memory" for all that waits for memory, "experts", "products", "attention" for what waits for arithmetic.
    `measured` holds the shares found at several sizes of an operation, by a call's seconds at the device's rates;
    they take the stated ones' place. Its names are an operation's, or an operation's and the number format of its
    weights or pages ("linear fp8"). `predicted` is what machine code and launches let expect, corrected by what was
    measured, by the same names and by those of one model's width ("linear fp8, 4096 wide"); `predicted_from` says
    whose code. A device needs stated shares where it has no predicted ones.
    `step_overhead_s` passes in each step whatever it computes, `row_overhead_s` for each sequence in it. The host
    takes `launch_s` for each launch of a step that is not replayed, while the device computes.
    `calibration`: of a machine on which one checkpoint was measured, the conditions by name; its shares hold for
    nothing else.

    Several cards divide experts and dense products, and attention by sequences; two exchanges a layer carry every
    row's hidden state over `link_bytes_per_s`.
    """

    name: str
    source: str
    bytes_per_s: PerSecond
    operations_per_s: dict[Rate, PerSecond]
    memory_bytes: Annotated[int, Meta(ge=1)]
    cards: Annotated[int, Meta(ge=1)] = 1
    kind: Literal["cuda", "cpu"] = "cuda"
    link_bytes_per_s: Annotated[float, Meta(ge=0)] = 0.0
    stated: dict[Kind, Share] = {}
    measured: dict[str, dict[Positive, Share]] = {}
    predicted: dict[str, Curve] = {}
    predicted_from: str = ""
    launch_s: Annotated[float, Meta(ge=0)] = 0.0
    step_overhead_s: Annotated[float, Meta(ge=0)] = 0.0
    row_overhead_s: Annotated[float, Meta(ge=0)] = 0.0
    calibration: dict[str, str | int] = {}

    def __post_init__(self) -> None:
        """Raise ValueError for a device without what every step needs."""
        kinds = set() if self.predicted else {*get_args(Kind)}
        if missing := kinds - {*self.stated} | {"bf16"} - {*self.operations_per_s}:
            raise ValueError(f"stated, operations_per_s: there must be {', '.join(sorted(missing))}")
        if self.cards > 1 > self.link_bytes_per_s:
            raise ValueError(f"link_bytes_per_s must be at least 1 for {self.cards} cards")

    def measured_share(self, operation: str, format: str, limit_s: Number) -> Number | None:
        """Share that was found for calls of this size: linear in log(limit_s) between two, the nearest outside.
        None for an operation that was not measured, in this number format or whatever format."""
        import numpy as np

        found = self.measured.get(f"{operation} {format}") or self.measured.get(operation)
        if not found:
            return None
        sizes = sorted(found)
        return np.interp(np.log(np.maximum(limit_s, 1e-12)), np.log(sizes), [found[size] for size in sizes])

    def curve(self, operation: str, format: str, width: int) -> Curve | None:
        """The prediction for an operation in a model of this width, or in any."""
        name = f"{operation} {format}"
        return self.predicted.get(f"{name}, {width} wide") or self.predicted.get(name)

    @property
    def shares(self) -> str:
        """Where the shares come from, in a word or a few."""
        words = ["measured"] * bool(self.measured) + [f"predicted from {self.predicted_from}"] * bool(
            self.predicted
        )
        return ", else ".join(words) or "stated"

    def describe(self) -> str:
        """Tell limits, and where the shares come from, in a line."""
        rates = ", ".join(f"{rate / 1e12:,.4g} TFLOP/s {name}" for name, rate in self.operations_per_s.items())
        cards = f"{self.cards} cards of " if self.cards > 1 else ""
        memory = f"{self.bytes_per_s / 1e9:,.4g} GB/s, {rates}, {self.memory_bytes / 1e9:,.0f} GB"
        return f"{self.name}: {cards}{memory}; shares {self.shares}"
