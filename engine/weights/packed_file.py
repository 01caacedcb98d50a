"""The file that packed weights are kept in, and the digest that ties it to its checkpoint.

    [ preamble: 24 bytes, to 4096 ][ matrix ][ matrix ] ... [ index: JSON ]
      magic, index offset, index bytes       each at a page

A file is used only if it is exactly as long as the preamble says and its index is, byte for byte, the one that this
process would write: same checkpoint, same layouts, same matrices at the same places. That is more than a checksum
of the index would show. It appears under its name only when it is whole and on the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import msgspec
import torch

from cierzo.engine.errors import amount
from cierzo.engine.weights.folder import GB
from cierzo.engine.weights.mapping import PAGE_BYTES
from cierzo.kernels.formats.number_formats import PACKED_FORMATS
from cierzo.kernels.pack import pack

_log = logging.getLogger(__name__)

_MAGIC = b"CIERZOPK"
_PREAMBLE = struct.Struct("<8sQQ")
_SAMPLES = 64  # of a shard
_SAMPLE_BYTES = 4096


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A matrix of the file."""

    key: str
    shape: tuple[int, ...]
    format: str
    paired: bool
    offset: int
    num_bytes: int


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An index: what a file holds, and what it was made from."""

    checkpoint: str
    layout: str
    entries: tuple[Entry, ...]


class UnusableFile(Exception):
    """Why a file of packed weights cannot be used."""


@cache
def layout() -> str:
    """How this version packs, in a word: a digest of what it makes of a small matrix in every format.

    Nobody has to remember to raise a number: a file that was packed in any other way is packed anew.
    """
    weight = (torch.arange(66 * 130) * 7919 % 1009).view(66, 130) / 509 - 1  # no whole panels, no whole groups
    digest = hashlib.sha256()
    for format in PACKED_FORMATS:
        for paired in (False, True):
            digest.update(pack(weight, format, paired=paired).data.numpy().tobytes())
    return digest.hexdigest()[:16]


def checkpoint_digest(config: Path, files: Iterable[Path]) -> str:
    """Digest `config` (config.json or params.json) and the safetensors `files` of a checkpoint, reading little.

    What counts of each file: name, length, time of the last change in whole seconds (as archives and images keep
    it), header, and 64 pieces of 4096 bytes spread evenly. A checkpoint that was changed and has the same digest
    would have to be changed within the same second, and outside of every sample.
    """
    digest = hashlib.sha256(config.read_bytes())
    for path in sorted(set(files)):
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            digest.update(f"\n{path.name} {status.st_size} {int(status.st_mtime)}\n".encode())
            digest.update(file.read(int.from_bytes(file.read(8), "little")))
            step = max(_SAMPLE_BYTES, status.st_size // _SAMPLES)
            for position in range(0, status.st_size, step):
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, position))
    return digest.hexdigest()


def open_packed(path: Path, wanted: Index) -> int:
    """A descriptor of the file at `path`, which holds exactly `wanted`.

    Raises UnusableFile with the reason, FileNotFoundError, or another OSError where it cannot be read.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(file, wanted)
    except BaseException:
        os.close(file)
        raise
    return file


def _check(file: int, wanted: Index) -> None:
    size = os.fstat(file).st_size
    preamble = os.pread(file, _PREAMBLE.size, 0)
    if len(preamble) < _PREAMBLE.size or preamble[:8] != _MAGIC:
        raise UnusableFile("is no file of packed weights")
    _, offset, num_bytes = _PREAMBLE.unpack(preamble)
    if size != offset + num_bytes:
        raise UnusableFile(f"has {size} bytes instead of {offset + num_bytes}")
    text = os.pread(file, num_bytes, offset)
    if text == msgspec.json.encode(wanted):
        return
    try:
        found = msgspec.json.decode(text, type=Index)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnusableFile("has a damaged index") from error
    if found.checkpoint != wanted.checkpoint:
        raise UnusableFile("was packed from another checkpoint")
    raise UnusableFile("holds another layout or other matrices")


def write_packed(path: Path, index: Index, fill: Callable[[int], None]) -> int:
    """Have `fill(descriptor)` write the matrices of a new file at `path`, and give its descriptor.

    What is at `path` is replaced at the end, or not at all: on any exception nothing is left behind. Raises
    OSError, for instance where the disk is full.
    """
    end = max((entry.offset + entry.num_bytes for entry in index.entries), default=PAGE_BYTES)
    text = msgspec.json.encode(index)
    free_bytes = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
    if end > free_bytes:
        free, needed = amount(free_bytes, GB), amount(end, GB, up=True)
        raise OSError(f"{path.parent} has {free} GB free, {needed} GB are needed")
    file, name = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
    try:
        fill(file)
        write_all(file, text, end)
        write_all(file, _PREAMBLE.pack(_MAGIC, end, len(text)), 0)
        os.fchmod(file, 0o644)
        os.fsync(file)
        os.rename(name, path)
    except BaseException:
        os.close(file)
        os.unlink(name)
        raise
    _sync_folder(path.parent)
    return file


def write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data` at `offset`. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Hold the folder of `path`: who else wants to pack waits. Removes what a killed writer has left there.

    File systems without locks are used without: then several may pack at once, and the last one's file stays.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _lock(folder, path.parent):
            for leftover in path.parent.glob(_prefix(path) + "*"):
                leftover.unlink(missing_ok=True)
        yield
    finally:
        os.close(folder)


def _lock(folder: int, name: Path) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.info("another process packs weights into %s: waiting for it", name)
        fcntl.flock(folder, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _prefix(path: Path) -> str:
    return f".{path.name}.partial-"


def _sync_folder(folder: Path) -> None:
    """Make the new name last. Some file systems cannot; then a crash may lose the file, never half of it."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    with suppress(OSError):
        os.fsync(handle)
    os.close(handle)
