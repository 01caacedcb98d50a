"""Calls that time each operation: one function per operation, from a model and a size to arguments and their work.

Imports torch and numpy alone: a machine that is lent for half an hour has little else (bench/gpu). Letters as in
kernels/ops/; work is counted by engine/cost/operations.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cierzo.engine.cost import operations
from cierzo.engine.cost.operations import Work, stored
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.pack import pack

COLD_BYTES = 96 << 20  # of weights in turn, so that no cache of ours holds them from one call to the next
NOISE = 65_521  # random values that all tensors repeat; a prime, so that no two rows are equal
DTYPE = torch.bfloat16

# Both models at true size. Small 4 has no dense MLP: one as wide as its shared expert is timed.
SMALL4 = ModelSizes(
    name="small4", hidden=4096, heads=32, vocab=131_072, mlp_width=2048, query_rank=1024, rank=256, rope=64,
    nope=64, value_dim=128, experts=128, top_k=4, expert_width=2048, shared_width=2048,
)  # fmt: skip
SMALL3 = ModelSizes(name="small3", hidden=5120, heads=32, vocab=131_072, mlp_width=32_768, kv_heads=8, head_dim=128)
# the benchmark checkpoints, `--scale mini`
MINI4 = replace(
    SMALL4, hidden=1024, heads=16, vocab=32_768, mlp_width=512, query_rank=512, expert_width=512, shared_width=512
)
MINI3 = replace(SMALL3, hidden=1280, heads=16, vocab=32_768, mlp_width=8448)
MODELS = {model.name: model for model in (MINI4, MINI3)}


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
        """Whether each sequence has one row."""
        return self.rows_each == 1

    def queries(self, window: int = 0) -> tuple[int, int, int]:
        """Rows, pairs of a row and a token that it sees, and tokens whose cache entries are read, once each."""
        seen = range(self.context - self.rows_each + 1, self.context + 1)
        pairs = sum(min(tokens, window) if window else tokens for tokens in seen)
        read = min(self.context, window + self.rows_each - 1) if window else self.context
        shared = max(0, self.shared - (self.context - read))
        return self.rows, self.sequences * pairs, self.sequences * (read - shared) + shared


SIZES = (
    Size(name="decode 1", sequences=1, rows_each=1, context=1024),
    Size(name="decode 8", sequences=8, rows_each=1, context=1024),
    Size(name="decode 32", sequences=32, rows_each=1, context=1024),
    Size(name="prefill 2048", sequences=1, rows_each=2048, context=2048),
)


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of the bound function, for calls in turn; and the work of each."""

    arguments: list[tuple[Any, ...]]
    work: Work


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes tensors for one implementation: weights packed in `format` for the native one, plain for others."""

    native: bool
    format: str
    device: str = "cpu"
    seed: int = 0
    kv_dtype: torch.dtype = DTYPE
    cold_bytes: int | None = None  # COLD_BYTES

    @property
    def weights(self) -> str:
        """The number format in which weights lie in memory."""
        return self.format if self.native else "bf16"

    @property
    def page_bytes(self) -> int:
        """Bytes of a value in the cache."""
        return self.kv_dtype.itemsize

    def entry_bytes(self, model: ModelSizes) -> int:
        """Bytes that a token has in one layer's cache."""
        return model.page_values * self.page_bytes

    def noise(self, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        """Normal values; the same ones again and again."""
        count = torch.Size(shape).numel()
        values = torch.randn(NOISE, generator=torch.Generator().manual_seed(self.seed)).to(self.device, dtype)
        return values.repeat(count // NOISE + 1)[:count].view(shape)

    def pages(self, *shape: int) -> Tensor:
        """Cache entries."""
        return self.noise(*shape, dtype=self.kv_dtype)

    def matrix(self, *shape: int, paired: bool = False, format: str | None = None) -> Matrix:
        """Weights [n,k] or [experts,n,k] of standard deviation 0.02."""
        plain = self.noise(*shape) * 0.02
        return pack(plain, format or self.format, paired=paired) if self.native else plain

    def cold(self, make: Callable[[], tuple[Matrix, ...]]) -> list[tuple[Matrix, ...]]:
        """As many of what `make` makes as fill `cold_bytes`."""
        first = make()
        wanted = COLD_BYTES if self.cold_bytes is None else self.cold_bytes
        return [first, *(make() for _ in range(wanted // matrix_bytes(*first)))]


def matrix_bytes(*matrices: Matrix) -> int:
    """Bytes of plain or packed weights."""
    return sum(
        matrix.numel() * matrix.element_size() if isinstance(matrix, Tensor) else matrix.num_bytes
        for matrix in matrices
    )


Case = Callable[[ModelSizes, Size, Maker], Call | None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Register the case of the operation that the function is named after. None: not in this model or size."""
    CASES[function.__name__] = function
    return function


def cases(*names: str) -> Callable[[Callable[..., Call | None]], Callable[..., Call | None]]:
    """Register a function as the case of several operations, the name of which is its first argument."""

    def register(function: Callable[..., Call | None]) -> Callable[..., Call | None]:
        CASES.update({name: partial(function, name) for name in names})
        return function

    return register


def tables(rows: int, pairs: int) -> tuple[Tensor, Tensor]:
    """cos, sin of random angles, fp32 [rows, pairs]."""
    angles = torch.rand(rows, pairs, generator=torch.Generator().manual_seed(1)) * 6
    return angles.cos(), angles.sin()


# --- norms, rotations --------------------------------------------------------------------------------------


@cases("rms_norm", "add_rms_norm", "rms_norm_fp8", "add_rms_norm_fp8")
def norm(operation: str, model: ModelSizes, size: Size, make: Maker) -> Call:
    """The hidden rows, alone or added to a residual; into codes by each row's own scale, or by a static one."""
    residual, fp8 = operation.startswith("add"), operation.endswith("fp8")
    x, weight = make.noise(size.rows, model.hidden), make.noise(model.hidden)
    arguments: tuple[Any, ...] = (x * 0, x.clone(), weight, 1e-6) if residual else (x, weight, 1e-6)
    if fp8:
        arguments += (torch.full((1,), 0.0625, device=make.device) if residual else None,)
    row_bytes = int(stored("fp8", 1, model.hidden)) if fp8 else None
    return Call([arguments], operations.norm(model, size.rows, residual=residual, row_bytes=row_bytes))


@case
def rope_tables(model: ModelSizes, size: Size, make: Maker) -> Call:
    """Once a step."""
    positions = torch.arange(size.rows) + size.context - size.rows_each
    return Call(
        [(positions, torch.rand(model.rotated // 2), 1.0)], operations.moved("rope_tables", model, size.rows)
    )


@case
def apply_rope(model: ModelSizes, size: Size, make: Maker) -> Call:
    """The queries; with grouped queries, the keys too."""
    x = make.noise(size.rows, model.heads + model.kv_heads, model.nope + model.rotated)
    arguments = (x, *tables(size.rows, model.rotated // 2), model.rope > 0, None)
    return Call([arguments], operations.moved("apply_rope", model, size.rows))


# --- dense products ----------------------------------------------------------------------------------------


@case
def linear(model: ModelSizes, size: Size, make: Maker) -> Call:
    """The projection after attention."""
    k, n = model.projections[-1]
    x, weights = make.noise(size.rows, k), make.cold(lambda: (make.matrix(n, k),))
    return Call([(x, *matrices) for matrices in weights], operations.linear(model, size.rows, k, n, make.weights))


@case
def lm_head(model: ModelSizes, size: Size, make: Maker) -> Call:
    """One row a sequence."""
    x = make.noise(size.sequences, model.hidden)
    weights = make.cold(lambda: (make.matrix(model.vocab, model.hidden),))
    return Call([(x, *matrices) for matrices in weights], operations.lm_head(model, size.sequences, make.weights))


@case
def gated_mlp(model: ModelSizes, size: Size, make: Maker) -> Call:
    """The dense MLP, or one as wide as the shared expert."""
    x, weights = make.noise(size.rows, model.hidden), make.cold(lambda: mlp_weights(model.mlp_width, model, make))
    return Call([(x, *matrices) for matrices in weights], operations.gated_mlp(model, size.rows, make.weights))


def mlp_weights(width: int, model: ModelSizes, make: Maker, *experts: int) -> tuple[Matrix, Matrix]:
    """Gate and up, and down, of one MLP or of several experts."""
    gate_up = make.matrix(*experts, 2 * width, model.hidden, paired=True)
    return gate_up, make.matrix(*experts, model.hidden, width)


# --- mixture of experts ------------------------------------------------------------------------------------


def random_experts(model: ModelSizes, size: Size) -> Tensor:
    """int64 [T,K], distinct in a row, every expert as likely as the others."""
    scores = torch.rand(size.rows, model.experts, generator=torch.Generator().manual_seed(size.rows))
    return scores.topk(model.top_k).indices


def expert_work(model: ModelSizes, size: Size, make: Maker) -> Work:
    """The work of the experts that random_experts chooses."""
    return operations.expert_mlp(model, size.rows, len(random_experts(model, size).unique()), make.weights)


@case
def route(model: ModelSizes, size: Size, make: Maker) -> Call | None:
    """The router in the checkpoint's bf16."""
    if not model.experts:
        return None
    x = make.noise(size.rows, model.hidden)
    weights = make.cold(lambda: (make.matrix(model.experts, model.hidden, format="bf16"),))
    calls = [(x, *matrices, model.top_k, 1, 1, True, 1.0) for matrices in weights]
    return Call(calls, operations.route(model, size.rows))


@case
def group_by_expert(model: ModelSizes, size: Size, make: Maker) -> Call | None:
    """Random choices."""
    if not model.experts:
        return None
    arguments = (random_experts(model, size), model.experts)
    return Call([arguments], operations.moved("group_by_expert", model, size.rows))


@case
def expert_mlp(model: ModelSizes, size: Size, make: Maker) -> Call | None:
    """Random choices, and the shared expert."""
    if not model.experts:
        return None
    ids = random_experts(model, size)
    order = ids.flatten().sort(stable=True)
    starts = torch.searchsorted(order.values, torch.arange(model.experts + 1))
    x, shares = make.noise(size.rows, model.hidden), torch.full(ids.shape, 1 / model.top_k)
    routed = mlp_weights(model.expert_width, model, make, model.experts)
    shared = mlp_weights(model.shared_width, model, make)
    arguments = (x, *routed, shares, order.indices, starts, *shared)
    return Call([arguments], expert_work(model, size, make))


# --- blocks of the cache ------------------------------------------------------------------------------------

BLOCK_TOKENS = 16


@cases("copy_blocks", "gather_blocks", "scatter_blocks")
def blocks(operation: str, model: ModelSizes, size: Size, make: Maker) -> Call:
    """A context's blocks: from the front of a layer's pages to their end, or out of and into every second one."""
    width, count = model.rank + model.rope or model.kv_heads * model.head_dim, -(-size.context // BLOCK_TOKENS)
    pages = make.noise(2 * count, BLOCK_TOKENS, width)
    arguments: tuple[Tensor, ...] = (pages, torch.arange(count) * 2, pages[:count].clone())
    if operation == "copy_blocks":
        arguments = (pages, torch.stack([torch.arange(count), torch.arange(2 * count - 1, count - 1, -1)], dim=1))
    return Call([arguments], operations.moved_blocks(operation, count, pages[0].nbytes))


# --- sampling ----------------------------------------------------------------------------------------------

SEEN = 100  # tokens of each row that an edit changes


def logits_of(model: ModelSizes, size: Size) -> Tensor:
    """fp32 [M,N]: one row a sequence, a few tokens likely."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(size.sequences, model.vocab, generator=random) * 3


@cases("add_bias", "apply_penalties", "mask_tokens")
def edit(operation: str, model: ModelSizes, size: Size, make: Maker) -> Call:
    """Changes of a hundred tokens a row: by a bias, by a count and its row's penalties, or to nothing."""
    rows = torch.arange(size.sequences).repeat_interleave(SEEN)
    ids = (torch.arange(SEEN) * 37 % model.vocab).repeat(size.sequences)
    more: list[Tensor] = []
    if operation == "add_bias":
        more = [torch.zeros(len(ids))]
    if operation == "apply_penalties":
        more = [torch.ones_like(ids), *(torch.full((size.sequences,), value) for value in (1.0, 0.0, 0.0))]
    return Call([(logits_of(model, size), rows, ids, *more)], operations.moved(operation, model, len(ids)))


@cases("peaks", "log_probabilities", "top_tokens", "draw")
def read_logits(operation: str, model: ModelSizes, size: Size, make: Maker) -> Call:
    """Logits of every token: the largest, their log-probabilities, the twenty largest, a draw."""
    rows, more = size.sequences, tuple[Any, ...]()
    if operation == "top_tokens":
        more = (20,)
    if operation == "draw":
        temperatures, top_ps, min_ps = (torch.full((rows,), p, dtype=torch.float64) for p in (0.8, 0.95, 0.0))
        zeros = torch.zeros(rows, dtype=torch.int64)
        more = (temperatures, zeros, top_ps, min_ps, zeros, zeros, zeros)
    return Call([(logits_of(model, size), *more)], operations.moved(operation, model, rows))
