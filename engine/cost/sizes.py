"""Sizes of a model's layers as plain numbers, and its matrices by kind. No msgspec: see __init__.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Role = Literal["linear", "experts", "latent", "router", "head", "embedding"]  # latent: MLA's W_UK and W_UV


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Sizes of a model's layers, and its vocabulary. Zeros: the model has no such part.

    window: tokens that a row sees, 0 is all; sinks: whether heads have them. Both of GQA alone. shared_width: of
    the experts that every token goes to. dense_layers: layers with a dense MLP in place of experts. value_bytes:
    bytes of an activation.
    """

    name: str = ""
    hidden: int = 0
    heads: int = 0
    vocab: int = 0
    mlp_width: int = 0
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
    shared_width: int = 0
    layers: int = 1
    dense_layers: int = 0
    value_bytes: int = 2

    @property
    def rotated(self) -> int:
        """Values of a head that are rotated by their position."""
        return self.rope or self.head_dim

    @property
    def page_values(self) -> int:
        """Values that a token keeps in one layer's cache."""
        return self.rank + self.rope or 2 * self.kv_heads * self.head_dim

    @property
    def projections(self) -> list[tuple[int, int]]:
        """(k, n) of the dense products around a layer's attention."""
        hidden, heads = self.hidden, self.heads
        if not self.rank:
            return [(hidden, (heads + 2 * self.kv_heads) * self.head_dim), (heads * self.head_dim, hidden)]
        queries = heads * (self.nope + self.rope)
        down = (hidden, (self.query_rank or queries) + self.rank + self.rope)
        up = [(self.query_rank, queries)] if self.query_rank else []
        return [down, *up, (heads * self.value_dim, hidden)]

    def matrices(self) -> Iterator[tuple[Role, int, int, int]]:
        """(kind, count, n, k) of all matrices [n, k] of the model, as they lie in memory."""
        hidden, sparse = self.hidden, self.layers - self.dense_layers
        mlps: list[tuple[Role, int, int]] = [
            ("linear", self.dense_layers, self.mlp_width),
            ("experts", sparse * self.experts, self.expert_width),
            ("experts", sparse if self.shared_width else 0, self.shared_width),
        ]
        for k, n in self.projections:
            yield "linear", self.layers, n, k
        for role, count, width in mlps:
            yield role, count, 2 * width, hidden
            yield role, count, hidden, width
        yield "latent", self.layers * self.heads, 2 * self.nope + self.value_dim, self.rank  # W_UK in both orders
        yield "router", sparse, self.experts, hidden
        yield "head", 1, self.vocab, hidden
        yield "embedding", 1, self.vocab, hidden  # apart from the head, even if the two are tied
