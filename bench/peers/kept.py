"""Files that are made from a checkpoint once, and kept: each beside a note of what it was made from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOTE = "made-from.json"


def kept(target: Path, source: Path, recipe: Any, make: Callable[[Path], None]) -> Path:
    """`target`, a folder, made by `make(folder)` unless it is there from the same source and recipe.

    `recipe`: whatever else decides what is made, as JSON. A folder that could not be finished is not left behind.
    """
    note = json.dumps({"source": fingerprint(source), "recipe": recipe}, indent=2, sort_keys=True)
    written = target / NOTE
    if written.exists() and written.read_text(encoding="utf-8") == note:
        return target
    partial = target.with_name(target.name + ".partial")
    for folder in (partial, target):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    make(partial)
    (partial / NOTE).write_text(note, encoding="utf-8")
    partial.rename(target)
    return target


def fingerprint(checkpoint: Path) -> dict[str, str]:
    """config.json by content, the weights by size and time."""
    config = hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest()
    weights = {path.name: path.stat() for path in sorted(checkpoint.glob("*.safetensors"))}
    return {"config.json": config, **{name: f"{stat.st_size} {stat.st_mtime_ns}" for name, stat in weights.items()}}
