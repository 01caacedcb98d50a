"""A step of Small 4 and of Small 3, counted by hand: bytes, operations, and seconds on H100 and H200.

Written beside engine/cost, and importing nothing of it: the published sizes of both models, the data sheets'
rates, and the stated shares of them stand here as numbers, every product with its factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

BF16, FP8 = 989.5e12, 1979e12  # operations a second, of an H100 and of an H200
BYTES_PER_S = {"h100": 3.35e12, "h200": 4.8e12}
LINK_BYTES_PER_S = 450e9
# Shares of these rates that a step is planned with: of the memory's, of the arithmetic by kind of product.
MEMORY, EXPERTS, DENSE, ATTENTION = 0.8, 0.4, 0.6, 0.6


class Chunk(NamedTuple):
    """Tokens `start` to `start + count` of a sequence."""

    start: int
    count: int

    @property
    def pairs(self) -> int:
        """Each token sees all before it, and itself."""
        return sum(range(self.start + 1, self.start + self.count + 1))

    @property
    def context(self) -> int:
        """Tokens whose cache entries are read, once each."""
        return self.start + self.count


@dataclass(frozen=True)
class Step:
    """Sequences that decode a token each, in `contexts`; pieces of prompts; generated tokens that a preemption lost
    and that are computed again; of how many rows logits are wanted."""

    contexts: tuple[int, ...] = ()
    prompts: tuple[Chunk, ...] = ()
    again: tuple[Chunk, ...] = ()
    sampled: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Rows in expanded form."""
        return sum(chunk.count for chunk in self.prompts)

    @property
    def generated(self) -> int:
        """Rows in absorbed form."""
        return len(self.contexts) + sum(chunk.count for chunk in self.again)

    @property
    def generated_pairs(self) -> int:
        """Number of pairs of a generated row and a token that the row sees."""
        return sum(self.contexts) + sum(chunk.pairs for chunk in self.again)

    @property
    def generated_context(self) -> int:
        """Tokens that generated rows read."""
        return sum(self.contexts) + sum(chunk.context for chunk in self.again)

    @property
    def sequences(self) -> int:
        """All that have rows."""
        return len(self.contexts) + len(self.prompts) + len(self.again)


class Operation(NamedTuple):
    """Bytes and operations; the rate and the share of what computes them. whole_bytes: those of the bytes of which
    each of several cards reads all, not a part."""

    num_bytes: float
    operations: float
    rate: float
    share: float
    whole_bytes: float = 0.0


class Taken(NamedTuple):
    """Seconds of a step by what it waits for; the bytes and operations of all cards."""

    memory_s: float
    arithmetic_s: float
    exchange_s: float
    overhead_s: float
    limit_s: float
    num_bytes: float
    operations: float

    @property
    def total_s(self) -> float:
        """The step's time."""
        return self.memory_s + self.arithmetic_s + self.exchange_s + self.overhead_s


# Bytes of a weight, with its share of a group's scale, and of the scale of a row of weights.
Weight = tuple[float, int]
PLAIN: Weight = (2.0, 0)
CODES: Weight = (1.0, 4)  # FP8
FOUR_BITS: Weight = (0.5 + 1 / 16, 4)


def matrix(n: int, k: int, weight: Weight) -> float:
    """Bytes of weights [n, k]."""
    return n * (k * weight[0] + weight[1])


def product(
    k: int, n: int, rows: float, weight: Weight, rate: float, share: float = DENSE, written: int = 2
) -> Operation:
    """rows x [k] with [n,k]; rows go in in bf16, and out with `written` bytes a value. None of it without rows."""
    weights = matrix(n, k, weight) if rows else 0.0
    return Operation(weights + rows * (2 * k + written * n), 2 * rows * n * k, rate, share)


def mlp(
    hidden: int, width: int, rows: float, read: float, met: int, weight: Weight, rate: float, share: float
) -> Operation:
    """`read` MLPs of three matrices, `met` of them by each row; rows go in and out in bf16."""
    each = matrix(2 * width, hidden, weight) + matrix(hidden, width, weight)
    return Operation(read * each + rows * 2 * 2 * hidden, 2 * rows * met * 3 * hidden * width, rate, share)


def together(*parts: Operation) -> Operation:
    """Products of one kind, priced as one operation."""
    num_bytes, operations = sum(part.num_bytes for part in parts), sum(part.operations for part in parts)
    return parts[0]._replace(num_bytes=num_bytes, operations=operations)


def times(count: int, part: Operation, whole: bool = False) -> Operation:
    """The same in every layer, or for every head of every layer."""
    num_bytes = count * part.num_bytes
    return part._replace(
        num_bytes=num_bytes, operations=count * part.operations, whole_bytes=num_bytes if whole else 0.0
    )


def small4(step: Step, weights: str, page_bytes: int, fp8_activations: bool = False) -> list[Operation]:
    """36 layers, 4096 wide. 32 heads: keys of 64 + 64 and values of 128 from latents of 256 + 64, queries from
    latents of 1024. 4 of 128 experts, 2048 wide, and a shared one. page_bytes: of a value in the cache."""
    dense, expert = {"bf16": (PLAIN, PLAIN), "fp8": (CODES, CODES), "nvfp4": (CODES, FOUR_BITS)}[weights]
    tokens, prompt, made = step.prompt_tokens + step.generated, step.prompt_tokens, step.generated
    rate = FP8 if fp8_activations else BF16
    projections = together(
        product(4096, 1024 + 256 + 64, tokens, dense, rate),
        product(1024, 32 * 128, tokens, dense, rate),
        product(32 * 128, 4096, tokens, dense, rate),
    )
    reads = 128 * (1 - (124 / 128) ** tokens) + (1 if tokens else 0)  # distinct experts, and the shared one
    router = 128 * 4096 * 2 if tokens else 0
    prompt_pairs = sum(chunk.pairs for chunk in step.prompts)
    prompt_context = sum(chunk.context for chunk in step.prompts)
    entry = (256 + 64) * page_bytes
    scored = 2 * step.generated_pairs * (256 + 64) + 2 * step.generated_pairs * 256  # scores, then sums of latents
    expanded = 2 * prompt_context * 256 * (64 + 128)  # latents to keys and values of a head
    attended = 2 * prompt_pairs * (64 + 64) + 2 * prompt_pairs * 128
    expanders = 32 * (64 + 128) * 256 * 2 if prompt else 0  # W_UK and W_UV
    latents = made * 32 * (256 + 64 + 256) * 2  # queries in latent space, sums of latents
    heads = prompt * 32 * (64 + 64 + 128) * 2  # queries, results
    return [
        norms(36, 4096, tokens, step.sampled),
        times(36, projections, whole=True),
        times(36 * 32, product(64, 256, made, PLAIN, BF16), whole=True),  # W_UK into the query
        times(36 * 32, product(256, 128, made, PLAIN, BF16), whole=True),  # W_UV out of the latents
        Operation(36 * (step.generated_context * entry + latents), 36 * 32 * scored, BF16, ATTENTION),
        Operation(
            36 * (prompt_context * entry + heads + expanders),
            36 * 32 * (expanded + attended),
            BF16,
            ATTENTION,
            whole_bytes=36 * expanders,
        ),
        # the router: four ids of 8 bytes and their weights of 4 out
        Operation(36 * (router + tokens * (4096 * 2 + 4 * 12)), 36 * 2 * tokens * 128 * 4096, BF16, DENSE),
        times(36, mlp(4096, 2048, tokens, reads, 5, expert, rate, EXPERTS)),
        product(4096, 131_072, step.sampled, PLAIN, BF16, written=4),  # the head, to logits in fp32
    ]


def small3(step: Step, weights: str, page_bytes: int, fp8_activations: bool = False) -> list[Operation]:
    """40 layers, 5120 wide; 32 query and 8 key-value heads of 128; an MLP 32,768 wide. Experts alone have 4 bits:
    all of this model is FP8 then."""
    dense = {"bf16": PLAIN, "fp8": CODES, "nvfp4": CODES}[weights]
    tokens = step.prompt_tokens + step.generated
    rate = FP8 if fp8_activations else BF16
    projections = together(
        product(5120, (32 + 8 + 8) * 128, tokens, dense, rate), product(32 * 128, 5120, tokens, dense, rate)
    )
    prompt_pairs = sum(chunk.pairs for chunk in step.prompts)
    prompt_context = sum(chunk.context for chunk in step.prompts)
    entry, heads = 2 * 8 * 128 * page_bytes, 32 * (128 + 128) * 2  # heads: a row's queries and results
    made, prompt = step.generated * heads, step.prompt_tokens * heads
    each_pair = 2 * 128 + 2 * 128  # a score, and a value's weight
    return [
        norms(40, 5120, tokens, step.sampled),
        times(40, projections),
        Operation(
            40 * (step.generated_context * entry + made),
            40 * 32 * step.generated_pairs * each_pair,
            BF16,
            ATTENTION,
        ),
        Operation(40 * (prompt_context * entry + prompt), 40 * 32 * prompt_pairs * each_pair, BF16, ATTENTION),
        times(40, mlp(5120, 32_768, tokens, 1 if tokens else 0, 1, dense, rate, DENSE)),
        product(5120, 131_072, step.sampled, PLAIN, BF16, written=4),  # the head, to logits in fp32
    ]


def norms(layers: int, hidden: int, tokens: int, sampled: int) -> Operation:
    """Two a layer of every row, the last one of rows whose logits are wanted: a sum and a residual in, the residual
    and the normed row out, and each time a weight for each value."""
    values = 4 * (2 * layers * tokens + sampled) + (2 * layers if tokens else 0) + (1 if sampled else 0)
    return Operation(hidden * values * 2, 0, BF16, MEMORY)


SIZES = {"small4": (small4, 36, 4096), "small3": (small3, 40, 5120)}


def take(
    model: str, device: str, step: Step, weights: str, page_bytes: int, fp8_activations: bool = False
) -> Taken:
    """A step on a device: "h200", "4xh100". Each operation takes what its bytes or its operations do, whichever is
    more; several cards send each other the other cards' rows twice a layer."""
    count, _, card = device.rpartition("x")
    cards, bytes_per_s = int(count or 1), BYTES_PER_S[card]
    operations_of, layers, hidden = SIZES[model]
    memory_s = arithmetic_s = num_bytes = operations = all_bytes_s = all_operations_s = 0.0
    for part in operations_of(step, weights, page_bytes, fp8_activations):
        divided = part.num_bytes - part.whole_bytes
        bytes_s = (divided / cards + part.whole_bytes) / bytes_per_s
        operations_s = part.operations / cards / part.rate
        if bytes_s / MEMORY >= operations_s / part.share:
            memory_s += bytes_s / MEMORY
        else:
            arithmetic_s += operations_s / part.share
        num_bytes += divided + cards * part.whole_bytes
        operations += part.operations
        all_bytes_s, all_operations_s = all_bytes_s + bytes_s, all_operations_s + operations_s
    tokens = step.prompt_tokens + step.generated
    sent = 2 * layers * tokens * hidden * 2 * (cards - 1) / cards
    return Taken(
        memory_s=memory_s,
        arithmetic_s=arithmetic_s,
        exchange_s=sent / LINK_BYTES_PER_S,
        overhead_s=1.0e-3 if cards == 1 else 1.8e-3,
        limit_s=max(all_bytes_s, all_operations_s),
        num_bytes=num_bytes,
        operations=operations,
    )
