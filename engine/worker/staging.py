"""Between the host and a device of its own: one copy there and one back for a step, both through pinned memory.

A copy from or to ordinary memory would wait for all that the device has still to do. From pinned memory it goes its
way, in the order of the device's work, and the host goes on.

    host, pinned   [ array | array | .. ]  --copy-->  twin on the device, cut into the same arrays
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16  # bytes: where every array starts, as kernels want it
_TORCH = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.float32): torch.float32,
}


@dataclass(slots=True)
class _Pair:
    host: Tensor
    twin: Tensor
    copied: torch.cuda.Event | None = None  # the last copy from host to twin


class Staging:
    """Owns two pairs of memory, used in turn: a step may be staged while the one before still runs.

    A step's tensors are valid until the next but one is staged. That one waits, should the step's own copy still be
    under way: a prompt's chunks have no results, so that nobody else might wait for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._pairs = deque(_Pair(torch.empty(0, dtype=torch.uint8), torch.empty(0)) for _ in range(2))

    def to_device(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """Twins of the arrays, flat, through one copy that nobody waits for."""
        starts = [0, *accumulate(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)]
        pair = self._pairs[0]
        self._pairs.rotate()
        if pair.copied is not None:
            pair.copied.synchronize()
        if pair.host.numel() < starts[-1]:
            pair.host = torch.empty(2 * starts[-1], dtype=torch.uint8, pin_memory=self._pinned)
            pair.twin = torch.empty(2 * starts[-1], dtype=torch.uint8, device=self._device)
        host, twin = pair.host, pair.twin
        staging = host.numpy()
        for array, start in zip(arrays, starts, strict=False):
            staging[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        twin[: starts[-1]].copy_(host[: starts[-1]], non_blocking=True)
        pair.copied = self._event()
        return [
            twin[start : start + array.nbytes].view(_TORCH[array.dtype])
            for array, start in zip(arrays, starts, strict=False)
        ]

    def to_host(self, tensors: Sequence[Tensor]) -> Callable[[], list[NDArray[Any]]]:
        """Begin to copy, all in one; the function waits for the copy's end."""
        wide_first = sorted(tensors, key=lambda tensor: -tensor.element_size())  # so that each starts where it may
        whole = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in wide_first])
        arrived = torch.empty(whole.shape, dtype=torch.uint8, pin_memory=self._pinned)
        arrived.copy_(whole, non_blocking=True)
        pieces = arrived.split([tensor.numel() * tensor.element_size() for tensor in wide_first])
        twins = {id(tensor): piece for tensor, piece in zip(wide_first, pieces, strict=True)}
        done = self._event()

        def wait() -> list[NDArray[Any]]:
            if done is not None:
                done.synchronize()
            return [twins[id(tensor)].view(tensor.dtype).view(tensor.shape).numpy() for tensor in tensors]

        return wait

    def settle(self) -> None:
        """Wait for all that the device has to do."""
        if self._pinned:
            torch.cuda.synchronize(self._device)

    def _event(self) -> torch.cuda.Event | None:
        """Behind all that was begun; None where a copy is done when it returns."""
        if not self._pinned:
            return None
        event = torch.cuda.Event()
        event.record()
        return event
