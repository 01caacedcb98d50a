"""Memory that a file is mapped into later, and mapped pages that are let go. Linux."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

PAGE_BYTES = max(4096, mmap.PAGESIZE)
HUGE_PAGE_BYTES = 2 << 20
_MAP_FIXED = 0x10  # Python's mmap module has neither in 3.11
_MAP_NORESERVE = 0x4000
_SYNC_FILE_RANGE_WRITE = 2
_MADV_WILLNEED = 3
_MADV_DONTNEED = 4
_MADV_POPULATE_READ = 22  # since Linux 5.14

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64
)  # fmt: skip
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def reserve(num_bytes: int, offset: int) -> Tensor:
    """uint8 [num_bytes] of zeros that cost no memory until they are written to.

    It starts at a page, and lies to huge pages as `offset`, a multiple of PAGE_BYTES, does: so the system can map a
    file from there on with huge pages. Freed with the last tensor that shows it.
    """
    slack = HUGE_PAGE_BYTES if num_bytes >= HUGE_PAGE_BYTES else 0
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, max(num_bytes, 1) + slack, flags=flags)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = (offset - whole.data_ptr()) % HUGE_PAGE_BYTES if slack else 0
    first = start + -offset % HUGE_PAGE_BYTES  # of the huge pages that lie wholly inside
    num_inside = (start + num_bytes - first) // HUGE_PAGE_BYTES
    if num_inside > 0:
        memory.madvise(mmap.MADV_HUGEPAGE, first, num_inside * HUGE_PAGE_BYTES)
    return whole[start : start + num_bytes]


def map_file(target: Tensor, file: int, offset: int) -> None:
    """Have `target`, from `reserve`, show the bytes of a file descriptor from `offset` on, read-only.

    The file must hold them: a page beyond its end kills the process that touches it. Raises OSError.
    What is not in memory yet is read in huge pages where the file system has them (ext4 since Linux 6.16), which
    is twice as fast.
    """
    _map(target, mmap.PROT_READ, mmap.MAP_SHARED, file, offset)
    _libc.madvise(target.data_ptr(), target.numel(), mmap.MADV_HUGEPAGE)  # a hint: no error matters


def map_memory(target: Tensor) -> None:
    """Have `target` be writable zeros again, as `reserve` gave it. Raises OSError."""
    _map(target, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)


def _map(target: Tensor, protection: int, flags: int, file: int, offset: int) -> None:
    if target.numel() == 0:
        return
    address = _libc.mmap(target.data_ptr(), target.numel(), protection, flags | _MAP_FIXED, file, offset)
    if address != target.data_ptr():
        error = ctypes.get_errno()
        raise OSError(error, f"cannot map packed weights: {os.strerror(error)}")


def begin_writing(file: int, offset: int, num_bytes: int) -> None:
    """Start to carry what was written there to the disk, so that fsync has little left to wait for."""
    _libc.sync_file_range(file, offset, num_bytes, _SYNC_FILE_RANGE_WRITE)  # a hint: no error matters


def release_pages(files: Iterable[Path]) -> None:
    """Let go of the resident pages of every private mapping of `files` in this process.

    They are read again from the file when touched, so nothing may ever have been written to them: true for
    checkpoints, whose tensors are never written to.
    """
    for begin, end, _ in mapped_ranges(files):
        _libc.madvise(begin, end - begin, _MADV_DONTNEED)


def mapped_ranges(files: Iterable[Path]) -> list[tuple[int, int, str]]:
    """(first address, end, file) of every private mapping of `files` in this process."""
    paths = {os.path.realpath(file) for file in files}
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        span, permissions, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0] in paths and permissions.endswith("p"):
            begin, end = (int(address, 16) for address in span.split("-"))
            found.append((begin, end, path[0]))
    return found


def read_in(begin: int, end: int) -> None:
    """Have the system read the addresses [begin, end) of a private mapping of a file, to which nothing was written.

    They are in its page cache then, and take none of this process's memory. Meanwhile other threads run. Raises
    OSError where the file ends before them or cannot be read: whoever touches them is killed. Before Linux 5.14 no
    error is found, and the reading may still be under way.
    """
    first = begin // PAGE_BYTES * PAGE_BYTES
    _libc.madvise(first, end - first, _MADV_WILLNEED)  # in large pieces, which faults do not read
    failed = ctypes.get_errno() if _libc.madvise(first, end - first, _MADV_POPULATE_READ) else 0
    _libc.madvise(first, end - first, _MADV_DONTNEED)
    if failed not in (0, errno.EINVAL):
        why = "it has become shorter, or its disk fails" if failed == errno.EFAULT else os.strerror(failed)
        raise OSError(failed, why)
