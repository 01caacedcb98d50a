"""transformers, whose `generate` is the engine that everybody has. It has no server of its own worth the name."""

from __future__ import annotations

from pathlib import Path

from cierzo.bench.peers.engine import Engine
from cierzo.bench.peers.environments import python
from cierzo.bench.peers.process import Worker


class Transformers(Engine, frozen=True):
    """`generate` as it comes: sdpa attention, grouped_mm experts."""

    peer: str = "transformers"

    def offline(self, checkpoint: Path, folder: Path) -> Worker:
        """`generate` in a worker, in an environment of its own."""
        return Worker(self, checkpoint, folder, python(self.peer, folder))


ENGINES = (Transformers(name="transformers"),)
