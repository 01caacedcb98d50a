"""Cells to measure, and engines, each with two ways to run it, offline and as a server."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from cierzo.engine.errors import ConfigError
from cierzo.engine.weights.folder import new_folder

Logprobs = list[list[list[tuple[int, float]]]]  # sequence, position, likeliest tokens with their log-probabilities

CHECKPOINTS = ("small4", "small3")


class Cell(msgspec.Struct, frozen=True, omit_defaults=True):
    """A column of the table. `kind` says how it is measured; sizes that a kind does not use are 0.

    decode: `batch` requests of `prompt_tokens`, `new_tokens` each, greedy, without end token; tokens per second of
    the time in which all of them decode. prefill: one prompt of `prompt_tokens` to its first token. served: a
    closed loop of `batch` clients over the server's own protocol, `requests` of `prompt_tokens` (of which
    `shared_tokens` begin every prompt) and `new_tokens`. agreement: `batch` sequences of `prompt_tokens`. load,
    memory: by-products.
    """

    name: str
    kind: str
    unit: str
    batch: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    requests: int = 0
    shared_tokens: int = 0

    def __str__(self) -> str:
        sizes = [(name, size) for name, size in msgspec.structs.asdict(self).items() if isinstance(size, int)]
        told = ", ".join(f"{name.removesuffix('_tokens')} {size}" for name, size in sizes if size)
        return f"{self.name} ({told})" if told else self.name


class Subject(msgspec.Struct, frozen=True):
    """An engine on a checkpoint, both by name."""

    checkpoint: str
    engine: str

    def __str__(self) -> str:
        return f"{self.checkpoint} {self.engine}"


LOAD, SERVED_LOAD = Cell("load", "load", "s"), Cell("load-served", "load", "s")
MEMORY, SERVED_MEMORY = Cell("memory", "memory", "GB"), Cell("memory-served", "memory", "GB")
BY_PRODUCTS = (LOAD, SERVED_LOAD, MEMORY, SERVED_MEMORY)
AGREEMENT = Cell("agreement", "agreement", "%", batch=4, prompt_tokens=64)


def cells(*, quick: bool) -> tuple[Cell, ...]:
    """The columns in order, without by-products; `quick` has the same ones with fewer tokens, requests, clients."""
    new_tokens, requests, clients, chats = (32, 16, 16, 8) if quick else (64, 96, 32, 32)
    return (
        AGREEMENT,
        *(Cell(f"decode-{batch}", "decode", "tok/s", batch, 128, new_tokens) for batch in (1, 8, 32)),
        *(Cell(f"prefill-{tokens}", "prefill", "tok/s", prompt_tokens=tokens) for tokens in (512, 2048, 8192)),
        Cell("served", "served", "req/s", clients, 512, 64, requests),
        Cell("chat", "served", "req/s", chats, 1152, 64, chats * requests // clients, 1024),
    )


class EngineFailed(Exception):
    """A cell that could not be measured; the message says why, and where the engine's log is."""


class Engine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A row of the table: weights in `number_format`. Each peer has a subclass, which says how it runs; `folder`
    holds its environment, its logs, and what is made from checkpoints."""

    name: str
    peer: str
    number_format: str = "bf16"
    options: dict[str, Any] = {}

    def offline(self, checkpoint: Path, folder: Path) -> Session:
        """Convert the checkpoint if need be, and load it. Raises EngineFailed."""
        raise NotImplementedError

    def server(self, checkpoint: Path, folder: Path) -> Session | None:
        """Convert, start its server and warm it up; None for an engine that has none. Raises EngineFailed."""
        return None

    def log(self, checkpoint: Path, folder: Path, kind: str = "") -> Path:
        """The log of its runs of a kind."""
        return folder / "logs" / f"{self.name}-{checkpoint.name}{kind}.log"


class Measured(msgspec.Struct, frozen=True):
    """A figure in its cell's unit, and what it came from."""

    value: float
    raw: Any


class Session:
    """A loaded engine, and the command that it ran last. `load_s` is the time from its start to its first token;
    0 where nothing stays loaded. cells: of that time, and of memory. agreement: measures it, where it is a cell."""

    command = ""
    load_s = 0.0
    cells = LOAD, MEMORY
    agreement: Callable[[], Measured]

    def measure(self, cell: Cell, number: int) -> Any:
        """Measure on prompts of this round and cell, the same for all engines. Raises EngineFailed."""
        seed = zlib.crc32(f"{cell} {number}".encode())
        return self._told(self.agreement() if cell == AGREEMENT else self.measured(cell, seed))

    def by_products(self) -> dict[Cell, Any]:
        """The time to load of an engine that stays loaded, and memory."""
        found = zip(self.cells, (self.load_s, self.peak_memory_gb()), strict=True)
        return {cell: self._told(Measured(value, None)) for cell, value in found if value > 0}

    def _told(self, measured: Measured) -> Any:
        return {**msgspec.to_builtins(measured), "command": self.command}

    def measured(self, cell: Cell, seed: int) -> Measured:
        """A cell but agreement, on random prompts of this seed. Raises EngineFailed."""
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


def find_checkpoint(name: str, folder: Path, scale: str = "mini") -> Path:
    """A folder, or small4 or small3 with random weights at this scale, made if missing. Raises ConfigError."""
    if name not in CHECKPOINTS:
        path = Path(name).resolve()
        if not (path / "config.json").exists():
            raise ConfigError(f"{name} is no checkpoint", field="checkpoints", value=name)
        return path
    path = (folder / (name if scale == "mini" else f"{name}-{scale}")).absolute()
    if not path.exists():
        make = ["-m", "cierzo", "make-checkpoint", str(path), "--like", name, "--scale", scale]
        subprocess.run([sys.executable, *make], check=True)
    return path


def kept(checkpoint: Path, folder: Path, name: str, recipe: Any, make: Callable[[Path], None]) -> Path:
    """A folder that `make(folder)` fills from a checkpoint, unless it is there from the same one and recipe.

    `recipe`: whatever else decides what is made, as JSON. A folder that could not be finished is not left behind.
    """
    source = json.dumps([fingerprint(checkpoint), recipe], sort_keys=True)
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
