"""transformers, whose `generate` is the engine that everybody has. It has no server of its own worth the name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cierzo.bench.peers.engine import Checkpoint, Engine
from cierzo.bench.peers.environments import python
from cierzo.bench.peers.process import Worker

PEER = "transformers"
# The makers' params.json says "apply_scale": false: no magnitude term in YaRN, neither on cos and sin nor in the
# softmax scale. transformers derives one from mscale_all_dim; these two keys together switch it off.
PLAIN_SCALE = {"attention_factor": 1.0, "mscale_all_dim": 0.0}
DEFAULTS = Engine(
    name="transformers",
    peer=PEER,
    number_format="bf16",
    setting="generate, sdpa attention, grouped_mm experts (its defaults)",
)
ENGINES = (DEFAULTS,)


class Transformers:
    """transformers in an environment of its own."""

    engines = ENGINES

    def offline(self, engine: Engine, checkpoint: Checkpoint, folder: Path) -> Worker:
        """`generate` in a worker."""
        log = folder / "logs" / f"{engine.name}-{checkpoint.name}.log"
        return worker(checkpoint, engine.options, folder, log)

    def server(self, engine: Engine, checkpoint: Checkpoint, folder: Path) -> None:
        """None: transformers has no server of its own."""


def worker(checkpoint: Checkpoint, options: dict[str, Any], folder: Path, log: Path) -> Worker:
    """transformers on `checkpoint`; `options` of `workers/transformers_backend.py`."""
    options = dict(options)
    if checkpoint.is_small4:
        options.setdefault("rope", PLAIN_SCALE)
    else:
        options.pop("experts", None)
    command = ["env", "HF_HUB_OFFLINE=1", str(python(PEER, folder))]
    return Worker(
        command, "transformers_backend", checkpoint.path, options, vocab_size=checkpoint.vocab_size, log=log
    )
