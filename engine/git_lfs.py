"""Pointers of git-lfs: short texts that lie in a cloned repository in place of its large files."""

from __future__ import annotations

from pathlib import Path

from cierzo.engine.errors import CheckpointError

_BEGINNING = b"version https://git-lfs"


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError if the file is such a pointer. A file that cannot be opened is left to its reader."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_BEGINNING)) == _BEGINNING
    except (OSError, ValueError):
        return
    if is_pointer:
        raise CheckpointError(
            f"{path} is a pointer of git-lfs and not the file it stands for: run `git lfs pull` in the repository, "
            "or download the file",
            field=path.name,
        )
