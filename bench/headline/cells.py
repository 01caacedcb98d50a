"""What is measured, of which models in which number formats, and what is hoped for."""

from __future__ import annotations

from typing import Literal

import msgspec

from cierzo.bench.campaign.outcome import Goal

K = 1024
LIMIT_S = 0.050  # of the median time per output token, at the concurrency that is searched for
MODELS = ("small4", "small3")
Profile = Literal["throughput", "latency"]  # of those of engine/profiles.py


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """A closed loop of `concurrency` clients; None: as many as give the most requests per second within `LIMIT_S`.

    profile: the engine's. A throughput cell is judged by requests per second, a latency one by completion time.
    """

    name: str
    profile: Profile
    input_tokens: int
    output_tokens: int
    concurrency: int | None = None

    @property
    def tokens(self) -> int:
        """Input and output of one request."""
        return self.input_tokens + self.output_tokens

    @property
    def is_throughput(self) -> bool:
        """Whether requests per second are what counts."""
        return self.profile == "throughput"

    def __str__(self) -> str:
        clients = "concurrency searched for" if self.concurrency is None else f"{self.concurrency:,} concurrent"
        return (
            f"{self.name}: {self.profile}, {self.input_tokens:,} tokens in, {self.output_tokens:,} out, {clients}"
        )


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


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Cells, subjects in the order in which they alternate, the pairs that are compared, and the goals: bounds on
    Small 4's requests per second, or completion time, over Small 3's."""

    cells: tuple[Cell, ...]
    subjects: tuple[Subject, ...]
    pairs: tuple[tuple[Subject, Subject], ...]
    goals: tuple[Goal[Subject], ...]
    goals_are_for: str


def _cell(profile: Profile, input_tokens: int, output_tokens: int, concurrency: int | None = None) -> Cell:
    clients = "" if concurrency is None else f"@{concurrency}"
    return Cell(
        name=f"{_short(input_tokens)}/{_short(output_tokens)}{clients}",
        profile=profile,
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
    """Cells, subjects and goals of a card, or of several."""
    subjects: tuple[Subject, ...] = (
        *(_FOUR_BITS, _SMALL3_BF16, _SMALL4_FP8, _SMALL3_FP8, _SMALL4_BY_FP8, _SMALL3_BY_FP8, _SMALL3_BF16_KV),
    )
    cells: tuple[Cell, ...] = (
        *(_cell("throughput", *sizes) for sizes in ((2 * K, 2 * K), (8 * K, K), (K, 256), (32 * K, K))),
        *(_cell("latency", K, K, concurrency) for concurrency in (1, 2, 4, 8, 32)),
        *(_cell("latency", 32 * K, K, concurrency) for concurrency in (1, 4, 16)),
    )
    quick_cells = ("1k/1k@1", "1k/1k@2", "1k/1k@4", "32k/1k@1", "32k/1k@4", "32k/1k@16")
    goals: tuple[Goal[Subject], ...] = (
        *(_at_least(3.0, "2k/2k", other) for other in (_SMALL3_BF16, _SMALL3_BF16_KV, _SMALL3_FP8, _SMALL3_BY_FP8)),
        *(_at_least(3.0, "8k/1k", other) for other in (_SMALL3_BF16, _SMALL3_BF16_KV)),
        *(
            Goal(cell=cell, ours=_FOUR_BITS, against=other, at_most=0.60)
            for cell in quick_cells
            for other in (_SMALL3_BF16, _SMALL3_FP8, _SMALL3_BY_FP8)
        ),
    )
    if miniature:
        cells = (_cell("throughput", 2 * K, 16), _cell("latency", 64, 16, 2))
        subjects = (_FOUR_BITS, _SMALL3_BF16)
        goals = (
            _at_least(3.0, "2k/16", _SMALL3_BF16),
            Goal(cell="64/16@2", ours=_FOUR_BITS, against=_SMALL3_BF16, at_most=0.60),
        )
    return Plan(
        cells=cells,
        subjects=subjects,
        pairs=tuple(
            (one, other)
            for one in subjects
            for other in subjects
            if (one.model, other.model) == ("small4", "small3")
        ),
        goals=goals,
        goals_are_for="one H200",
    )


def _at_least(ratio: float, cell: str, against: Subject) -> Goal[Subject]:
    return Goal(cell=cell, ours=_FOUR_BITS, against=against, at_least=ratio)


def cpu_plan(*, miniature: bool = False) -> Plan:
    """Cells, subjects and goals of a CPU: both models in miniature proportions, in bf16 first, then in int8."""
    pairs = tuple(
        (
            Subject(model="small4", weights=weights, kv_dtype="bf16"),
            Subject(model="small3", weights=weights, kv_dtype="bf16"),
        )
        for weights in (("bf16",) if miniature else ("bf16", "int8"))
    )
    cells: tuple[Cell, ...] = (
        _cell("throughput", 512, 64, 32),
        _cell("latency", K, 256, 1),
        _cell("latency", K, 256, 2),
    )
    if miniature:
        cells = (_cell("throughput", 32, 8, 4), _cell("latency", 32, 8, 1))
    ours, against = pairs[0]
    goals = (
        Goal(cell=cell.name, ours=ours, against=against, at_least=2.2)
        if cell.is_throughput
        else Goal(cell=cell.name, ours=ours, against=against, at_most=0.60)
        for cell in cells
    )
    return Plan(
        cells=cells,
        subjects=tuple(subject for pair in pairs for subject in pair),
        pairs=pairs,
        goals=tuple(goals),
        goals_are_for="small4-mini and small3-mini in bf16 on two cores",
    )
