"""Bytes of a GPU's memory that work on meta tensors would take."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUNDED = 512  # bytes: torch's allocator gives multiples of it


class _Sums(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = -(-storage.nbytes() // ROUNDED) * ROUNDED
            self.now += self._alive[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._take, key)

    def _take(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that its new tensors hold at a time; what it only views counts too."""
    with _Sums() as sums:
        work()
    return sums.peak
