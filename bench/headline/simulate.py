"""Cells on simulated cards, in virtual time: the real load client, scheduler and cache manager at true size."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cierzo.bench.campaign import loop
from cierzo.bench.headline.cells import Cell, Subject
from cierzo.bench.headline.measurement import Headline, Measurement, closed_loop, measured, told, value
from cierzo.bench.headline.search import at_best, engine_settings, resolved
from cierzo.bench.virtual import SimulatedServer, run_simulated_load
from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.cards import named
from cierzo.engine.cost.device import Device
from cierzo.engine.cost.step_model import StepTotals
from cierzo.engine.cost.work import Distinct
from cierzo.engine.errors import ConfigError

SEED = 5


@dataclass
class Simulation(Headline):
    """Models on a simulated device, by name, at true size, or by folder. folder: for descriptions of devices that
    have no name."""

    device: Device
    models: dict[str, str]
    folder: Path

    def open(self, block: loop.Block[Cell, Subject], subject: Subject) -> Session:
        """Nothing is loaded."""
        return Session(self, subject)


@dataclass(frozen=True)
class Session(loop.Session[Cell]):
    """A subject on the simulated device."""

    simulation: Simulation
    subject: Subject

    def measure(self, cell: Cell, number: int) -> Any:
        """Measure one engine over all cards, and a replica on each, and take the better. Raises ConfigError where
        neither can be."""
        found, others, given = [], [], self.simulation
        for replicas, device in layouts(given.device):
            cards = "one card" if device.cards == 1 else f"{device.cards} cards"
            layout = f"{replicas} engines of {cards}" if replicas > 1 else f"one engine on {cards}"
            try:
                config = simulated_config(
                    given.models[self.subject.model], cell, self.subject, device, given.folder
                )
                one = at_best(cell, config, device, functools.partial(simulate, config, cell), replicas)
            except ConfigError as error:
                others.append(f"{layout}: {error}")
            else:
                found.append(msgspec.structs.replace(one, layout=layout))
        if not found:
            raise ConfigError("; ".join(others), field="weights")
        choose_best = max if cell.is_throughput else min
        won = choose_best(found, key=lambda one: value(cell, one))
        others += [f"{one.layout}: {told(cell, one)}" for one in found if one is not won]
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
    return resolved(engine_settings(model, f"simulated:{name}", subject, [cell]))


def simulate(
    config: EngineConfig, cell: Cell, concurrency: int, replicas: int = 1, distinct: Distinct | None = None
) -> Measurement:
    """Closed loops, each on an engine of its own. distinct: experts that so many tokens touch, by default as if
    chosen at random. Raises ConfigError if a request failed."""
    server = SimulatedServer(config, distinct)
    result = run_simulated_load(server, closed_loop(cell, concurrency, SEED))
    if result.errors:
        raise ConfigError(f"requests failed: {result.errors}", field="requests", value=result.errors)
    begin, end = (msgspec.structs.asdict(server.ends[index - 1]) for index in (concurrency, -concurrency))
    totals = StepTotals(**{name: end[name] - begin[name] for name in end})
    return measured(cell, result, concurrency, replicas, totals)
