"""What is measured, of which models in which number formats, and what is hoped for."""

from __future__ import annotations

from typing import Literal

import msgspec

K = 1024
LIMIT_S = 0.050  # of the median time per output token, at the concurrency that is searched for
MODELS = ("small4", "small3")
Profile = Literal["throughput", "latency"]  # of those of engine/profiles.py


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """A closed loop of `concurrency` clients; None: as many as give the most requests per second within `LIMIT_S`.

    profile: of the engine. A throughput cell is judged by requests per second, a latency one by completion time.
    """

    name: str
    profile: Profile
    input_tokens: int
    output_tokens: int
    concurrency: int | None = None

    @property
    def tokens(self) -> int:
        """Of one request."""
        return self.input_tokens + self.output_tokens

    @property
    def is_throughput(self) -> bool:
        """Whether requests per second are what counts."""
        return self.profile == "throughput"

    def describe(self) -> str:
        """In words."""
        clients = "concurrency searched for" if self.concurrency is None else f"{self.concurrency:,} concurrent"
        return f"{self.profile}, {self.input_tokens:,} tokens in, {self.output_tokens:,} out, {clients}"


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """A model with its weights and KV cache in these number formats. NVFP4: experts in 4 bits, the rest in FP8.
    activations: what weights are multiplied with, "fp8" on a card's FP8 units."""

    model: str
    weights: str
    kv_dtype: str
    activations: str = "bf16"

    def __str__(self) -> str:
        product = self.weights if self.activations == "bf16" else f"{self.weights} x {self.activations}"
        return f"{self.model} {product}, KV {self.kv_dtype}"


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """Of the ratio of one cell's figures, Small 4's over Small 3's: requests per second, or completion times."""

    cell: str
    small4: Subject
    small3: Subject
    at_least: float | None = None
    at_most: float | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Cells, subjects in the order in which they alternate, the pairs that are compared, and the goals."""

    cells: tuple[Cell, ...]
    subjects: tuple[Subject, ...]
    pairs: tuple[tuple[Subject, Subject], ...]
    goals: tuple[Goal, ...]
    goals_are_for: str


def _throughput(input_tokens: int, output_tokens: int, concurrency: int | None = None) -> Cell:
    name = f"{_short(input_tokens)}/{_short(output_tokens)}"
    return Cell(
        name=name if concurrency is None else f"{name}@{concurrency}",
        profile="throughput",
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        concurrency=concurrency,
    )


def _latency(input_tokens: int, output_tokens: int, concurrency: int) -> Cell:
    return Cell(
        name=f"{_short(input_tokens)}/{_short(output_tokens)}@{concurrency}",
        profile="latency",
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        concurrency=concurrency,
    )


def _short(tokens: int) -> str:
    return f"{tokens // K}k" if tokens % K == 0 else str(tokens)


_FOUR_BITS = Subject(model="small4", weights="nvfp4", kv_dtype="fp8")
_SMALL4_FP8 = Subject(model="small4", weights="fp8", kv_dtype="fp8")
_SMALL3_BF16 = Subject(model="small3", weights="bf16", kv_dtype="fp8")
_SMALL3_FP8 = Subject(model="small3", weights="fp8", kv_dtype="fp8")
_SMALL4_BY_FP8 = Subject(model="small4", weights="fp8", kv_dtype="fp8", activations="fp8")
_SMALL3_BY_FP8 = Subject(model="small3", weights="fp8", kv_dtype="fp8", activations="fp8")
_SMALL3_BF16_KV = Subject(model="small3", weights="bf16", kv_dtype="bf16")


def gpu_plan(*, miniature: bool = False) -> Plan:
    """Of a card, or of several."""
    subjects: tuple[Subject, ...] = (
        *(_FOUR_BITS, _SMALL3_BF16, _SMALL4_FP8, _SMALL3_FP8, _SMALL4_BY_FP8, _SMALL3_BY_FP8, _SMALL3_BF16_KV),
    )
    small3 = [subject for subject in subjects if subject.model == "small3"]
    cells: tuple[Cell, ...] = (
        *(_throughput(*sizes) for sizes in ((2 * K, 2 * K), (8 * K, K), (K, 256), (32 * K, K))),
        *(_latency(K, K, concurrency) for concurrency in (1, 2, 4, 8, 32)),
        *(_latency(32 * K, K, concurrency) for concurrency in (1, 4, 16)),
    )
    goals = [
        *(
            Goal(cell="2k/2k", small4=_FOUR_BITS, small3=other, at_least=3.0)
            for other in (_SMALL3_BF16, _SMALL3_BF16_KV, _SMALL3_FP8, _SMALL3_BY_FP8)
        ),
        *(
            Goal(cell="8k/1k", small4=_FOUR_BITS, small3=other, at_least=3.0)
            for other in (_SMALL3_BF16, _SMALL3_BF16_KV)
        ),
        *(
            Goal(cell=cell, small4=_FOUR_BITS, small3=other, at_most=0.60)
            for cell in ("1k/1k@1", "1k/1k@2", "1k/1k@4", "32k/1k@1", "32k/1k@4", "32k/1k@16")
            for other in (_SMALL3_BF16, _SMALL3_FP8, _SMALL3_BY_FP8)
        ),
    ]
    if miniature:
        cells = (_throughput(2 * K, 16), _latency(64, 16, 2))
        subjects = (_FOUR_BITS, _SMALL3_BF16)
        small3 = [_SMALL3_BF16]
        goals = [
            Goal(cell="2k/16", small4=_FOUR_BITS, small3=_SMALL3_BF16, at_least=3.0),
            Goal(cell="64/16@2", small4=_FOUR_BITS, small3=_SMALL3_BF16, at_most=0.60),
        ]
    return Plan(
        cells=cells,
        subjects=subjects,
        pairs=tuple((one, other) for one in subjects if one.model == "small4" for other in small3),
        goals=tuple(goals),
        goals_are_for="one H200",
    )


def cpu_plan(*, miniature: bool = False) -> Plan:
    """Of a CPU: the pair in miniature proportions, bf16 first; int8 for both beside it."""
    pairs = tuple(
        (
            Subject(model="small4", weights=weights, kv_dtype="bf16"),
            Subject(model="small3", weights=weights, kv_dtype="bf16"),
        )
        for weights in (("bf16",) if miniature else ("bf16", "int8"))
    )
    cells: tuple[Cell, ...] = (_throughput(512, 64, 32), _latency(K, 256, 1), _latency(K, 256, 2))
    if miniature:
        cells = (_throughput(32, 8, 4), _latency(32, 8, 1))
    small4, small3 = pairs[0]
    goals = [
        Goal(cell=cell.name, small4=small4, small3=small3, at_least=2.2)
        if cell.is_throughput
        else Goal(cell=cell.name, small4=small4, small3=small3, at_most=0.60)
        for cell in cells
    ]
    return Plan(
        cells=cells,
        subjects=tuple(subject for pair in pairs for subject in pair),
        pairs=pairs,
        goals=tuple(goals),
        goals_are_for="small4-mini and small3-mini in bf16 on two cores",
    )
