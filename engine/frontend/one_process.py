"""Objects that live in one process alone."""

from __future__ import annotations

import os
from typing import NoReturn


class OneProcess:
    """Base of objects that hold threads or a device: unusable in a forked child, never pickled and never copied."""

    def __init__(self) -> None:
        self._process_id = os.getpid()

    @property
    def _is_forked(self) -> bool:
        return os.getpid() != self._process_id

    def _check_process(self) -> None:
        """Raise RuntimeError in a forked child, where the threads that would do the work do not exist."""
        if self._is_forked:
            name = type(self).__name__
            raise RuntimeError(
                f"this {name} was made in process {self._process_id} and does not work in process {os.getpid()}, a "
                f"fork of it: make one in each process, started by multiprocessing's 'spawn'"
            )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"{name} objects cannot be pickled or copied: make one in each process that needs one")
