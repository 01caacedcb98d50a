"""transformers, whose `generate` is the engine that everybody has. It has no server of its own worth the name."""

from __future__ import annotations

from pathlib import Path

from cierzo.bench.peers.engine import Checkpoint, Engine
from cierzo.bench.peers.environments import python
from cierzo.bench.peers.process import Worker

PEER = "transformers"
DEFAULTS = Engine(
    name=PEER,
    peer=PEER,
    number_format="bf16",
    setting="generate, sdpa attention, grouped_mm experts (its defaults)",
)
ENGINES: tuple[Engine, ...] = (DEFAULTS,)


def offline(engine: Engine, checkpoint: Checkpoint, folder: Path) -> Worker:
    """`generate` in a worker, in an environment of its own."""
    return Worker(engine, checkpoint, folder, ["env", "HF_HUB_OFFLINE=1", str(python(PEER, folder))])


def server(engine: Engine, checkpoint: Checkpoint, folder: Path) -> None:
    """None: transformers has no server of its own."""
