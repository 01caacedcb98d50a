"""Limits of the KV cache."""

from __future__ import annotations

import msgspec


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resolved: `num_blocks` blocks of `block_tokens` tokens; `hash_key` keys the prefix digests (hex)."""

    block_tokens: int = 32
    num_blocks: int = 1024
    prefix_caching: bool = True
    hash_key: str = ""
