"""A stand-in for a device of its own, on the CPU: who would make the host wait for it is refused.

Within `Card()`, tensors that are made on "cuda" are `OnCard`: their memory is the host's and every operation is
torch's own, but the host cannot read them (`item`, `tolist`, `numpy`, `nonzero`, a mask as an index ..), they do
not mix with the host's tensors, and copies between the two go through pinned memory without waiting, or not at all.
What is copied to the host arrives when an event that was recorded after it is waited for; until then the memory
there is poisoned. What is copied to the device must lie untouched until such an event.

Use with monkeypatch: torch.cuda.Event becomes `card.event`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import cuda_on_cpu
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda")
READS = {
    *("item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "is_nonzero", "equal", "allclose", "unique"),
    *("bincount", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__", "__repr__"),
}
INDEXING = {"__getitem__", "__setitem__"}
POISON = 0xFF


class Waits(AssertionError):
    """The host would wait for the device, or use what is not there yet."""


class OnCard(torch.Tensor):
    """A tensor on the card. Views and results of operations are on it too."""

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def get_device(self) -> int:
        """The only one."""
        return 0


def is_card(device: Any) -> bool:
    """Whether a device, or its name, is the card."""
    return device is not None and torch.device(device).type == "cuda"


class CardBackend(cuda_on_cpu.CpuBackend):
    """CUDA C++ kernels on the card's memory."""

    device_type = "cuda"


class Card(TorchFunctionMode):
    """The rules, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._pinned: dict[int, Tensor] = {}
        # Copies under way, in order: memory of the host, and what it must hold until then, or holds from then on.
        self._copies: deque[tuple[Tensor, Tensor, bool]] = deque()
        self._done = 0

    def event(self) -> Any:
        """In the place of torch.cuda.Event."""
        return _Event(self)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name == "to":
            return self._to(func, args, kwargs)
        if name == "copy_":
            return self._copy(*args, **kwargs)
        if any(isinstance(tensor, OnCard) for tensor in tensors):
            self._check(name, args, tensors, kwargs)
        pinned = kwargs.pop("pin_memory", False)
        made_there = is_card(kwargs.get("device"))
        if made_there:
            kwargs["device"] = "cpu"
        result = self._make(func, args, kwargs) if made_there else func(*args, **kwargs)
        if pinned:
            self._pinned[result.untyped_storage().data_ptr()] = result
        return result.as_subclass(OnCard) if made_there else result

    def _make(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a tensor on the card; `kwargs` say "cpu", where its memory is."""
        return func(*args, **kwargs)

    def _check(self, name: str, args: tuple[Any, ...], tensors: list[Tensor], kwargs: dict[str, Any]) -> None:
        if name in READS or (name == "repeat_interleave" and "output_size" not in kwargs):
            raise Waits(f"{name} of a tensor on the card")
        if name in INDEXING and any(
            tensor.dtype == torch.bool for tensor in tree_leaves(args[1]) if is_tensor(tensor)
        ):
            raise Waits(f"{name} by a mask")
        if any(not isinstance(tensor, OnCard) and tensor.dim() > 0 for tensor in tensors):
            raise Waits(f"{name} mixes tensors of the card and of the host")

    def _to(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source = args[0]
        devices = [arg for arg in (*args[1:], kwargs.get("device")) if isinstance(arg, str | torch.device)]
        dtypes = [arg for arg in (*args[1:], kwargs.get("dtype")) if isinstance(arg, torch.dtype)]
        if isinstance(source, OnCard):
            if any(not is_card(device) for device in devices):
                raise Waits("to the host")
            return func(source, *dtypes) if dtypes else source
        if not any(is_card(device) for device in devices):
            return func(*args, **kwargs)
        return self._sent(func(source, *dtypes) if dtypes else source, kwargs.get("non_blocking", False))

    def _sent(self, source: Tensor, non_blocking: bool) -> Tensor:
        self._send(source, non_blocking)
        return source.clone().as_subclass(OnCard)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if isinstance(target, OnCard) and not isinstance(source, OnCard):
            self._send(source, non_blocking)
        if isinstance(source, OnCard) and not isinstance(target, OnCard):
            self._require_pinned(target, non_blocking, "to the host")
            self._copies.append((target, source.clone().as_subclass(Tensor), True))
            target.view(torch.uint8).fill_(POISON)
            return target
        plain = source.as_subclass(Tensor)
        return target.as_subclass(Tensor).copy_(plain).as_subclass(type(target))

    def _send(self, source: Tensor, non_blocking: bool) -> None:
        self._require_pinned(source, non_blocking, "to the card")
        self._copies.append((source, source.clone(), False))

    def _require_pinned(self, memory: Tensor, non_blocking: bool, where: str) -> None:
        if not non_blocking:
            raise Waits(f"a copy {where} that waits")
        if memory.untyped_storage().data_ptr() not in self._pinned:
            raise Waits(f"a copy {where} past pinned memory")

    def begun(self) -> int:
        """How many copies were begun so far."""
        return self._done + len(self._copies)

    def finish(self, copies: int) -> None:
        """The first so many copies of all are now done."""
        while self._done < copies:
            memory, there, arrives = self._copies.popleft()
            self._done += 1
            if arrives:
                memory.copy_(there)
            elif not torch.equal(memory.view(torch.uint8), there.view(torch.uint8)):
                raise Waits("memory was written to while a copy from it could still run")


class _Event:
    def __init__(self, card: Card) -> None:
        self._card = card
        self._copies = 0

    def record(self) -> None:
        self._copies = self._card.begun()

    def synchronize(self) -> None:
        self._card.finish(self._copies)


def is_tensor(value: Any) -> bool:
    """Of any device."""
    return isinstance(value, Tensor)
