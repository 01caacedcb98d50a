"""torch's tensors in the card's memory, and torch's operations on them in the card's queue.

`OnStream` is below torch's dispatcher: views are made at once, anything else that touches the card's memory is
queued, and gets its memory at once. What waits holds addresses, as a launch does, and no tensors: so memory that is
freed too early is found here too. `StreamedCard` adds this to the rules of `Card`.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from card import Card, OnCard, Waits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from standin.library import POISON, IllegalAddress, Library, is_of_card

ALIASES = {"aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::detach"}
FROM_DATA = {"tensor", "as_tensor", "from_numpy"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies. Holds no memory."""

    address: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        return cls(tensor.data_ptr(), tensor.dtype, tuple(tensor.size()), tuple(tensor.stride()))

    def tensor(self, bytes: int | None = None) -> Tensor:
        """The tensor there."""
        if 0 in self.size:
            return torch.empty_strided(self.size, self.stride, dtype=self.dtype)
        flat = memory_at(self.address, self.bytes if bytes is None else bytes).view(self.dtype)
        return flat.as_strided(self.size, self.stride)

    @property
    def bytes(self) -> int:
        """Up to the last element's end."""
        if 0 in self.size:
            return 0
        last = sum((count - 1) * step for count, step in zip(self.size, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


def memory_at(address: int, bytes: int) -> Tensor:
    """uint8 [bytes]: the memory there. Nothing keeps it."""
    return torch.frombuffer((ctypes.c_uint8 * bytes).from_address(address), dtype=torch.uint8)


class Stream:
    """The stream that work goes to now, and whether it is being recorded."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.handle = 0
        self.recording = False

    def enqueue(self, function: Callable[[], None]) -> None:
        """See Library.enqueue."""
        self.library.enqueue(self.handle, function, kept=self.recording)

    def synchronize(self) -> None:
        """Wait for it."""
        self.library.call("cuStreamSynchronize", self.handle)

    def allocate(self, like: Tensor) -> Tensor:
        """Memory on the card for a tensor of this size, strides and dtype; freed in the order of the stream."""
        place = Place.of(like)
        bytes = max(place.bytes, 1)
        address = self.library.made("cuMemAllocAsync", bytes, self.handle)
        buffer = (ctypes.c_uint8 * bytes).from_address(address)
        weakref.finalize(buffer, self._free, address).atexit = False
        flat = torch.frombuffer(buffer, dtype=torch.uint8)
        if 0 in place.size:
            return flat[:0].view(like.dtype).as_strided(place.size, place.stride)
        return flat.view(like.dtype).as_strided(place.size, place.stride)

    def _free(self, address: int) -> None:
        self.library.raw("cuMemFreeAsync", address, self.handle)


class OnStream(TorchDispatchMode):
    """torch's operations on the card's memory, queued."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream
        self.making = False  # what is made now lies on the card
        self.waiting = False  # the host may wait for the card

    def is_there(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the card."""
        return is_of_card(tensor.untyped_storage().data_ptr())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        flat, spec = tree_flatten((args, kwargs or {}))
        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        there = any(self.is_there(tensor) for tensor in tensors)
        if there or self.making:
            with self:  # within torch.inference_mode what is made of other operations comes as a whole
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        schema = func._schema
        written = [
            argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments
        ]
        aliased = any(argument.alias_info is not None for argument in schema.arguments)
        if not (there or self.making) or (there and not any(written) and aliased) or schema.name in ALIASES:
            return func(*args, **(kwargs or {}))
        if self.waiting:
            return self._at_once(func, args, kwargs or {}, any(written))
        if "_local_scalar_dense" in schema.name or "nonzero" in schema.name:
            raise Waits(f"{schema.name} of a tensor on the card")
        places = [self._place(leaf) for leaf in flat]

        def compute() -> Any:
            found, named = tree_unflatten([self._value(place) for place in places], spec)
            return func(*found, **named)

        if any(written):
            self._stream.enqueue(undisturbed(lambda: compute()))
            names = [argument.name for argument in schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            targets = [given[name] for name, is_written in zip(names, written, strict=True) if is_written]
            return targets[0] if len(schema.returns) == 1 else tuple(targets)
        return self._made(func, flat, spec, compute)

    def _at_once(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], in_place: bool) -> Any:
        """As if the host waited after every operation: sizes may depend on values, and values are read."""
        self._stream.synchronize()
        results = func(*args, **kwargs)

        def there(leaf: Any) -> Any:
            return self._stream.allocate(leaf).copy_(leaf) if isinstance(leaf, Tensor) else leaf

        with _disable_current_modes():
            return results if in_place else tree_map(there, results)

    def _made(self, func: Any, flat: list[Any], spec: Any, compute: Callable[[], Any]) -> Any:
        """Results in memory of their own: now their sizes, later their values."""
        with _disable_current_modes():
            args, kwargs = tree_unflatten([_meta(leaf) for leaf in flat], spec)
            if "device" in kwargs or self.making:
                kwargs["device"] = torch.device("meta")
            shapes = func(*args, **kwargs)
            results = tree_map(
                lambda leaf: self._stream.allocate(leaf) if isinstance(leaf, Tensor) else leaf, shapes
            )
        if "empty" not in func._schema.name:
            targets = [Place.of(leaf) for leaf in tree_flatten(results)[0] if isinstance(leaf, Tensor)]

            def fill() -> None:
                values = [leaf for leaf in tree_flatten(compute())[0] if isinstance(leaf, Tensor)]
                for target, value in zip(targets, values, strict=True):
                    self._value(target).copy_(value)

            self._stream.enqueue(undisturbed(fill))
        return results

    def _place(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return Place.of(leaf) if self.is_there(leaf) else leaf.clone()  # what the host gives is read now

    def _value(self, place: Any) -> Any:
        if not isinstance(place, Place):
            return place
        if place.bytes > self._stream.library.extent(place.address):
            raise IllegalAddress(f"torch reads or writes {place}, which is freed memory")
        return place.tensor()


def undisturbed(function: Callable[[], Any]) -> Callable[[], None]:
    """A function for the queue: the modes of whoever waits then are not its own."""

    def run() -> None:
        with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
            function()

    return run


def _meta(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    plain = leaf.as_subclass(Tensor)
    if plain.dim() == 0 and not isinstance(leaf, OnCard):
        return torch.empty((), dtype=plain.dtype, device="meta")
    return torch.empty_strided(plain.size(), plain.stride(), dtype=plain.dtype, device="meta")


class StreamedCard(Card):
    """`Card` with memory and a queue of its own. Copies that wait are allowed within `loading`."""

    def __init__(self, library: Library) -> None:
        super().__init__()
        self.stream = Stream(library)
        self._below = OnStream(self.stream)

    def __enter__(self) -> StreamedCard:
        super().__enter__()
        self._below.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._below.__exit__(*error)
        super().__exit__(*error)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Copies may wait for the card: no step runs."""
        with self._waiting(True):
            yield

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Within `loading`: steps run, or are recorded, and nobody waits."""
        with self._waiting(False):
            yield

    @contextlib.contextmanager
    def _waiting(self, allowed: bool) -> Iterator[None]:
        before, self._below.waiting = self._below.waiting, allowed
        try:
            yield
        finally:
            self._below.waiting = before

    def values(self, tensor: Tensor) -> Tensor:
        """A tensor's values, for a test: waits for all that is queued."""
        self.stream.library.call("cuCtxSynchronize")
        return self.now(tensor)

    def now(self, tensor: Tensor) -> Tensor:
        """Bytes that lie there now, for a test."""
        found: list[Tensor] = []
        undisturbed(lambda: found.append(Place.of(tensor).tensor().clone()))()
        return found[0]

    def _check(self, name: str, *rest: Any) -> None:
        if not self._below.waiting:
            super()._check(name, *rest)

    def _make(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(func, "__name__", "") in FROM_DATA:
            return self._sent(func(*args, **kwargs), non_blocking=False)
        self._below.making = True
        try:
            return super()._make(func, args, kwargs)
        finally:
            self._below.making = False

    def _sent(self, source: Tensor, non_blocking: bool) -> Tensor:
        with _disable_current_modes():
            there = self.stream.allocate(source)
        return self._copy(there.as_subclass(OnCard), source, non_blocking)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        there, here = isinstance(target, OnCard), not isinstance(source, OnCard)
        if not there and here:
            return target.copy_(source)
        if there and not here:
            return target.as_subclass(Tensor).copy_(source.as_subclass(Tensor)).as_subclass(OnCard)
        waits = not non_blocking and self._below.waiting
        if not waits:
            self._require_pinned(
                source if there else target, non_blocking, "to the card" if there else "to the host"
            )
        place = Place.of(target if there else source)
        snapshot = source.clone() if there and not waits else None

        def send() -> None:
            if snapshot is not None and not torch.equal(snapshot.view(torch.uint8), source.view(torch.uint8)):
                raise Waits("memory was written to while a copy from it could still run")
            self._below._value(place).copy_(source)

        def bring() -> None:
            target.copy_(self._below._value(place))

        if not there:
            target.view(torch.uint8).fill_(POISON)
        self.stream.enqueue(undisturbed(send if there else bring))
        if waits:
            self.stream.synchronize()
        return target
