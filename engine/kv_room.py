"""How many blocks the KV cache gets, and how long a request may be: what is given, or what is of use. No torch."""

from __future__ import annotations

from cierzo.cache.layout import GIB, CacheLayout
from cierzo.engine.errors import ConfigError, amount, refusal
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
    wanted = longest_request(model.max_position_embeddings, max_model_len)
    if kv_cache_gib is None:
        kv_bytes = _auto_bytes(max_running, on_gpu, wanted, layout, room)
    else:
        kv_bytes = _given_bytes(kv_cache_gib, room)
    num_blocks = kv_bytes // layout.bytes_per_block
    if num_blocks < 1:
        why = f"GiB, for one block of {layout.block_tokens} tokens"
        if kv_cache_gib is None:
            why += "; not given, it is what the free memory allows"
        limit = f"at least {amount(layout.bytes_per_block, GIB, up=True)}"
        raise refusal("kv_cache_gib", limit, kv_cache_gib or float(amount(kv_bytes, GIB)), why)
    held_tokens = num_blocks * layout.block_tokens
    if max_model_len is not None and wanted > held_tokens:
        held_gib = amount(num_blocks * layout.bytes_per_block, GIB)
        needed_gib = amount(-(-wanted // layout.block_tokens) * layout.bytes_per_block, GIB, up=True)
        why = f"what a KV cache of {held_gib} GiB holds; {wanted} tokens need {needed_gib}"
        raise refusal("max_model_len", f"at most {held_tokens}", wanted, why)
    return num_blocks, min(wanted, held_tokens)


def longest_request(positions: int | None, max_model_len: int | None) -> int:
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
        raise refusal("max_model_len", f"at most {positions}", wanted, "the model's max_position_embeddings")
    return wanted


def _given_bytes(kv_cache_gib: float, room: int) -> int:
    """Pages cost memory only as they fill: a budget that is not there would end the server late, and for good."""
    if kv_cache_gib > room / GIB:
        raise refusal("kv_cache_gib", f"at most {amount(room, GIB)}", kv_cache_gib, "GiB of memory that are free")
    return int(kv_cache_gib * GIB)


def _auto_bytes(max_running: int, on_gpu: bool, max_model_len: int, layout: CacheLayout, room: int) -> int:
    """A share of the free memory, all that is left on a GPU, but no more than four longest requests or a full batch
    of usual ones use."""
    affordable_bytes = room if on_gpu else min(AUTO_KV_BYTES, int(room * AUTO_KV_MEMORY_SHARE))
    usual_tokens = max_running * min(max_model_len, AUTO_KV_REQUEST_TOKENS)
    useful_tokens = min(max_running * max_model_len, max(4 * max_model_len, usual_tokens))
    useful_blocks = -(-useful_tokens // layout.block_tokens) + max_running
    return min(affordable_bytes, useful_blocks * layout.bytes_per_block)
