"""Bytes of one token and one block of KV cache, and how many requests fit. No torch."""

from __future__ import annotations

import sys
from typing import Literal

import msgspec

CacheDtype = Literal["bfloat16", "float32", "fp8", "int8"]
VALUE_BYTES: dict[str, int] = {"bfloat16": 2, "float32": 4, "fp8": 1, "int8": 1}
SCALE_BYTES = 4  # int8: of each latent, rope key, key and value
PLANNED_CONTEXTS = (4_096, 32_768, 262_144)  # tokens
KIB = 1 << 10
GIB = 1 << 30


class CacheLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shape of one layer's pages (B blocks of S = `block_tokens` tokens)::

        mla   latents [B, S, latent_values]   latent_values = R + P: normed latent, then rotated rope key
        gqa   keys, values [B, S, num_kv_heads, head_dim] each

    At fp8 values are e4m3 without a scale. At int8 the last axis is of bytes, with the scales behind the values:
    R + P + 8, head_dim + 4.
    The fields of the other kind are 0.
    """

    kind: Literal["mla", "gqa"]
    num_layers: int
    block_tokens: int
    dtype: CacheDtype
    latent_values: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0

    @property
    def page_width(self) -> int:
        """Length of the pages' last axis."""
        values, num_scales = (self.latent_values, 2) if self.kind == "mla" else (self.head_dim, 1)
        return values + num_scales * SCALE_BYTES if self.dtype == "int8" else values

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers."""
        rows = 1 if self.kind == "mla" else 2 * self.num_kv_heads
        return self.num_layers * rows * self.page_width * VALUE_BYTES[self.dtype]

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        return self.bytes_per_token * self.block_tokens


class CapacityPlan(msgspec.Struct, frozen=True):
    """Capacity of a pool of `num_blocks` blocks; `str()` is the text printed at start."""

    bytes_per_token: int
    block_tokens: int
    num_blocks: int
    max_model_len: int = sys.maxsize  # no request is longer

    @property
    def num_tokens(self) -> int:
        """Tokens that fit."""
        return self.num_blocks * self.block_tokens

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_tokens * self.bytes_per_token

    def requests(self, context_tokens: int) -> int:
        """How many requests of this length (prompt and output) fit side by side, sharing nothing."""
        return self.num_blocks // -(-context_tokens // self.block_tokens)

    def __str__(self) -> str:
        lengths = [*(tokens for tokens in PLANNED_CONTEXTS if tokens <= self.max_model_len)]
        if self.max_model_len < PLANNED_CONTEXTS[-1] and self.max_model_len not in lengths:
            lengths.append(self.max_model_len)
        fits = ", ".join(f"{self.requests(tokens):,} of {_length(tokens)}" for tokens in lengths)
        return (
            f"KV cache       {self.total_bytes / GIB:.3f} GiB: {self.num_blocks:,} blocks of "
            f"{self.block_tokens} tokens, {self.num_tokens:,} tokens at {self.bytes_per_token:,} bytes each\n"
            f"fits requests  {fits} tokens"
        )


def _length(tokens: int) -> str:
    return f"{tokens:,}" if tokens % KIB else f"{tokens // KIB}k"


def plan_capacity(layout: CacheLayout, num_blocks: int, max_model_len: int = sys.maxsize) -> CapacityPlan:
    """The plan of a pool of `num_blocks` blocks with this layout; no request is longer than `max_model_len`."""
    return CapacityPlan(layout.bytes_per_token, layout.block_tokens, num_blocks, max_model_len)
