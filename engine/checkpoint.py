"""The folder that a CHECKPOINT argument means."""

from __future__ import annotations

from pathlib import Path

from cierzo.engine.environment import cache_dir
from cierzo.engine.errors import refusal

DEMO = "demo"


def checkpoint_folder(name: str) -> str:
    """The folder meant by a CHECKPOINT argument; "demo" prepares the demo model where that was not yet done.

    Raises ConfigError where the cache folder, which the demo model is kept in, cannot be written.
    """
    if name != DEMO or Path(DEMO).is_dir():
        return name
    from cierzo.engine.weights.gguf import prepare_demo

    folder = cache_dir()
    try:
        return str(prepare_demo(folder))
    except OSError as error:
        why = error.strerror or str(error)
        raise refusal("CIERZO_CACHE_DIR", "a folder that can be written", str(folder), why) from error
