"""`PackedStore`: packs a model's weights once, keeps them in a file, and maps that file on later starts.

    store = PackedStore(reader, "int8", cache_dir())
    weight = store.matrix(MatrixRequest("model.layers.0.self_attn.o_proj", (n, k), lambda: tensor), "int8")
    ...                                  # all others
    print(store.fill())                  # from here on, and not before, the matrices hold their values

`matrix` reserves addresses and says where in the file the matrix will lie; `fill` then maps the file there if there
is one of this checkpoint with exactly these matrices, and packs them otherwise. The file is
`.cierzo/packed-<variant>` in the checkpoint's folder, or, where that cannot be written, `packed/<digest>/<variant>`
below the cache folder. Where neither can, or when the weights are small, they are packed into memory at each start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cierzo.engine.errors import CheckpointError, amount
from cierzo.engine.parameters import MatrixRequest, Parameter
from cierzo.engine.weights import mapping, packed_file
from cierzo.engine.weights.folder import GB
from cierzo.engine.weights.loader import Progress
from cierzo.engine.weights.packed_file import Entry, Index, UnusableFile
from cierzo.engine.weights.quantised import pack_parameter
from cierzo.engine.weights.reader import CheckpointReader
from cierzo.kernels.formats.packed import PANEL, PackedMatrix, PackError, empty_packed, packed_bytes, view_packed

_log = logging.getLogger(__name__)

SMALL_BYTES = 32 << 20  # packed in less time than a user notices: no file
PIECE_BYTES = 64 << 20  # packed at a time: about what packing takes beside the weights

PackInto = Callable[[Any, str, bool, Tensor], None]


@dataclass(frozen=True, slots=True)
class _Wanted:
    entry: Entry
    matrix: PackedMatrix
    make: Callable[[], Parameter]


class PackedStore:
    """Gives PackedMatrix objects, and fills them all at once.

    variant: what the file is named after: number format, and rank where there are several. dtype: of the
    activations.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        variant: str,
        cache_dir: Path,
        *,
        dtype: torch.dtype,
        pack_into: PackInto = pack_parameter,
    ) -> None:
        self._reader = reader
        self._variant = variant
        self._cache_dir = cache_dir
        self._dtype = dtype
        self._pack_into = pack_into
        self._wanted: dict[str, _Wanted] = {}
        self._end = mapping.PAGE_BYTES  # of the file so far

    @property
    def num_bytes(self) -> int:
        """The bytes of all matrices asked for."""
        return sum(wanted.entry.num_bytes for wanted in self._wanted.values())

    def matrix(self, request: MatrixRequest, format: str) -> PackedMatrix:
        """The matrix packed from `request.make()`; its values are there after `fill`.

        `make` is called only if the matrix is packed; what it gives may alias the checkpoint's file or be quantised
        there, and is let go before the next one is made.
        """
        key, shape, paired = request.key, request.shape, request.paired
        if key in self._wanted:
            raise ValueError(f"matrix {key} was asked for already")
        experts = shape[0] if len(shape) == 3 else 1
        num_bytes = experts * packed_bytes(format, shape[-2], shape[-1], paired)
        entry = Entry(key, tuple(shape), format, paired, self._end, num_bytes)
        self._end += -(-num_bytes // mapping.PAGE_BYTES) * mapping.PAGE_BYTES
        data = mapping.reserve(num_bytes, entry.offset)
        matrix = view_packed(format, entry.shape, self._dtype, paired, data)
        self._wanted[key] = _Wanted(entry, matrix, request.make)
        return matrix

    def fill(self, progress: Progress | None = None) -> str:
        """Map the packed weights, or pack them first; says in a line what was done.

        progress: called with (bytes done, bytes in all) while packing. Raises what `make` raises, and
        CheckpointError naming the matrix that its format cannot hold (NaN in int8). A file that cannot be used or
        written is no error: a line is logged, and the next place is tried.
        """
        how = self._fill(progress)
        self._wanted = {}
        return how

    def _fill(self, progress: Progress | None) -> str:
        size = f"{amount(self.num_bytes, GB)} GB"
        if self.num_bytes >= SMALL_BYTES:
            index = self._index()
            paths = self._paths(index)
            for path in paths:
                if self._map(path, index):
                    return f"{size}, mapped from {path}"
            for path in paths:
                try:
                    self._pack_to_file(path, index, progress)
                    return f"{size}, packed into {path}"
                except OSError as error:
                    _log.warning("packed weights cannot be kept in %s: %s", path.parent, error.strerror or error)
            _log.warning("packed weights are kept nowhere: the next start packs them again")
        self._pack(progress)
        return f"{size}, packed into memory"

    def _index(self) -> Index:
        files = {info.file for info in self._reader.tensors.values()}
        entries = tuple(wanted.entry for wanted in self._wanted.values())
        config = self._reader.folder / self._reader.format.config_name
        return Index(packed_file.checkpoint_digest(config, files), packed_file.layout(), entries)

    def _paths(self, index: Index) -> tuple[Path, Path]:
        """Where the file may be, best first."""
        name = f"packed-{self._variant}"
        return (
            self._reader.folder / ".cierzo" / name,
            self._cache_dir / "packed" / index.checkpoint[:32] / name,
        )

    def _map(self, path: Path, index: Index) -> bool:
        """Map the file at `path` if it holds `index`; log why it is not used if it is there."""
        try:
            file = packed_file.open_packed(path, index)
            self._map_all(file)
        except UnusableFile as error:
            _log.info("%s %s: weights are packed again", path, error)
            return False
        except OSError:
            return False  # not there, or not for us: packing says more if it cannot write either
        return True

    def _map_all(self, file: int) -> None:
        """Every matrix from the descriptor, which is closed; or none, and OSError."""
        try:
            for wanted in self._wanted.values():
                mapping.map_file(wanted.matrix.data, file, wanted.entry.offset)
        except OSError:
            for wanted in self._wanted.values():
                mapping.map_memory(wanted.matrix.data)
            raise
        finally:
            os.close(file)

    def _pack_to_file(self, path: Path, index: Index, progress: Progress | None) -> None:
        """Write the file, unless another process has just done so, and map it. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with packed_file.sole_writer(path):
            if not self._map(path, index):
                self._map_all(packed_file.write_packed(path, index, lambda file: self._pack(progress, file)))

    def _pack(self, progress: Progress | None, file: int | None = None) -> None:
        """Pack every matrix piece by piece: into `file`, or into the memory that is reserved for it."""
        files = {info.file for info in self._reader.tensors.values()}
        buffer, done_bytes, total_bytes = empty_packed(0), 0, self.num_bytes
        for wanted in self._wanted.values():
            entry = wanted.entry
            source = _checked(wanted.make(), entry)
            for rows, begin, end in _pieces(entry):
                if file is not None and buffer.numel() < end - begin:
                    buffer = empty_packed(end - begin)
                target = wanted.matrix.data[begin:end] if file is None else buffer[: end - begin]
                try:
                    self._pack_into(source[rows], entry.format, entry.paired, target)
                except PackError as error:
                    raise CheckpointError(f"{entry.key}, from {rows.start} on: {error}", field=entry.key) from error
                if file is not None:
                    packed_file.write_all(file, target.numpy().data, entry.offset + begin)
                    mapping.begin_writing(file, entry.offset + begin, end - begin)
                mapping.release_pages(files)
                done_bytes += end - begin
                if progress is not None:
                    progress(done_bytes, total_bytes)


def _checked(source: Parameter, entry: Entry) -> Parameter:
    if tuple(source.shape) != entry.shape:
        raise ValueError(f"matrix {entry.key}: made {list(source.shape)} instead of {list(entry.shape)}")
    return source


def _pieces(entry: Entry) -> Iterator[tuple[slice, int, int]]:
    """(rows of the first axis, where they begin and end in the packed bytes), about PIECE_BYTES each.

    Experts and panels lie one after another, so that some of them are a packed matrix of their own; the panels of a
    paired matrix take their rows from two places, and stay together.
    """
    length = entry.shape[0]
    if len(entry.shape) == 3:
        unit, unit_bytes = 1, entry.num_bytes // max(length, 1)
    elif entry.paired:
        unit, unit_bytes = length, entry.num_bytes
    else:
        unit, unit_bytes = PANEL, packed_bytes(entry.format, PANEL, entry.shape[1])
    step = unit * max(1, PIECE_BYTES // max(unit_bytes, 1))
    for start in range(0, length, step):
        stop = min(start + step, length)
        yield slice(start, stop), start // unit * unit_bytes, -(-stop // unit) * unit_bytes
