"""Memory of a GPU: what is left of it for the KV cache beside the weights and workspaces. No torch.

    workspaces   the largest of what a launched step holds at a time, what sampling its tokens does, and what a step
                 holds that is run before it is recorded
                 + the pool of the recorded steps: what the largest of them holds, as the others lie in its memory;
                   the logits that all write; and the driver's own of each recorded launch

What a step holds at a time is summed up here by its tensors; a test compares with all that a dry run allocates.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from cierzo.engine.cost.weights import NumberFormats, weight_bytes
from cierzo.engine.errors import ConfigError, amount
from cierzo.engine.graph_sizes import pairs
from cierzo.engine.model.config import GqaConfig, ModelConfig
from cierzo.kernels.formats.number_formats import formats_on

GIB = 1 << 30
USABLE_SHARE = 0.95  # of the free memory: the allocator's rounding, and CUDA's own needs
LEAST_WORKSPACE_BYTES = 4 * GIB  # whatever the sums say: no card has shown yet what CUDA and CuPy take beside them
# Of kernels/cuda/launch/sampling.py: tokens of the smallest piece of a long row, and bytes of a row and of a piece.
DRAWN_PIECE, DRAWN_ROW_BYTES, DRAWN_PIECE_BYTES = 1024, 8 * 5218, 8 * 3
# Of kernels/triton/split.py and flash.py, which import Triton; a test compares.
ROWS = 64
CUT = (512, 16, 1024)  # short splits' tokens, their number, long ones' tokens
WALKED, APART, PROGRAMS = (2048, 2, 4096), (256, 16, 1024), 128  # MLA's, if so many programs or more walk, or not
PARTIAL_BYTES = 256 << 20
SCORED_ROWS = 128  # of a prompt, whose logits are held at a time: worker/scoring.py's, which imports torch
WORKSPACE_TOKENS = 16_384
STAGED_PIXELS = 4  # images whose pixels a staging has room for: two in turn, each with as much again
LAUNCHES_PER_LAYER = 18  # more than any layer has; a test counts
LAUNCH_BYTES = 16 << 10  # of a recorded launch, in the driver: assumed, no card has shown it


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Limits of a step: its tokens, its sequences, those of a recorded step (0: none is recorded), the tokens of a
    sequence, and the embeddings of images that are kept between steps."""

    budget_tokens: int
    max_running: int
    graph_sequences: int
    max_model_len: int
    image_cache_tokens: int = 0


def free_bytes() -> int | None:
    """Free memory of the first GPU that the driver lists; None without driver or card."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return int(done.stdout.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def kv_room_bytes(
    model: ModelConfig,
    weights: str,
    free: int,
    limits: StepLimits,
    token_bytes: int,
    cards: int = 1,
    head: str = "",
) -> int:
    """Bytes that are left for the KV cache of `free` bytes on each of `cards` GPUs, between which the weights are
    divided. token_bytes: of a token in the cache. head: number format of lm_head, where it is another than that
    which follows from the weights'. Raises ConfigError, with the numbers, if nothing is left."""
    plain = "float32" if weights == "float32" else "bf16"

    def taken_by(format: str) -> int:
        return weight_bytes(model, NumberFormats(weights=format, plain=plain, head=head))

    needed = taken_by(weights)
    usable = int(cards * free * USABLE_SHARE)
    cached_tokens = max(usable - needed, 0) // token_bytes
    workspaces = cards * max(LEAST_WORKSPACE_BYTES, workspace_bytes(model, limits, cached_tokens))
    if usable <= needed + workspaces:
        each = f"each of {cards} GPUs" if cards > 1 else "the GPU"
        taken = f"weights in {weights} take {amount(needed, GIB, up=True)} GiB"
        taken += f", workspaces {amount(workspaces, GIB, up=True)}"
        fitting = [format for format in formats_on("cuda") if taken_by(format) + workspaces < usable]
        advice = f"; weights in {' or '.join(fitting)} would leave some" if fitting else ""
        raise ConfigError(
            f"{each} has {amount(free, GIB)} GiB free; {taken}: nothing is left for the KV cache{advice}",
            field="weights",
            limit=f"{amount(usable, GIB)} GiB",
            value=f"{amount(needed + workspaces, GIB, up=True)} GiB",
        )
    return usable - needed - workspaces


def workspace_bytes(model: ModelConfig, limits: StepLimits, cached_tokens: int) -> int:
    """Bytes of everything beside weights and cache. cached_tokens: what the cache holds at most."""
    logits = max(limits.max_running, SCORED_ROWS)
    launched = max(launched_bytes(model, limits.budget_tokens), sampled_bytes(model, logits))
    images = images_bytes(model, limits.image_cache_tokens)
    most = min(limits.graph_sequences, limits.max_running)
    if not most:
        return launched + images
    found = pairs(most, limits.max_model_len, cached_tokens)
    each = [replayed_bytes(model, *pair, limits.max_model_len) for pair in found]
    # Recordings share memory, the first of them most of it; what one of fewer items needs more (MLA's, with a
    # program for each part) is another piece.
    replayed = each[0] + (max(each) if max(each) > each[0] else 0)
    launches = len(found) * model.num_layers * LAUNCHES_PER_LAYER
    recorded = replayed + 4 * most * model.vocab_size + launches * LAUNCH_BYTES
    return max(launched, replayed) + recorded + images


def images_bytes(model: ModelConfig, num_kept: int) -> int:
    """Bytes of the embeddings of images that are kept, or of the largest image, and of its pixels on their way to
    the device (staging.py); what the tower holds while it sees one comes on top."""
    vision = model.vision
    if vision is None:
        return 0
    side = vision.max_side_px // vision.unit_px
    return 2 * model.hidden_size * max(num_kept, side * side) + STAGED_PIXELS * 3 * 4 * vision.max_side_px**2


def launched_bytes(model: ModelConfig, rows: int) -> int:
    """Bytes that a launched step of so many rows holds at a time, but for logits."""
    gathered = WORKSPACE_TOKENS * _gathered_values(model) * 2
    return rows * max(_mlp_bytes(model), _attention_bytes(model)) + max(gathered, PARTIAL_BYTES)


def sampled_bytes(model: ModelConfig, rows: int) -> int:
    """Bytes that sampling holds: fp32 logits, those of the rows that are chosen for at a time where others wait for
    their grammars, those of the rows that are drawn, and log-probabilities; and what draws leave between their
    launches."""
    return 4 * 4 * rows * model.vocab_size + drawn_bytes(rows, model.vocab_size)


def drawn_bytes(rows: int, vocab_size: int) -> int:
    """Bytes that a draw leaves between its launches: bins and a list of each row, numbers of each of its pieces;
    and the tokens."""
    return rows * (DRAWN_ROW_BYTES + -(-vocab_size // DRAWN_PIECE) * DRAWN_PIECE_BYTES + 8)


def replayed_bytes(model: ModelConfig, size: int, bound: int, max_model_len: int) -> int:
    """Bytes that a recorded step of so many sequences and tokens holds at a time, its logits included."""
    heads, tiles, width = _partial_sizes(model)
    item = 4 * heads * ROWS * (width + 2)
    cut = CUT
    if not isinstance(model.attention, GqaConfig):
        cut = WALKED if min(_items(WALKED, tiles, size, bound, max_model_len)) >= PROGRAMS else APART
    bounded, all_of_them = _items(cut, tiles, size, bound, max_model_len)
    items = bounded if bounded < all_of_them else min(all_of_them, max(1, PARTIAL_BYTES // item))
    rows = max(_mlp_bytes(model), _attention_bytes(model))
    return items * item + size * (rows + 4 * model.vocab_size)


def _items(cut: tuple[int, int, int], tiles: int, size: int, bound: int, longest: int) -> tuple[int, int]:
    """Most splits of `size` contexts with so many tiles of rows: of `bound` tokens in all, as split.py's
    Splits.most has it, and each of `longest` tokens."""
    short, shorts, long = cut
    alike, rest = bound / size, longest - short * shorts
    splits = min(alike / short, shorts) + max(alike - short * shorts, 0) / long
    each = -(-longest // short) if rest <= 0 else shorts + -(-rest // long)
    return tiles * (size + int(size * splits)), tiles * size * each


def _mlp_bytes(model: ModelConfig) -> int:
    """Bytes of a row in an MLP: the residual, the norm's result and two more of its width; the inner values, in 16
    bits and in FP8; of experts, for each slot, those, what it reads in FP8, and what it gives."""
    streams, moe = 4 * 2 * model.hidden_size, model.moe
    dense = 3 * model.mlp_width
    if moe is None:
        return streams + dense
    slots = moe.experts_per_token + moe.num_shared_experts
    experts = slots * 3 * (model.hidden_size + moe.expert_width) + 3 * 4 * moe.num_experts
    return streams + (max(dense, experts) if moe.first_dense_layers else experts)


def _attention_bytes(model: ModelConfig) -> int:
    """Bytes of a row in attention: the same four, queries twice, latents or keys and values, what attention gives,
    and its sums in fp32 between rounds."""
    heads, attention = model.num_heads, model.attention
    if isinstance(attention, GqaConfig):
        query, result, latent = (
            attention.head_dim,
            attention.head_dim,
            2 * attention.num_kv_heads * attention.head_dim,
        )
    else:
        rank, rope = attention.kv_lora_rank, attention.qk_rope_head_dim
        query, result = rank + rope, max(rank, attention.v_head_dim)
        latent = (attention.q_lora_rank or 0) * 2 + rank + rope
    return 4 * 2 * model.hidden_size + 2 * latent + heads * (2 * 2 * query + 6 * result)


def _gathered_values(model: ModelConfig) -> int:
    """Number of a token's values in a prompt's workspace: keys and values of all heads, and latents."""
    attention = model.attention
    if isinstance(attention, GqaConfig):
        return 2 * attention.num_kv_heads * attention.head_dim
    keys_values = model.num_heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    return keys_values + attention.kv_lora_rank + attention.qk_rope_head_dim


def _partial_sizes(model: ModelConfig) -> tuple[int, int, int]:
    """Key-value heads of decoding, tiles of the query heads that share one, and columns of a result."""
    attention = model.attention
    if isinstance(attention, GqaConfig):
        heads, width = attention.num_kv_heads, attention.head_dim
    else:
        heads, width = 1, attention.kv_lora_rank
    return heads, -(-model.num_heads // heads // ROWS), width
