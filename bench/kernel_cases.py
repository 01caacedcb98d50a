"""What each operation is timed with: one function per operation, from a model and a size to calls.

Imports torch and numpy alone: a machine that is lent for half an hour has little else (bench/gpu).

A `Call` says what one call must move and compute at least: every byte it reads and writes once, two operations for
each product that the mathematics asks for. Letters as in kernels/ops/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.pack import pack

COLD_BYTES = 96 << 20  # of weights in turn, so that no cache of ours holds them from one call to the next
NOISE = 65_521  # random values that all tensors repeat; a prime, so that no two rows are equal
DTYPE = torch.bfloat16
VALUE_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The sizes of one layer, and the vocabulary. Zeros: the model has no such part.

    window: tokens that a row sees, 0 is all; sinks: whether heads have them. Both of GQA alone.
    """

    name: str
    hidden: int
    heads: int
    vocab: int
    mlp_width: int  # of the dense MLP, or of the shared expert
    kv_heads: int = 0
    head_dim: int = 0
    window: int = 0
    sinks: bool = False
    query_rank: int = 0
    rank: int = 0
    rope: int = 0
    nope: int = 0
    value_dim: int = 0
    experts: int = 0
    top_k: int = 0
    expert_width: int = 0


# the benchmark checkpoints, `--scale mini`
SMALL4 = Model(
    name="small4",
    hidden=1024,
    heads=16,
    vocab=32_768,
    mlp_width=512,
    query_rank=512,
    rank=256,
    rope=64,
    nope=64,
    value_dim=128,
    experts=128,
    top_k=4,
    expert_width=512,
)
SMALL3 = Model(name="small3", hidden=1280, heads=16, vocab=32_768, mlp_width=8448, kv_heads=8, head_dim=128)
MODELS = {model.name: model for model in (SMALL4, SMALL3)}


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
        """One row a sequence."""
        return self.rows_each == 1


SIZES = (
    Size(name="decode 1", sequences=1, rows_each=1, context=1024),
    Size(name="decode 8", sequences=8, rows_each=1, context=1024),
    Size(name="decode 32", sequences=32, rows_each=1, context=1024),
    Size(name="prefill 2048", sequences=1, rows_each=2048, context=2048),
)


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of the bound function, for calls in turn; bytes and operations of each."""

    arguments: list[tuple[Any, ...]]
    num_bytes: int
    flops: int = 0


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes tensors for one implementation: weights packed in `format` for the native one, plain for others."""

    native: bool
    format: str
    device: str = "cpu"
    seed: int = 0
    kv_dtype: torch.dtype = DTYPE
    cold_bytes: int | None = None  # COLD_BYTES

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
        return [first, *(make() for _ in range(wanted // weight_bytes(*first)))]


def weight_bytes(*matrices: Matrix) -> int:
    """Bytes of plain or packed weights."""
    return sum(
        matrix.numel() * matrix.element_size() if isinstance(matrix, Tensor) else matrix.num_bytes
        for matrix in matrices
    )


Case = Callable[[Model, Size, Maker], Call | None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Register the case of the operation that the function is named after. None: not in this model or size."""
    CASES[function.__name__] = function
    return function


def tables(rows: int, pairs: int) -> tuple[Tensor, Tensor]:
    """cos, sin of random angles, fp32 [rows, pairs]."""
    angles = torch.rand(rows, pairs, generator=torch.Generator().manual_seed(1)) * 6
    return angles.cos(), angles.sin()


# --- norms, rotations --------------------------------------------------------------------------------------


@case
def rms_norm(model: Model, size: Size, make: Maker) -> Call:
    """The hidden rows."""
    x, weight = make.noise(size.rows, model.hidden), make.noise(model.hidden)
    return Call([(x, weight, 1e-6)], (2 * x.numel() + model.hidden) * VALUE_BYTES)


@case
def add_rms_norm(model: Model, size: Size, make: Maker) -> Call:
    """The hidden rows; the residual is written too."""
    x, residual = make.noise(size.rows, model.hidden), make.noise(size.rows, model.hidden)
    return Call([(x * 0, residual, make.noise(model.hidden), 1e-6)], (4 * x.numel() + model.hidden) * VALUE_BYTES)


@case
def rms_norm_fp8(model: Model, size: Size, make: Maker) -> Call:
    """The hidden rows, each into codes by its own scale."""
    x, weight = make.noise(size.rows, model.hidden), make.noise(model.hidden)
    moved = x.numel() * (VALUE_BYTES + 1) + model.hidden * VALUE_BYTES + size.rows * 4
    return Call([(x, weight, 1e-6, None)], moved)


@case
def add_rms_norm_fp8(model: Model, size: Size, make: Maker) -> Call:
    """The hidden rows are added to the residual; the normed sum goes into codes by a static scale."""
    x, residual = make.noise(size.rows, model.hidden), make.noise(size.rows, model.hidden)
    scale = torch.full((1,), 0.0625, device=make.device)
    moved = x.numel() * (3 * VALUE_BYTES + 1) + model.hidden * VALUE_BYTES + size.rows * 4
    return Call([(x * 0, residual, make.noise(model.hidden), 1e-6, scale)], moved)


@case
def rope_tables(model: Model, size: Size, make: Maker) -> Call:
    """Once a step."""
    pairs = (model.rope or model.head_dim) // 2
    positions = torch.arange(size.rows) + size.context - size.rows_each
    return Call([(positions, torch.rand(pairs), 1.0)], size.rows * (8 + 2 * pairs * 4))


@case
def apply_rope(model: Model, size: Size, make: Maker) -> Call:
    """The queries; with grouped queries, the keys too."""
    turned = model.rope or model.head_dim
    heads = model.heads + model.kv_heads
    x = make.noise(size.rows, heads, model.nope + turned)
    moved = 2 * size.rows * heads * turned * VALUE_BYTES + size.rows * turned * 4
    return Call([(x, *tables(size.rows, turned // 2), model.rope > 0, None)], moved)


# --- dense products ----------------------------------------------------------------------------------------


@case
def linear(model: Model, size: Size, make: Maker) -> Call:
    """The projection after attention."""
    inner = model.heads * (model.value_dim or model.head_dim)
    x = make.noise(size.rows, inner)
    weights = make.cold(lambda: (make.matrix(model.hidden, inner),))
    moved = weight_bytes(*weights[0]) + size.rows * (inner + model.hidden) * VALUE_BYTES
    return Call([(x, *matrices) for matrices in weights], moved, 2 * size.rows * inner * model.hidden)


@case
def lm_head(model: Model, size: Size, make: Maker) -> Call:
    """One row a sequence."""
    rows = size.sequences
    x = make.noise(rows, model.hidden)
    weights = make.cold(lambda: (make.matrix(model.vocab, model.hidden),))
    moved = weight_bytes(*weights[0]) + rows * (model.hidden * VALUE_BYTES + model.vocab * 4)
    return Call([(x, *matrices) for matrices in weights], moved, 2 * rows * model.hidden * model.vocab)


@case
def gated_mlp(model: Model, size: Size, make: Maker) -> Call:
    """The dense MLP, or one as wide as the shared expert."""
    hidden, width = model.hidden, model.mlp_width
    x = make.noise(size.rows, hidden)
    weights = make.cold(lambda: (make.matrix(2 * width, hidden, paired=True), make.matrix(hidden, width)))
    moved = weight_bytes(*weights[0]) + 2 * size.rows * hidden * VALUE_BYTES
    return Call([(x, *matrices) for matrices in weights], moved, 6 * size.rows * hidden * width)


# --- mixture of experts ------------------------------------------------------------------------------------


def random_experts(model: Model, size: Size) -> Tensor:
    """int64 [T,K], distinct in a row, every expert as likely as the others."""
    scores = torch.rand(size.rows, model.experts, generator=torch.Generator().manual_seed(size.rows))
    return scores.topk(model.top_k).indices


def expert_bytes(model: Model, size: Size, *matrices: Matrix) -> int:
    """Bytes of the experts that random_experts chooses."""
    return weight_bytes(*matrices) * len(random_experts(model, size).unique()) // model.experts


@case
def route(model: Model, size: Size, make: Maker) -> Call | None:
    """The router in the checkpoint's bf16."""
    if not model.experts:
        return None
    x = make.noise(size.rows, model.hidden)
    weights = make.cold(lambda: (make.matrix(model.experts, model.hidden, format="bf16"),))
    moved = weight_bytes(*weights[0]) + size.rows * (model.hidden * VALUE_BYTES + model.top_k * 12)
    calls = [(x, *matrices, model.top_k, 1, 1, True, 1.0) for matrices in weights]
    return Call(calls, moved, 2 * size.rows * model.hidden * model.experts)


@case
def group_by_expert(model: Model, size: Size, make: Maker) -> Call | None:
    """Random choices."""
    if not model.experts:
        return None
    ids = random_experts(model, size)
    return Call([(ids, model.experts)], (2 * ids.numel() + model.experts + 1) * 8)


@case
def expert_mlp(model: Model, size: Size, make: Maker) -> Call | None:
    """Random choices, and the shared expert."""
    if not model.experts:
        return None
    hidden, width, rows = model.hidden, model.expert_width, size.rows
    ids = random_experts(model, size)
    order = ids.flatten().sort(stable=True)
    starts = torch.searchsorted(order.values, torch.arange(model.experts + 1))
    x, shares = make.noise(rows, hidden), torch.full(ids.shape, 1 / model.top_k)
    routed = make.matrix(model.experts, 2 * width, hidden, paired=True), make.matrix(model.experts, hidden, width)
    shared = make.matrix(2 * model.mlp_width, hidden, paired=True), make.matrix(hidden, model.mlp_width)
    moved = expert_bytes(model, size, *routed) + weight_bytes(*shared) + 2 * rows * hidden * VALUE_BYTES
    flops = 6 * rows * hidden * (model.top_k * width + model.mlp_width)
    return Call([(x, *routed, shares, order.indices, starts, *shared)], moved, flops)


# --- blocks of the cache ------------------------------------------------------------------------------------

BLOCK_TOKENS = 16


def pages_of(model: Model, size: Size, make: Maker) -> tuple[Tensor, int]:
    """One layer's pages, for twice the blocks of the longest context; and how many are moved: a context's."""
    width = model.rank + model.rope or model.kv_heads * model.head_dim
    moved = -(-size.context // BLOCK_TOKENS)
    return make.noise(2 * moved * BLOCK_TOKENS, width).view(2 * moved, BLOCK_TOKENS, width), moved


@case
def copy_blocks(model: Model, size: Size, make: Maker) -> Call:
    """A prefix, from the front of the pages to their end."""
    pages, count = pages_of(model, size, make)
    pairs = torch.stack([torch.arange(count), torch.arange(2 * count - 1, count - 1, -1)], dim=1)
    return Call([(pages, pairs)], pages.nbytes)


@case
def gather_blocks(model: Model, size: Size, make: Maker) -> Call:
    """A context's blocks, every second one of the pages."""
    pages, count = pages_of(model, size, make)
    return Call([(pages, torch.arange(count) * 2, torch.empty_like(pages[:count]))], pages.nbytes)


@case
def scatter_blocks(model: Model, size: Size, make: Maker) -> Call:
    """And back."""
    pages, count = pages_of(model, size, make)
    return Call([(pages, torch.arange(count) * 2, pages[:count].clone())], pages.nbytes)


# --- sampling ----------------------------------------------------------------------------------------------

SEEN = 100  # tokens of each row that an edit changes


def logits_of(model: Model, size: Size) -> Tensor:
    """fp32 [M,N]: one row a sequence, a few tokens likely."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(size.sequences, model.vocab, generator=random) * 3


def entries(model: Model, size: Size) -> tuple[Tensor, Tensor]:
    """Rows and token ids of an edit."""
    ids = torch.arange(SEEN) * 37 % model.vocab
    return torch.arange(size.sequences).repeat_interleave(SEEN), ids.repeat(size.sequences)


@case
def add_bias(model: Model, size: Size, make: Maker) -> Call:
    """A hundred tokens a row."""
    rows, ids = entries(model, size)
    return Call([(logits_of(model, size), rows, ids, torch.zeros(len(ids)))], len(ids) * 28)


@case
def apply_penalties(model: Model, size: Size, make: Maker) -> Call:
    """A hundred tokens a row."""
    rows, ids = entries(model, size)
    penalties = (torch.full((size.sequences,), value) for value in (1.0, 0.0, 0.0))
    return Call([(logits_of(model, size), rows, ids, torch.ones_like(ids), *penalties)], len(ids) * 32)


@case
def mask_tokens(model: Model, size: Size, make: Maker) -> Call:
    """A hundred tokens a row."""
    rows, ids = entries(model, size)
    return Call([(logits_of(model, size), rows, ids)], len(ids) * 20)


@case
def peaks(model: Model, size: Size, make: Maker) -> Call:
    """Greedy sampling."""
    logits = logits_of(model, size)
    return Call([(logits,)], logits.numel() * 4)


@case
def draw(model: Model, size: Size, make: Maker) -> Call:
    """Temperature 0.8, top-p 0.95."""
    logits, rows = logits_of(model, size), size.sequences
    reals = (torch.full((rows,), value, dtype=torch.float64) for value in (0.8, 0.95, 0.0))
    temperatures, top_ps, min_ps = reals
    zeros = torch.zeros(rows, dtype=torch.int64)
    return Call([(logits, temperatures, zeros, top_ps, min_ps, zeros, zeros, zeros)], logits.numel() * 4)


@case
def log_probabilities(model: Model, size: Size, make: Maker) -> Call:
    """Of every token."""
    logits = logits_of(model, size)
    return Call([(logits,)], logits.numel() * 8)


@case
def top_tokens(model: Model, size: Size, make: Maker) -> Call:
    """The twenty largest."""
    logits = logits_of(model, size)
    return Call([(logits, 20)], logits.numel() * 4)
