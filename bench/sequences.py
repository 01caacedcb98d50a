"""Sequences in a pool of pages, computed by hand as the engine would: what benchmarks of the model run on."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from cierzo.cache.pool import MlaPages
from cierzo.engine.config import EngineConfig
from cierzo.engine.worker.runner import load_model
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ops.block import StepRows


class Sequences:
    """`count` sequences of up to `max_tokens` tokens each, their blocks scattered over the pool."""

    def __init__(self, config: EngineConfig, count: int, max_tokens: int) -> None:
        self.model, self.pool, self.kernels = load_model(config)
        self._block_tokens = config.cache.block_tokens
        self._vocab_size = config.model.vocab_size
        width = -(-max_tokens // self._block_tokens)
        order = torch.randperm(self.pool.num_blocks, generator=torch.Generator().manual_seed(0)).int()
        self._tables = order[: count * width].view(count, width)

    def fill(self) -> None:
        """Synthetic entries in every page, of the size that a norm leaves."""
        for pages in self.pool.layers:
            tensors = (pages.latents,) if isinstance(pages, MlaPages) else (pages.keys, pages.values)
            for tensor in tensors:
                flat = tensor.view(-1)
                first = flat[: 1 << 20]
                first.copy_(
                    torch.randint(256, first.shape) if tensor.dtype == torch.uint8 else torch.randn(first.shape)
                )
                for part in flat.split(1 << 20)[1:]:
                    part.copy_(first[: len(part)])

    def step(self, pieces: list[tuple[int, int]], generated: bool) -> float:
        """Compute `count` tokens from position `start` of sequence i, for the i-th (start, count) -> seconds.

        The logits of each sequence's last row are computed too.
        """
        rows = self.rows(pieces, generated)
        last = torch.tensor([count for _, count in pieces]).cumsum(0) - 1
        begin = time.perf_counter()
        self.logits(rows, last)
        return time.perf_counter() - begin

    def logits(self, rows: StepRows, logit_rows: Tensor) -> Tensor:
        """Compute one step -> fp32 logits of `logit_rows`."""
        return self.model.logits(rows, self.pool, logit_rows)

    def rows(self, pieces: list[tuple[int, int]], generated: bool) -> StepRows:
        """The step in which sequence i computes the i-th (start, count), all of them in one form."""
        positions = torch.cat([torch.arange(start, start + count) for start, count in pieces])
        owners = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor([count for _, count in pieces]))
        blocks = self._tables[owners, positions // self._block_tokens].long()
        slots = blocks * self._block_tokens + positions % self._block_tokens
        lengths, contexts = [count for _, count in pieces], [start + count for start, count in pieces]
        segments = PagedQueries.of(lengths, contexts, list(range(len(pieces))), self._tables)
        groups = (segments, PagedQueries.of([], [], [], self._tables))
        return StepRows(
            (positions * 31 + owners * 17) % self._vocab_size,
            positions,
            slots,
            0 if generated else len(positions),
            *(groups[::-1] if generated else groups),
        )
