"""A folder that appears whole or not at all, and the check that the disk can hold it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cierzo.engine.errors import CheckpointError, amount

GB = 10**9


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False, num_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty folder beside `target`; rename it to `target` at the end, remove it on any exception.

    A process that is killed outright leaves its folder behind. Each is held with a lock that dies with its
    process, so the next writer of the same target can tell such a leftover from work in progress, and removes it.

    Raises CheckpointError when `target` exists and `overwrite` is false, when `overwrite` would replace something
    that is not a checkpoint, or when the disk has fewer than `num_bytes` bytes free.
    """
    _check_replaceable(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    check_room(target.parent, num_bytes)
    folder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
        folder.chmod(0o755)
        _check_replaceable(target, overwrite)
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def check_room(folder: Path, num_bytes: int) -> None:
    """Raise CheckpointError when the disk under `folder` has fewer than `num_bytes` bytes free."""
    free_bytes = shutil.disk_usage(folder).free
    if num_bytes > free_bytes:
        raise CheckpointError(
            f"{folder} has {amount(free_bytes, GB)} GB free, {amount(num_bytes, GB, up=True)} GB are needed",
            field="path",
            limit=free_bytes,
            value=num_bytes,
        )


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists already (--overwrite replaces it)", field="path", value=target)
    # Overwriting removes a whole folder: refuse to do that to anything but an earlier checkpoint.
    if not target.is_dir() or (any(target.iterdir()) and not _is_checkpoint(target)):
        raise CheckpointError(f"{target} is not a checkpoint: not overwritten", field="path", value=target)


def _is_checkpoint(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "params.json"))


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _remove_leftovers(target: Path) -> None:
    for leftover in target.parent.glob(_prefix(target) + "*"):
        handle = os.open(leftover, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
        except BlockingIOError:
            continue  # its writer is alive
        finally:
            os.close(handle)
