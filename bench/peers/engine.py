"""Engines as the benchmark sees them: a name, settings, and two ways to run it, offline and as a server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from cierzo.bench.load import LoadClient
from cierzo.bench.peers.cells import Cell
from cierzo.engine.errors import ConfigError

Logprobs = list[list[list[tuple[int, float]]]]  # sequence, position, likeliest tokens with their log-probabilities

CHECKPOINTS = ("small4", "small3")


class EngineFailed(Exception):
    """A cell that could not be measured; the message says why, and where the engine's log is."""


class Engine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A row of the table: a peer (or us) in one setting, with weights in `number_format`."""

    name: str
    peer: str
    number_format: str
    setting: str
    options: dict[str, Any] = {}


class Measured(msgspec.Struct, frozen=True):
    """A figure in its cell's unit, what it came from, and the command if the cell has one of its own."""

    value: float
    raw: Any
    command: str = ""


class Session(Protocol):
    """A loaded engine. `load_s` is the time from its start to its first token; None where nothing stays loaded."""

    command: str
    load_s: float | None

    def measure(self, cell: Cell, seed: int) -> Measured:
        """A cell, on random prompts of this seed. Raises EngineFailed."""
        ...

    def peak_memory_gb(self) -> float:
        """Most resident memory of its processes so far, 1e9 bytes; 0 if they are gone."""
        ...

    def close(self) -> None:
        """End its processes."""
        ...


class Offline(Session, Protocol):
    """An engine without its server: decode, prefill and agreement cells."""

    def top_logprobs(self, sequences: list[list[int]], count: int) -> Logprobs:
        """The likeliest next tokens at each position of forced sequences. Raises EngineFailed."""
        ...


class Server(msgspec.Struct, frozen=True):
    """How to start a server, and how to connect to it: ConnectionLost until it takes requests."""

    command: list[str]
    connect: Callable[[], Awaitable[LoadClient]]


class Checkpoint(msgspec.Struct, frozen=True):
    """A checkpoint under a name of its own."""

    name: str
    path: Path

    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        config: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return config

    @property
    def vocab_size(self) -> int:
        """Prompts are token ids below this."""
        return int(self.config()["vocab_size"])

    @property
    def is_small4(self) -> bool:
        """MLA and experts, as in Mistral Small 4; else dense, as Mistral Small 3."""
        return bool(self.config()["model_type"] == "mistral4")


def find_checkpoint(name: str, folder: Path, scale: str = "mini") -> Checkpoint:
    """A folder, or small4 or small3 with random weights at this scale, made if missing. Raises ConfigError."""
    if name not in CHECKPOINTS:
        path = Path(name).resolve()
        if not (path / "config.json").exists():
            raise ConfigError(f"{name} is no checkpoint", field="checkpoints", value=name)
        return Checkpoint(path.name, path)
    path = (folder / (name if scale == "mini" else f"{name}-{scale}")).resolve()
    if not path.exists():
        make = ["-m", "cierzo", "make-checkpoint", str(path), "--like", name, "--scale", scale]
        subprocess.run([sys.executable, *make], check=True)
    return Checkpoint(name, path)


class Peer(Protocol):
    """A file of this folder: the engines of one project, and how they run. Paths are below `folder`."""

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The project's rows of the table."""
        ...

    def offline(self, engine: Engine, checkpoint: Checkpoint, folder: Path) -> Offline:
        """Convert the checkpoint if need be, and load it. Raises EngineFailed."""
        ...

    def server(self, engine: Engine, checkpoint: Checkpoint, folder: Path) -> Server | None:
        """Convert the checkpoint if need be; None for an engine that has no server."""
        ...
