"""Cells, models in their number formats, and goals: the plans for a CPU and for a card."""

from __future__ import annotations

import itertools
from typing import Literal

import msgspec

K = 1024
LIMIT_S = 0.050  # of the median time per output token, at the concurrency that is searched for
MODELS = ("small4", "small3")
SIMULATED = "simulated:"  # how the name of a simulated device begins


class Cell(msgspec.Struct, frozen=True):
    """A closed loop of `concurrency` clients; None: as many as give the most requests per second within `LIMIT_S`.

    profile: the engine's. A throughput cell is judged by requests per second, a latency one by completion time.
    """

    profile: Literal["throughput", "latency"]
    input_tokens: int
    output_tokens: int
    concurrency: int | None = None

    @property
    def name(self) -> str:
        """The sizes, in 1,024 tokens where they are multiples of it: 8k/1k, 1k/256@4."""
        sizes = (self.input_tokens, self.output_tokens)
        told = "/".join(f"{size // K}k" if size % K == 0 else str(size) for size in sizes)
        return told if self.concurrency is None else f"{told}@{self.concurrency}"

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


class Subject(msgspec.Struct, frozen=True):
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
    """Cells, subjects in the order of a round, the pairs that are compared, and goals by cell and pair: the least
    that Small 4's requests per second, or the most that its completion time, is to be of Small 3's."""

    cells: tuple[Cell, ...]
    subjects: tuple[Subject, ...]
    pairs: tuple[tuple[Subject, Subject], ...]
    goals: dict[tuple[str, Subject, Subject], float]
    goals_are_for: str


_NVFP4 = Subject("small4", "nvfp4", "fp8")
_SMALL4_FP8 = Subject("small4", "fp8", "fp8")
_SMALL4_BY_FP8 = Subject("small4", "fp8", "fp8", "fp8")
_BF16 = Subject("small3", "bf16", "fp8")
_FP8 = Subject("small3", "fp8", "fp8")
_BY_FP8 = Subject("small3", "fp8", "fp8", "fp8")
_BF16_KV = Subject("small3", "bf16", "bf16")
_QUICK = ("1k/1k@1", "1k/1k@2", "1k/1k@4", "32k/1k@1", "32k/1k@4", "32k/1k@16")

GPU_PLAN = Plan(  # of a card, or of several
    cells=(
        *(Cell("throughput", *sizes) for sizes in ((2 * K, 2 * K), (8 * K, K), (K, 256), (32 * K, K))),
        *(Cell("latency", K, K, concurrency) for concurrency in (1, 2, 4, 8, 32)),
        *(Cell("latency", 32 * K, K, concurrency) for concurrency in (1, 4, 16)),
    ),
    subjects=(_NVFP4, _BF16, _SMALL4_FP8, _FP8, _SMALL4_BY_FP8, _BY_FP8, _BF16_KV),
    pairs=tuple(itertools.product((_NVFP4, _SMALL4_FP8, _SMALL4_BY_FP8), (_BF16, _FP8, _BY_FP8, _BF16_KV))),
    goals={
        **{("2k/2k", _NVFP4, other): 3.0 for other in (_BF16, _BF16_KV, _FP8, _BY_FP8)},
        **{("8k/1k", _NVFP4, other): 3.0 for other in (_BF16, _BF16_KV)},
        **{(cell, _NVFP4, other): 0.60 for cell in _QUICK for other in (_BF16, _FP8, _BY_FP8)},
    },
    goals_are_for="one H200",
)

# Of a CPU: both models in miniature proportions, in bf16 first, then in int8.
_CPU_PAIRS = tuple(
    (Subject("small4", weights, "bf16"), Subject("small3", weights, "bf16")) for weights in ("bf16", "int8")
)
CPU_PLAN = Plan(
    cells=(Cell("throughput", 512, 64, 32), Cell("latency", K, 256, 1), Cell("latency", K, 256, 2)),
    subjects=tuple(itertools.chain(*_CPU_PAIRS)),
    pairs=_CPU_PAIRS,
    goals={
        (cell, *_CPU_PAIRS[0]): goal for cell, goal in (("512/64@32", 2.2), ("1k/256@1", 0.6), ("1k/256@2", 0.6))
    },
    goals_are_for="small4-mini and small3-mini in bf16 on two cores",
)
