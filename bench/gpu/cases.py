"""Parts of an operation's case: the size of a step, models, number formats, tensors at random.

Imports torch and numpy alone: a machine that is lent for half an hour has little else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from cierzo.engine.cost.operations import Work
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels.formats import fp8
from cierzo.kernels.formats.activations import QuantisedRows
from cierzo.kernels.formats.device import DeviceMatrix, dequantise, in_fp8, quantise, stack
from cierzo.kernels.formats.number_formats import formats_on
from cierzo.kernels.formats.packed import Matrix

# Both models at true size. Small 4 has no dense MLP: one as wide as its shared expert is timed.
SMALL4 = ModelSizes(
    name="small4", hidden=4096, heads=32, vocab=131_072, mlp_width=2048, query_rank=1024, rank=256, rope=64,
    nope=64, value_dim=128, experts=128, top_k=4, expert_width=2048, shared_width=2048,
)  # fmt: skip
SMALL3 = ModelSizes(name="small3", hidden=5120, heads=32, vocab=131_072, mlp_width=32_768, kv_heads=8, head_dim=128)
MODELS = (SMALL4, SMALL3)
# Sizes of `linear` alone: MLA's latents are few outputs, whose products are cut over k (triton/linear.py)
LATENTS = replace(SMALL4, name="small4 latents", hidden=1344, heads=1, value_dim=4096)
# A norm's alone: latent queries lie beside latent keys, in rows of one product.
LATENT_QUERIES = ModelSizes(name="small4 latent queries", hidden=1024, query_rank=1024, rank=256, rope=64)
# The two kinds of layer that gpt-oss has in turn: no model of ours has a window or sinks, the doors of GQA do. Then
# windows that are hostile: a row sees itself alone; no multiple of a tile; more than there is.
GPT_OSS = ModelSizes(name="gpt-oss", hidden=2880, heads=64, vocab=201_088, kv_heads=8, head_dim=64, sinks=True)
GPT_OSS_WINDOW, *HOSTILE_WINDOWS = (
    replace(GPT_OSS, name=f"gpt-oss, window {window}", window=window) for window in (128, 1, 77, 1 << 20)
)

COLD_BYTES = 96 << 20  # of weights, or cache pages, in turn, so that no cache holds them from one call to the next
NOISE = 65_521  # random values that all tensors repeat; a prime, so that no two rows are equal
BY_FP8 = {"fp8 x fp8": None, "static fp8 x fp8": 0.0625}  # activations in FP8: by row, or by this scale
M = TypeVar("M", bound=Matrix)
KV = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A step: `sequences` with `rows_each` rows, the last ones of a context, whose first `shared` tokens lie in the
    same blocks for all of them."""

    name: str
    sequences: int
    rows_each: int
    context: int
    shared: int = 0

    @property
    def rows(self) -> int:
        """T."""
        return self.sequences * self.rows_each

    @property
    def decodes(self) -> bool:
        """True where each sequence has a single row."""
        return self.rows_each == 1

    def queries(self, window: int = 0) -> tuple[int, int, int]:
        """Rows, pairs of a row and a token that it sees, and tokens whose cache entries are read, once each."""
        seen = range(self.context - self.rows_each + 1, self.context + 1)
        pairs = sum(min(tokens, window) if window else tokens for tokens in seen)
        read = min(self.context, window + self.rows_each - 1) if window else self.context
        shared = max(0, self.shared - (self.context - read))
        return self.rows, self.sequences * pairs, self.sequences * (read - shared) + shared


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes tensors at random: weights as GPU kernels read them in `format`, pages of the cache of `kv_dtype`."""

    format: str = "bf16"
    device: str = "cpu"
    seed: int = 0
    kv_dtype: torch.dtype = torch.bfloat16
    cold_bytes: int = COLD_BYTES

    @property
    def weights(self) -> str:
        """The number format in which weights lie in memory."""
        return "fp8" if self.format in BY_FP8 else self.format

    def entry_bytes(self, model: ModelSizes) -> int:
        """Bytes that a token has in one layer's cache."""
        return model.page_values * self.kv_dtype.itemsize

    def noise(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normal values; the same ones again and again."""
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        count = torch.Size(shape).numel()
        values = torch.randn(NOISE, generator=torch.Generator().manual_seed(self.seed)).to(self.device, dtype)
        return values.repeat(count // NOISE + 1)[:count].view(shape)

    def plain(self, *shape: int) -> Tensor:
        """Weights in bf16, of standard deviation 0.02."""
        return self.noise(*shape) * 0.02

    def matrix(self, *shape: int, paired: bool = False, block: tuple[int, int] | None = None) -> Matrix:
        """Weights [n,k] or [experts,n,k]. paired: outputs of a gate above those that it multiplies. block: rows and
        columns of a scale of FP8; one a row by default."""
        return _on_meta(self.format, shape, block) if self.device == "meta" else self.matrix_of(shape, block)

    def matrix_of(self, shape: tuple[int, ...], block: tuple[int, int] | None) -> Matrix:
        """A matrix of its own; see `matrix`."""
        plain, block = self.plain(*shape), block if self.weights == "fp8" else None
        if self.format == "bf16":
            return plain
        if plain.is_meta and plain.dim() == 3:  # alike, as they hold nothing
            matrix = stack([quantise(plain[0], self.weights, block=block)] * len(plain), len(plain))
        else:
            matrix = quantise(plain, self.weights, block=block)
        if self.format not in BY_FP8:
            return fp8.weave(matrix)
        static, experts = BY_FP8[self.format], shape[0] if len(shape) == 3 else 1
        return in_fp8(matrix, None if static is None else torch.full((experts,), static, device=self.device))

    def cold(self, make: Callable[[], tuple[M, ...]]) -> list[tuple[M, ...]]:
        """Call `make` until its matrices or pages fill `cold_bytes`."""
        first = make()
        num_bytes = sum(one.nbytes if isinstance(one, Tensor) else one.num_bytes for one in first)
        return [first, *(make() for _ in range(self.cold_bytes // num_bytes))]


@cache
def _on_meta(format: str, shape: tuple[int, ...], block: tuple[int, int] | None) -> Matrix:
    """A matrix that holds nothing: one for all cells, since making it takes as long as it would with values."""
    return Maker(format, "meta").matrix_of(shape, block)


# Arguments of the bound function, for calls in turn; and the work of each.
Call = tuple[list[tuple[Any, ...]], Work]


@dataclass(frozen=True, slots=True)
class Case:
    """An operation as it is called and checked.

    make: (model, size, maker) -> Call. needs: the size of a model without which it has no such operation ("rank").
    decodes: whether the step generates; None: either kind has it. of: what is stored in number formats, of which
    each is a case. changes: positions of arguments that are changed in place. rowwise: rows are those of the first
    argument, each on its own. hostile: sizes that no model has, for conformance.
    """

    make: Callable[..., Call]
    needs: str = "hidden"
    decodes: bool | None = None
    of: Literal["weights", "head", "pages", "codes", ""] = ""
    changes: tuple[int, ...] = ()
    rowwise: bool = False
    models: tuple[ModelSizes, ...] = MODELS
    hostile: tuple[ModelSizes, ...] = ()

    @property
    def formats(self) -> tuple[str, ...]:
        """The number formats that it is run with; of a head without FP8 activations, which no checkpoint has."""
        weights = formats_on("cuda")
        every = {"weights": (*weights, *BY_FP8), "head": weights, "codes": tuple(BY_FP8), "pages": tuple(KV)}
        return every.get(self.of, ("bf16",))

    @property
    def weighted(self) -> bool:
        """Whether it multiplies by weights of a number format."""
        return self.of in ("weights", "head")

    def has(self, model: ModelSizes, size: Size) -> bool:
        """Whether the model and the step have such an operation; only attention knows a prefix that is shared."""
        shared = not size.shared or (self.of == "pages" and self.decodes is True)
        return bool(getattr(model, self.needs)) and self.decodes in (None, size.decodes) and shared


CASES: dict[str, Case] = {}


def case(*names: str, **traits: Any) -> Callable[[Callable[..., Call]], Callable[..., Call]]:
    """Register a function as the case of the operations of these names, the name being its first argument; without
    names, of the operation that it is named after."""

    def register(function: Callable[..., Call]) -> Callable[..., Call]:
        for name in names:
            CASES[name] = Case(partial(function, name), **traits)
        if not names:
            CASES[function.__name__] = Case(function, **traits)
        return function

    return register


def widened(value: Any) -> Any:
    """An argument in fp32, weights dequantised: what the reference computes with to be the better one. Matrices
    whose activations are in FP8 stay so, and such rows: those codes are part of the result."""
    if isinstance(value, DeviceMatrix):
        return replace(value, dtype=torch.float32) if value.activations == "fp8" else dequantise(value)
    if isinstance(value, QuantisedRows):
        return replace(value, dtype=torch.float32)
    narrow = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.float() if narrow else value
