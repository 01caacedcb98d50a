"""The engines that cells are measured on: `cierzo serve` on this machine's CPU or GPU, or simulated cards.

On simulated cards the real load client, scheduler and cache manager run at true size in virtual time. Of real
servers one model is in memory at a time. What a step of theirs reads and computes is not seen from outside: a
simulated engine on a device of this machine's ceilings goes through the same load, with the experts that the real
one's tokens chose, and says at which rate nothing but the ceilings would answer it.
"""

from __future__ import annotations

import functools
import shlex
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cierzo.bench import machine
from cierzo.bench.campaign import loop
from cierzo.bench.headline.cells import Cell, Plan, Subject
from cierzo.bench.headline.measurement import Measurement, at_best, closed_loop, engine_settings, measured, resolved
from cierzo.bench.peers.ours import CierzoServer
from cierzo.bench.revision import output
from cierzo.bench.virtual import SimulatedServer, run_simulated_load
from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.cards import named
from cierzo.engine.cost.data_sheets import DATA_SHEETS
from cierzo.engine.cost.device import Device
from cierzo.engine.cost.work import Distinct, measured_distinct
from cierzo.engine.errors import ConfigError

SEED = 5  # of simulated loads


@dataclass
class Headline(loop.Campaign[Cell, Subject]):
    """A plan; Serving and Simulation say where its engines run."""

    plan: Plan

    @property
    def blocks(self) -> Sequence[loop.Block[Cell, Subject]]:
        """A profile's cells, which one engine serves."""
        plan = self.plan
        return [
            loop.Block(profile, [cell for cell in plan.cells if cell.profile == profile], plan.subjects)
            for profile in ("throughput", "latency")
        ]

    def told(self, cell: Cell, result: Any) -> str:
        """The figure that the cell is judged by."""
        return msgspec.convert(result, Measurement).told(cell)


@dataclass
class Serving(Headline):
    """Servers of checkpoints by model, on the GPU of this name, or on the CPU. Logs go below `folder`."""

    checkpoints: dict[str, Path]
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

    def open(self, block: loop.Block[Cell, Subject], subject: Subject) -> loop.Session[Cell]:
        """Start a server for cells of one profile. Raises EngineFailed, or ConfigError."""
        checkpoint = self.checkpoints[subject.model]
        settings = engine_settings(str(checkpoint), "cuda" if self.gpu else "cpu", subject, block.cells)
        config = resolved(settings)  # before the server takes the memory that this looks at
        options = {name: value for name, value in settings.items() if name != "model"}
        options["expert_statistics"] = config.model.moe is not None
        name = f"{subject.model}-{subject.weights}-{subject.activations}-{block.name}"
        server = CierzoServer(checkpoint, options, self.folder / "logs" / f"{name}.log")
        return loop.Session(functools.partial(self._measure, server, subject, config), server.close)

    def _measure(
        self, server: CierzoServer, subject: Subject, config: EngineConfig, cell: Cell, number: int
    ) -> Any:
        """Raises EngineFailed, or ConfigError."""
        path, device = str(self.checkpoints[subject.model]), self.limit_device
        short = {sys.executable: "python", path: Path(path).name}
        command = shlex.join(short.get(word, word) for word in shlex.split(server.command))

        def load(concurrency: int, replicas: int) -> Measurement:
            # no prompt begins as one of another load
            seed = zlib.crc32(f"{cell.name} {concurrency} {number}".encode())
            result = server.load(closed_loop(cell, concurrency, seed))
            found = measured(cell, result, concurrency, replicas)
            return msgspec.structs.replace(found, experts=server.experts, command=command)

        found = at_best(cell, config, device, load)
        if device is not None:
            # the same load on a simulated engine of this machine's ceilings
            fixed = msgspec.structs.replace(cell, concurrency=found.concurrency)
            config = simulated_config(path, fixed, subject, device, self.folder)
            distinct = None if found.experts is None else measured_distinct(found.experts)
            twin = simulate(config, fixed, found.concurrency, distinct=distinct)
            found = msgspec.structs.replace(found, steps=twin.steps)
        return msgspec.to_builtins(found)


def gpu_name() -> str:
    """The name of the first GPU that the driver lists. Raises ConfigError without one."""
    found = output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0").strip()
    if not found:
        raise ConfigError("no GPU: nvidia-smi names none", field="device", value="cuda")
    return found


@dataclass
class Simulation(Headline):
    """Models on a simulated device, by name, at true size, or by folder. folder: for descriptions of devices that
    have no name."""

    device: Device
    models: dict[str, str]
    folder: Path

    def open(self, block: loop.Block[Cell, Subject], subject: Subject) -> loop.Session[Cell]:
        """Nothing is loaded."""
        return loop.Session(functools.partial(self._measure, subject))

    def _measure(self, subject: Subject, cell: Cell, _: int) -> Any:
        """Measure one engine over all cards, and a replica on each, and take the better. Raises ConfigError where
        neither can be."""
        found, others, model = [], [], self.models[subject.model]
        for replicas, device in layouts(self.device):
            cards = "one card" if device.cards == 1 else f"{device.cards} cards"
            layout = f"{replicas} engines of {cards}" if replicas > 1 else f"one engine on {cards}"
            try:
                config = simulated_config(model, cell, subject, device, self.folder)
                one = at_best(cell, config, device, functools.partial(simulate, config, cell), replicas)
            except ConfigError as error:
                others.append(f"{layout}: {error}")
            else:
                found.append(msgspec.structs.replace(one, layout=layout))
        if not found:
            raise ConfigError("; ".join(others), field="weights")
        choose_best = max if cell.is_throughput else min
        won = choose_best(found, key=lambda one: one.value(cell))
        others += [f"{one.layout}: {one.told(cell)}" for one in found if one is not won]
        return msgspec.to_builtins(msgspec.structs.replace(won, others=others))


def layouts(device: Device) -> list[tuple[int, Device]]:
    """How engines can use a device: one with all cards together, or so many with one card each."""
    if device.cards == 1:
        return [(1, device)]
    single = named(device.name.partition("x")[2])
    if single is None or named(device.name) != device:
        name = f"{device.name}, one of {device.cards}"
        single = msgspec.structs.replace(device, name=name, cards=1, link_bytes_per_s=0.0)
    return [(1, device), (device.cards, single)]


def simulated_config(model: str, cell: Cell, subject: Subject, device: Device, folder: Path) -> EngineConfig:
    """The configuration of an engine for one cell. Raises ConfigError where the model does not fit."""
    name = device.name
    if named(name) != device:
        path = folder / "devices" / f"{name.replace('/', '-')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(device))
        name = str(path)
    settings = engine_settings(model, f"simulated:{name}", subject, [cell])
    return resolved(settings | {"text_only": True})  # all loads are of text


def simulate(
    config: EngineConfig, cell: Cell, concurrency: int, replicas: int = 1, distinct: Distinct | None = None
) -> Measurement:
    """Closed loops, each on an engine of its own. distinct: experts that so many tokens touch, by default as if
    chosen at random. Raises ConfigError if a request failed."""
    server = SimulatedServer(config, distinct)
    result = run_simulated_load(server, closed_loop(cell, concurrency, SEED))
    if result.errors:
        raise ConfigError(f"requests failed: {result.errors}", field="requests", value=result.errors)
    begin, end = (server.ends[index - 1] for index in (concurrency, -concurrency))
    return measured(cell, result, concurrency, replicas, end.since(begin))
