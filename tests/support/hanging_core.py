"""A core process that hangs: `python hanging_core.py SOCKET HOW LAUNCH MARKER`.

It is the real one with the fake runner, a millisecond a step. At launch number LAUNCH it hangs in the way HOW,
once: MARKER, a file, is made then, and a core that finds it is sound. Ways: "native", in a native call that has
released the interpreter; "interpreter", in one that holds it; "long", for two seconds that were predicted to be
one; "never".
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

from cierzo.engine.config import EngineConfig
from cierzo.engine.worker import core, process
from cierzo.engine.worker.fake import FakeRunner

STEP_US = 1_000
LONG_S = 2.0
FOR_EVER_US = 60_000_000  # longer than any test waits


class HangingRunner(FakeRunner):
    """A fake runner that hangs once."""

    def __init__(self, how: str, launch: int, marker: Path, **sizes: Any) -> None:
        super().__init__(**sizes)
        self._how, self._launches_left, self._marker = how, launch, marker
        self._free, self._holding = ctypes.CDLL(None), ctypes.PyDLL(None)

    def launch(self, plan: Any, batch: Any) -> None:
        """Launch a step, or hang."""
        self._free.usleep(STEP_US)
        self._launches_left -= 1
        if self._launches_left == 0 and not self._marker.exists():
            self._marker.touch()
            if self._how == "long":
                self._free.usleep(int(LONG_S * 1e6))
            elif self._how != "never":
                (self._free if self._how == "native" else self._holding).usleep(FOR_EVER_US)
        super().launch(plan, batch)


def main(socket: str, how: str, launch: str, marker: str) -> int:
    """Run until the front end goes."""

    def make_runner(config: EngineConfig) -> FakeRunner:
        return HangingRunner(
            how,
            int(launch),
            Path(marker),
            vocab_size=config.model.vocab_size,
            num_blocks=config.cache.num_blocks,
            block_tokens=config.cache.block_tokens,
            max_running=config.scheduler.max_running,
            reads="last",
        )

    core.make_runner = make_runner
    if how == "long":
        core.EngineCore.predicted_s = property(lambda self: LONG_S / 2)
    return process.run(socket)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
