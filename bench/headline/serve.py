"""Cells on real servers: `cierzo serve` on this machine's CPU or GPU, one model in memory at a time.

What a step reads and computes is not seen from outside: a simulated engine on a device of this machine's ceilings
goes through the same load, with the experts that the real one's tokens chose, and says at which rate nothing but
the ceilings would answer it.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import msgspec

from cierzo.bench.headline.cells import LIMIT_S, Cell, Subject
from cierzo.bench.headline.estimate import confirmed, estimates
from cierzo.bench.headline.figures import Figure, figure, requests_for, thinned
from cierzo.bench.headline.records import Measurement
from cierzo.bench.headline.search import Point, best, bound, search
from cierzo.bench.headline.settings import engine_settings, resolved, room
from cierzo.bench.headline.simulate import simulate, simulated_config
from cierzo.bench.latency import LoadResult
from cierzo.bench.machine import Ceilings, Machine, describe_machine
from cierzo.bench.peers import ceilings
from cierzo.bench.peers.cells import Cell as ServedCell
from cierzo.bench.peers.engine import Checkpoint
from cierzo.bench.peers.ours import CierzoServer
from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.cards import named
from cierzo.engine.cost.data_sheets import DATA_SHEETS
from cierzo.engine.cost.device import Device
from cierzo.engine.cost.work import Distinct, measured_distinct
from cierzo.engine.errors import ConfigError
from cierzo.engine.expert_statistics import ExpertStatistics

GIGA = 1e9
GIB = 1 << 30


class Serving:
    """A `Backend`: servers on `device`, "cpu" or "cuda", of checkpoints by model."""

    def __init__(self, device: str, checkpoints: dict[str, Checkpoint], folder: Path) -> None:
        self.device, self._checkpoints, self._folder = device, checkpoints, folder
        self._ceilings: Ceilings | None = None

    def ceilings(self) -> Ceilings | None:
        """Measured now, of a CPU; those of a GPU are on its data sheet."""
        self._ceilings = ceilings.measure(self._folder) if self.device == "cpu" else None
        return self._ceilings

    def open(self, subject: Subject, cells: list[Cell]) -> Session:
        """Start a server for cells of one profile. Raises EngineFailed, or ConfigError."""
        checkpoint = self._checkpoints[subject.model]
        settings = engine_settings(str(checkpoint.path), self.device, subject, cells)
        config = resolved(settings)  # before the server takes the memory that this looks at
        options = {name: value for name, value in settings.items() if name != "model"}
        options["expert_statistics"] = config.model.moe is not None
        name = f"{subject.model}-{subject.weights}-{subject.activations}-{cells[0].profile}"
        server = CierzoServer(checkpoint, options, self._folder / "logs" / f"{name}.log")
        return Session(self, server, checkpoint, config)

    def limit_device(self) -> Device | None:
        """What this machine can do at most, if that is known."""
        if self.device == "cpu":
            return None if self._ceilings is None else cpu_device(self._ceilings, describe_machine())
        name = gpu_name().lower()
        return next((named(card) for card in DATA_SHEETS if card in name), None)

    def twin(
        self, checkpoint: Checkpoint, cell: Cell, subject: Subject, concurrency: int, distinct: Distinct | None
    ) -> Figure | None:
        """The same load on a simulated engine of this machine's ceilings."""
        device = self.limit_device()
        if device is None:
            return None
        fixed = msgspec.structs.replace(cell, concurrency=concurrency)
        config = simulated_config(str(checkpoint.path), fixed, subject, device, self._folder)
        result, totals = simulate(config, fixed, concurrency, distinct)
        return figure(result, concurrency, is_throughput=cell.is_throughput, totals=totals)


class Session:
    """A server that runs."""

    def __init__(
        self, serving: Serving, server: CierzoServer, checkpoint: Checkpoint, config: EngineConfig
    ) -> None:
        self._serving, self._server, self._checkpoint, self._config = serving, server, checkpoint, config

    def measure(self, cell: Cell, subject: Subject, number: int) -> Measurement:
        """Raises EngineFailed, or NothingKeepsTheLimit."""
        config = self._config
        space = room(config, cell)
        loads: dict[int, tuple[LoadResult, ExpertStatistics | None]] = {}

        def look(concurrency: int) -> Point:
            result = self._load(cell, concurrency, number)
            loads[concurrency] = result, self._server.chosen_experts()
            found = figure(result, concurrency, is_throughput=True)
            return Point(
                concurrency=concurrency,
                requests_per_s=found.requests_per_s,
                time_per_output_token_s=found.time_per_output_token_s.p50,
                measured=True,
            )

        points: list[Point] = []
        bounded_by = ""
        if cell.concurrency is not None:
            chosen = cell.concurrency
            look(chosen)
        else:
            device = self._serving.limit_device()
            if device is None:  # nothing to forecast on
                points = search(look, space.most, LIMIT_S)
            else:
                points = confirmed(look, estimates(config, cell, space.most, device), space.most)
            measured = [point for point in points if point.measured]
            chosen = best(measured, LIMIT_S).concurrency
            bounded_by = bound(measured, chosen, space, LIMIT_S)
        result, experts = loads[chosen]
        found = figure(result, chosen, is_throughput=cell.is_throughput)
        distinct = None if experts is None else measured_distinct(experts)
        twin = self._serving.twin(self._checkpoint, cell, subject, chosen, distinct)
        return Measurement(
            figure=msgspec.structs.replace(found, steps=twin and twin.steps),
            points=points,
            bounded_by=bounded_by,
            kv_room_requests=space.fit,
            experts=experts,
            command=self._command(),
            samples=thinned(result.samples),
        )

    def close(self) -> None:
        """Stop it."""
        self._server.close()

    def _command(self) -> str:
        """As it would be typed."""
        short = {sys.executable: "python", str(self._checkpoint.path): self._checkpoint.path.name}
        return shlex.join(short.get(word, word) for word in shlex.split(self._server.command))

    def _load(self, cell: Cell, concurrency: int, number: int) -> LoadResult:
        served = ServedCell(
            name=cell.name,
            kind="served",
            unit="req/s",
            batch=concurrency,
            requests=requests_for(concurrency),
            prompt_tokens=cell.input_tokens,
            new_tokens=cell.output_tokens,
        )
        seed = zlib.crc32(f"{cell.name} {concurrency} {number}".encode())  # no prompt begins as one of another load
        result = self._server.measure(served, seed).raw
        assert isinstance(result, LoadResult)
        return result


def cpu_device(found: Ceilings, machine: Machine) -> Device:
    """A device that reaches everything that was measured: what it takes is the limit."""
    int8 = found.int8 or found.bf16
    return Device(
        name="this machine's ceilings",
        source=f"measured on {machine.processor}",
        kind="cpu",
        bytes_per_s=found.read.rate * GIGA,
        operations_per_s={
            "bf16": found.bf16.rate * GIGA,
            "fp32": found.float32.rate * GIGA,
            "int8": int8.rate * GIGA,
        },
        memory_bytes=int(machine.memory_gib * GIB),
        stated={"memory": 1.0, "experts": 1.0, "products": 1.0, "attention": 1.0},
    )


def gpu_name() -> str:
    """Of the first GPU that the driver lists. Raises ConfigError without one."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"no GPU: {error}", field="device", value="cuda") from error
