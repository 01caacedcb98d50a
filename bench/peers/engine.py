"""Engines as the benchmark sees them: a name, settings, and two ways to run it, offline and as a server."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from cierzo.bench.peers.cells import Cell
from cierzo.engine.errors import ConfigError
from cierzo.engine.weights.folder import new_folder

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

    def log(self, checkpoint: Checkpoint, folder: Path, kind: str = "") -> Path:
        """The log of its runs of a kind."""
        return folder / "logs" / f"{self.name}-{checkpoint.name}{kind}.log"


class Measured(msgspec.Struct, frozen=True):
    """A figure in its cell's unit, and what it came from."""

    value: float
    raw: Any


class Session:
    """A loaded engine, and the command that it ran last. `load_s` is the time from its start to its first token;
    None where nothing stays loaded."""

    command = ""
    load_s: float | None = None

    def measure(self, cell: Cell, seed: int) -> Measured:
        """A cell, on random prompts of this seed. Raises EngineFailed."""
        raise NotImplementedError

    def top_logprobs(self, sequences: list[list[int]], count: int) -> Logprobs:
        """The likeliest next tokens at each position of forced sequences, of an engine without its server.

        Raises EngineFailed.
        """
        raise NotImplementedError

    def peak_memory_gb(self) -> float:
        """Most resident memory of its processes so far, 1e9 bytes; 0 if they are gone."""
        raise NotImplementedError

    def close(self) -> None:
        """End its processes."""


class Peer(Protocol):
    """A module of this folder: the engines of one project, and how they run. Paths are below `folder`."""

    ENGINES: tuple[Engine, ...]

    def offline(self, engine: Engine, checkpoint: Checkpoint, folder: Path) -> Session:
        """Convert the checkpoint if need be, and load it. Raises EngineFailed."""
        ...

    def server(self, engine: Engine, checkpoint: Checkpoint, folder: Path) -> Session | None:
        """Convert, start its server and warm it up; None for an engine that has none. Raises EngineFailed."""
        ...


class Checkpoint(msgspec.Struct, frozen=True):
    """A checkpoint under a name of its own."""

    name: str
    path: Path

    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return json.loads((self.path / "config.json").read_text(encoding="utf-8"))

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


def kept(checkpoint: Checkpoint, folder: Path, name: str, recipe: Any, make: Callable[[Path], None]) -> Path:
    """A folder that `make(folder)` fills from a checkpoint, unless it is there from the same one and recipe.

    `recipe`: whatever else decides what is made, as JSON. A folder that could not be finished is not left behind.
    """
    source = json.dumps([fingerprint(checkpoint.path), recipe], sort_keys=True)
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    target = folder / "converted" / f"{name}-{checkpoint.name}-{digest}"
    if not target.exists():
        with new_folder(target) as partial:
            make(partial)
    return target


def fingerprint(checkpoint: Path) -> dict[str, str]:
    """config.json by content, the weights by size and time."""
    config = hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest()
    weights = {path.name: path.stat() for path in sorted(checkpoint.glob("*.safetensors"))}
    return {"config.json": config, **{name: f"{stat.st_size} {stat.st_mtime_ns}" for name, stat in weights.items()}}
