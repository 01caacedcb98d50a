"""Cells on real servers: `cierzo serve` on this machine's CPU or GPU, one model in memory at a time.

What a step reads and computes is not seen from outside: a simulated engine on a device of this machine's ceilings
goes through the same load, with the experts that the real one's tokens chose, and says at which rate nothing but
the ceilings would answer it.
"""

from __future__ import annotations

import shlex
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cierzo.bench import machine
from cierzo.bench.campaign import loop
from cierzo.bench.headline.cells import Cell, Subject
from cierzo.bench.headline.measurement import Headline, Measurement, Steps, closed_loop, measured
from cierzo.bench.headline.search import at_best, engine_settings, resolved
from cierzo.bench.headline.simulate import simulate, simulated_config
from cierzo.bench.peers.engine import Checkpoint
from cierzo.bench.peers.ours import CierzoServer
from cierzo.bench.revision import output
from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.cards import named
from cierzo.engine.cost.data_sheets import DATA_SHEETS
from cierzo.engine.cost.device import Device
from cierzo.engine.cost.work import measured_distinct
from cierzo.engine.errors import ConfigError


@dataclass
class Serving(Headline):
    """Servers of checkpoints by model, on the GPU of this name, or on the CPU. Logs go below `folder`."""

    checkpoints: dict[str, Checkpoint]
    folder: Path
    gpu: str = ""

    def __post_init__(self) -> None:
        """Take this machine at its ceilings for a device, if they are known."""
        self.limit_device = next((named(card) for card in DATA_SHEETS if card in self.gpu.lower()), None)

    def ceilings(self) -> Any | None:
        """The CPU's, measured now; those of a GPU are on its data sheet."""
        if self.gpu:
            return None
        found = machine.measure_apart()
        self.limit_device = machine.limit_device(found)
        return msgspec.to_builtins(found)

    def open(self, block: loop.Block[Cell, Subject], subject: Subject) -> Session:
        """Start a server for cells of one profile. Raises EngineFailed, or ConfigError."""
        checkpoint = self.checkpoints[subject.model]
        settings = engine_settings(str(checkpoint.path), "cuda" if self.gpu else "cpu", subject, block.cells)
        config = resolved(settings)  # before the server takes the memory that this looks at
        options = {name: value for name, value in settings.items() if name != "model"}
        options["expert_statistics"] = config.model.moe is not None
        name = f"{subject.model}-{subject.weights}-{subject.activations}-{block.name}"
        server = CierzoServer(checkpoint, options, self.folder / "logs" / f"{name}.log")
        return Session(self, server, checkpoint, subject, config)


@dataclass(frozen=True)
class Session(loop.Session[Cell]):
    """A server that runs."""

    serving: Serving
    server: CierzoServer
    checkpoint: Checkpoint
    subject: Subject
    config: EngineConfig

    def measure(self, cell: Cell, number: int) -> Any:
        """Raises EngineFailed, or ConfigError."""
        config, device = self.config, self.serving.limit_device
        short = {sys.executable: "python", str(self.checkpoint.path): self.checkpoint.path.name}
        command = shlex.join(short.get(word, word) for word in shlex.split(self.server.command))

        def load(concurrency: int, replicas: int) -> Measurement:
            # no prompt begins as one of another load
            seed = zlib.crc32(f"{cell.name} {concurrency} {number}".encode())
            result = self.server.load(closed_loop(cell, concurrency, seed))
            found = measured(cell, result, concurrency, replicas)
            return msgspec.structs.replace(found, experts=self.server.chosen_experts(), command=command)

        found = at_best(cell, config, device, load)
        if device is not None:
            found = msgspec.structs.replace(found, steps=self._twin(cell, found, device))
        return msgspec.to_builtins(found)

    def close(self) -> None:
        """Stop the server."""
        self.server.close()

    def _twin(self, cell: Cell, found: Measurement, device: Device) -> Steps | None:
        """The steps of the same load on a simulated engine of this machine's ceilings."""
        fixed = msgspec.structs.replace(cell, concurrency=found.concurrency)
        config = simulated_config(str(self.checkpoint.path), fixed, self.subject, device, self.serving.folder)
        distinct = None if found.experts is None else measured_distinct(found.experts)
        return simulate(config, fixed, found.concurrency, distinct=distinct).steps


def gpu_name() -> str:
    """The name of the first GPU that the driver lists. Raises ConfigError without one."""
    found = output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0").strip()
    if not found:
        raise ConfigError("no GPU: nvidia-smi names none", field="device", value="cuda")
    return found
