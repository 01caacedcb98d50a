"""Reading of a checkpoint ahead of its use: several threads, as many shards at a time as they reach into.

Parameters are mapped files. Whoever packs them, or copies them to a GPU, touches them page by page: a thread waits
for the disk, and a page that cannot be read kills the process. `ReadAhead` has the pages in memory before that, and
gives an error its words. It copies nothing; what it reads lies in the system's page cache.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.parameters import MatrixRequest, MatrixSource, Parameter
from cierzo.engine.weights import mapping
from cierzo.engine.weights.loader import Progress
from cierzo.engine.weights.names import map_names
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.kernels.formats.packed import Matrix

READERS = 8  # threads: disks in a network need several requests at a time
PIECE_BYTES = 8 << 20  # read at a time, at most
WINDOW_BYTES = 4 << 30  # read, and not yet asked for, at most: two of Small 4's largest matrices in FP8
GAP_BYTES = 1 << 20  # between tensors that are read as one
RELEASE_BYTES = 256 << 20  # of what a GPU's driver has read: then the pages are let go of

Read = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Span:
    """The addresses [begin, end) of a tensor. mapping: the number of the one that it lies in."""

    begin: int
    end: int
    name: str
    mapping: int


@dataclass(slots=True)
class _Reading:
    """A parameter that is being read: its tensors, and for each piece of them its future and addresses."""

    spans: list[_Span]
    pieces: list[tuple[Future[None], int, int]]
    is_used: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(span.end - span.begin for span in self.spans)


class ReadAhead:
    """Reads parameters in their order, layers first, at most `window_bytes` beyond what was waited for.

    Nothing is done before the first `wait`. Only the caller's thread may use it, as a context manager; at the end
    no thread is left. reader: whose files the parameters are mapped from. progress: called with (bytes waited for,
    bytes of all). read: reads the addresses [begin, end), raises OSError.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        reader: CheckpointReader,
        *,
        progress: Progress | None = None,
        threads: int = READERS,
        window_bytes: int = WINDOW_BYTES,
        read: Read = mapping.read_in,
    ) -> None:
        # Kept, so that their mappings stay. The order is that of their use: the embedding and the head come last.
        self._parameters = sorted(parameters.items(), key=lambda item: not item[0].startswith("model.layers."))
        self._place = {id(parameter): place for place, (_, parameter) in enumerate(self._parameters)}
        self._reader = reader
        self._reading: dict[int, _Reading] = {}  # by place
        self._ahead_bytes = self._used_bytes = 0
        self._progress = progress
        self._window_bytes = window_bytes
        self._read = read
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")

    def wait(self, parameters: Iterable[Parameter]) -> int:
        """Wait until the parameters are read, and give the bytes that were not waited for before.

        Raises CheckpointError naming the file and the tensor that cannot be read.
        """
        before = self._used_bytes
        for parameter in parameters:
            place = self._place.get(id(parameter))
            if place is not None:
                reading = self._begin(place)
                if not reading.is_used:
                    reading.is_used = True
                    self._ahead_bytes -= reading.num_bytes
                    self._go_ahead(place + 1)
                    self._finish(reading)
        return self._used_bytes - before

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop what is not begun, and wait for the pieces under way: their mappings must outlive them."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    @cached_property
    def _ranges(self) -> list[tuple[int, int, str]]:
        """The mappings of the checkpoint's files."""
        return sorted(mapping.mapped_ranges(self._reader.files))

    @cached_property
    def _total_bytes(self) -> int:
        spans = (span for name, parameter in self._parameters for span in _mapped(name, parameter, self._ranges))
        return sum(span.end - span.begin for span in spans)

    def _begin(self, place: int) -> _Reading:
        """Have a parameter read, if that has not begun."""
        if place not in self._reading:
            spans = _mapped(*self._parameters[place], self._ranges)
            pieces = [(self._pool.submit(self._read, *piece), *piece) for piece in _pieces(spans)]
            self._reading[place] = _Reading(spans, pieces)
            self._ahead_bytes += self._reading[place].num_bytes
        return self._reading[place]

    def _go_ahead(self, place: int) -> None:
        while place < len(self._parameters) and self._ahead_bytes < self._window_bytes:
            self._begin(place)
            place += 1

    def _finish(self, reading: _Reading) -> None:
        """Wait until a parameter is read."""
        for future, begin, end in reading.pieces:
            try:
                future.result()
            except OSError as error:
                self._raise(reading.spans, begin, end, error)
        self._used_bytes += reading.num_bytes
        if self._progress is not None:
            self._progress(self._used_bytes, self._total_bytes)

    def _raise(self, spans: list[_Span], begin: int, end: int, error: OSError) -> None:
        """Raise CheckpointError naming the first tensor in the piece that cannot be read by itself. There may be
        none: what lies between two of them is another parameter's."""
        for span in (one for one in spans if one.begin < end and begin < one.end):
            try:
                self._read(max(span.begin, begin), min(span.end, end))
            except OSError:
                stored = map_names(self._reader.tensors, self._reader.format).whole
                file, name = self._ranges[span.mapping][2], stored.get(span.name, span.name)
                why = error.strerror or error
                raise CheckpointError(f"{file}: tensor {name} cannot be read: {why}", field=name) from error


class ReadFirst:
    """A MatrixSource that has every parameter read before `inner` touches it.

    at_once: `inner` carries everything to a GPU when it is asked for; the pages that it has read are let go of.
    """

    def __init__(self, inner: MatrixSource, ahead: ReadAhead, reader: CheckpointReader, *, at_once: bool) -> None:
        self._inner = inner
        self._ahead = ahead
        self._reader = reader
        self._at_once = at_once
        self._touched_bytes = 0

    def tensor(self, stored: Parameter) -> Tensor:
        """See MatrixSource. Where it lies in the mapped file, it is read when it is touched."""
        if self._at_once:
            self._touched_bytes += self._ahead.wait([stored])
        return self._inner.tensor(stored)

    def matrix(self, request: MatrixRequest) -> Matrix:
        """See MatrixSource."""

        def make() -> Parameter:
            self._touched_bytes += self._ahead.wait(request.parts)
            return request.make()

        found = self._inner.matrix(replace(request, make=make))
        if self._at_once and self._touched_bytes >= RELEASE_BYTES:
            mapping.release_pages(self._reader.files)
            self._touched_bytes = 0
        return found


def _mapped(name: str, parameter: Parameter, ranges: list[tuple[int, int, str]]) -> list[_Span]:
    """The tensors of a parameter that lie in a mapped file, in the order of their addresses."""
    found = []
    for tensor_name, tensor in _tensors(name, parameter):
        begin = 0 if tensor.is_meta else tensor.data_ptr()
        place = bisect_right(ranges, begin, key=lambda one: one[0]) - 1
        if place >= 0 and begin < ranges[place][1]:
            # Of a matrix' columns the rows lie apart: all between is read.
            length = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            found.append(_Span(begin, begin + length * tensor.itemsize, tensor_name, place))
    return sorted(found, key=lambda span: span.begin)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a tree of dataclasses, each with the name of the innermost that has one."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(name, one)
    elif is_dataclass(value) and not isinstance(value, type):
        own = getattr(value, "name", name)
        for field in fields(value):
            yield from _tensors(own, getattr(value, field.name))


def _pieces(spans: list[_Span]) -> Iterator[tuple[int, int]]:
    """Addresses [begin, end), of tensors that are neighbours together, cut at multiples of PIECE_BYTES: of two
    pieces that share a huge page, one maps it again after the other has let it go."""
    stretches: list[_Span] = []
    for span in spans:
        last = stretches[-1] if stretches else span
        if stretches and span.mapping == last.mapping and span.begin - last.end <= GAP_BYTES:
            stretches[-1] = replace(last, end=max(last.end, span.end))
        else:
            stretches.append(span)
    for begin, end in ((one.begin, one.end) for one in stretches):
        for start in range(begin // PIECE_BYTES * PIECE_BYTES, end, PIECE_BYTES):
            yield max(start, begin), min(start + PIECE_BYTES, end)
