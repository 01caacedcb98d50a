"""Keeps what a dead core wrote down of its last minutes (engine/flight.py), a bounded number of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
from datetime import UTC, datetime
from pathlib import Path

from cierzo.engine.flight import Kept, packed, segment_paths, segments
from cierzo.engine.server_process import private

log = logging.getLogger(__name__)

MAX_KEPT = 8


class Flights:
    """A folder of flight records; the segments of living cores lie in it too."""

    def __init__(self, folder: str, with_prompts: bool = True) -> None:
        """with_prompts: the records have token ids, which is no more than said where they are kept."""
        self._folder = folder
        self._without = "" if with_prompts else " (prompts were not recorded: --record-prompts)"
        self._sweep()

    @classmethod
    def under(cls, folder: str, with_prompts: bool) -> Flights | None:
        """The records of a folder; None for "", where nothing is recorded."""
        return cls(folder, with_prompts) if folder else None

    async def keep(self, pid: int, reason: str, message: str) -> Path | None:
        """Keep the record of a process that has ended, and tell where; None if there is none, or no room for it."""
        try:
            path = await asyncio.to_thread(self._keep, pid, Kept(reason=reason, message=message, at=_now()))
        except (OSError, ValueError) as error:
            log.warning("the core's flight record is not kept: %s", error)
            return None
        if path is not None:
            text = "the core's last minutes are kept%s; to replay them: cierzo replay %s"
            log.error(text, self._without, shlex.quote(str(path)))
        return path

    def _keep(self, pid: int, kept: Kept) -> Path | None:
        parts = segments(self._folder, pid)
        if not parts:
            return None
        path = Path(self._folder, f"{kept.at}-{kept.reason}.flight")
        unfinished = path.with_suffix(".unfinished")
        try:
            with open(unfinished, "xb", opener=private) as file:
                file.writelines((packed(kept), *parts))
            os.replace(unfinished, path)
        finally:
            for left in (str(unfinished), *segment_paths(self._folder, pid)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(left)
        for old in sorted(path.parent.glob("*.flight"))[:-MAX_KEPT]:
            old.unlink(missing_ok=True)
        return path

    def _sweep(self) -> None:
        """Remove the segments of cores that died together with their front end."""
        for path in Path(self._folder).glob("live-*.*"):
            pid = path.name.removeprefix("live-").partition(".")[0]
            if pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
                with contextlib.suppress(OSError):
                    path.unlink()


def _now() -> str:
    """The time of the calendar, such that names sort by it."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
