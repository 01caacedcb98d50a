"""How many blocks the KV cache gets, and how long a request may be: what is given, or what is of use. No torch."""

from __future__ import annotations

from cierzo.cache.layout import GIB, CacheLayout
from cierzo.engine.errors import ConfigError
from cierzo.engine.model.config import ModelConfig

SERVED_CONTEXT_TOKENS = 262_144  # the longest context that the makers of Small 4 serve (model.md 1.1)
AUTO_KV_MEMORY_SHARE = 0.25
AUTO_KV_REQUEST_TOKENS = 8192
AUTO_KV_BYTES = 8 * GIB


def plan_kv(
    model: ModelConfig,
    layout: CacheLayout,
    room: int,
    *,
    max_model_len: int | None,
    kv_cache_gib: float | None,
    max_running: int,
    on_gpu: bool,
) -> tuple[int, int]:
    """(num_blocks, max_model_len) within `room` bytes; what is None is chosen. Raises ConfigError, with numbers,
    for what is given and does not fit; also where neither the user nor the checkpoint says how long a request may
    be."""
    wanted = _longest(model.max_position_embeddings, max_model_len)
    if kv_cache_gib is not None:
        _require_memory(kv_cache_gib, room)
        num_blocks = int(kv_cache_gib * GIB // layout.bytes_per_block)
    else:
        num_blocks = _auto_blocks(max_running, on_gpu, wanted, layout, room)
    held_tokens = num_blocks * layout.block_tokens
    if max_model_len is not None and wanted > held_tokens:
        needed_gib = -(-wanted // layout.block_tokens) * layout.bytes_per_block / GIB
        raise ConfigError(
            f"max_model_len {wanted:,} needs {needed_gib:.3f} GiB of KV cache "
            f"({layout.bytes_per_token:,} bytes per token); the budget of "
            f"{num_blocks * layout.bytes_per_block / GIB:.3f} GiB holds {held_tokens:,} tokens",
            field="max_model_len",
            limit=held_tokens,
            value=wanted,
        )
    if num_blocks < 1:
        budget = "the free memory" if kv_cache_gib is None else f"kv_cache_gib {kv_cache_gib:g}"
        raise ConfigError(
            f"{budget} holds no block of {layout.bytes_per_block:,} bytes",
            field="kv_cache_gib",
            limit=f">= {layout.bytes_per_block / GIB:.6f}",
            value=kv_cache_gib,
        )
    return num_blocks, min(wanted, held_tokens)


def _longest(positions: int | None, max_model_len: int | None) -> int:
    """How many tokens a request may have, as far as the model goes. positions: its max_position_embeddings."""
    if positions is None and max_model_len is None:
        raise ConfigError(
            "params.json says neither max_position_embeddings nor max_seq_len: give max_model_len, or add "
            "max_position_embeddings to it (131072 for Mistral Small 3.1, 32768 for Mistral 7B v0.3)",
            field="max_model_len",
            limit="the positions that the model was trained for",
        )
    wanted = max_model_len or min(positions or SERVED_CONTEXT_TOKENS, SERVED_CONTEXT_TOKENS)
    if positions is not None and wanted > positions:
        raise ConfigError(
            f"max_model_len {wanted:,} is more than the model's max_position_embeddings {positions:,}",
            field="max_model_len",
            limit=positions,
            value=wanted,
        )
    return wanted


def _require_memory(kv_cache_gib: float, room: int) -> None:
    """Pages cost memory only as they fill: a budget that is not there would end the server late, and for good."""
    free_gib = room / GIB
    if kv_cache_gib > free_gib:
        raise ConfigError(
            f"kv_cache_gib is {kv_cache_gib:g}, and {free_gib:.1f} GiB of memory are free",
            field="kv_cache_gib",
            limit=f"{free_gib:.1f}",
            value=kv_cache_gib,
        )


def _auto_blocks(max_running: int, on_gpu: bool, max_model_len: int, layout: CacheLayout, room: int) -> int:
    """A share of the free memory, all that is left on a GPU, but no more than four longest requests or a full batch
    of usual ones use."""
    affordable_bytes = room if on_gpu else min(AUTO_KV_BYTES, int(room * AUTO_KV_MEMORY_SHARE))
    usual_tokens = max_running * min(max_model_len, AUTO_KV_REQUEST_TOKENS)
    useful_tokens = min(max_running * max_model_len, max(4 * max_model_len, usual_tokens))
    useful_blocks = -(-useful_tokens // layout.block_tokens) + max_running
    return min(affordable_bytes // layout.bytes_per_block, useful_blocks)
