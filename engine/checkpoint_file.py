"""A check that a file of a checkpoint's folder is one that can be read."""

from __future__ import annotations

from pathlib import Path

from cierzo.engine.errors import CheckpointError

_POINTER = b"version https://git-lfs"  # the beginning of what a clone without git-lfs has in place of a large file


def require_file(path: Path) -> None:
    """Raise CheckpointError if something else is there: a folder, a link to nothing, a pipe (whose reader would
    wait for ever), a device, a pointer of git-lfs. A path where nothing is passes; what cannot be opened is left to
    its reader."""
    if not path.is_file():
        if path.exists() or path.is_symlink():
            raise CheckpointError(f"{path} is no file, or a link to none", field=path.name)
        return
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_POINTER)) == _POINTER
    except (OSError, ValueError):
        return
    if is_pointer:
        raise CheckpointError(
            f"{path} is a pointer of git-lfs and not the file it stands for: run `git lfs pull` in the repository, "
            "or download the file",
            field=path.name,
        )
