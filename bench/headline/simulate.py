"""Cells on simulated cards, in virtual time: the real load client, scheduler and cache manager at true size."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from cierzo.bench.campaign import loop
from cierzo.bench.headline.cells import Cell, Plan, Subject
from cierzo.bench.headline.measurement import Headline, Measurement, closed_loop, measured, told, value
from cierzo.bench.headline.search import at_best, engine_settings, resolved
from cierzo.bench.virtual import SimulatedServer, run_simulated_load
from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.cards import named
from cierzo.engine.cost.device import Device
from cierzo.engine.cost.step_model import StepTotals
from cierzo.engine.cost.work import Distinct
from cierzo.engine.errors import ConfigError
from cierzo.engine.messages import Delta

SEED = 5


class Simulation(Headline):
    """Models on a simulated device, by name, at true size, or by folder."""

    def __init__(self, plan: Plan, device: Device, models: dict[str, str], folder: Path) -> None:
        """folder: for descriptions of devices that have no name."""
        super().__init__(plan)
        self._device, self._models, self._folder = device, models, folder

    def open(self, block: loop.Block[Cell, Subject], subject: Subject) -> Session:
        """Nothing is loaded."""
        return Session(self._device, self._models[subject.model], subject, self._folder)


class Session(loop.Session[Cell]):
    """A subject on a simulated device."""

    def __init__(self, device: Device, model: str, subject: Subject, folder: Path) -> None:
        self._device, self._model, self._subject, self._folder = device, model, subject, folder

    def measure(self, cell: Cell, number: int) -> Any:
        """Measure one engine over all cards, and a replica on each, and take the better. Raises ConfigError where
        neither can be."""
        found, others = [], []
        for replicas, device in layouts(self._device):
            cards = "one card" if device.cards == 1 else f"{device.cards} cards"
            layout = f"{replicas} engines of {cards}" if replicas > 1 else f"one engine on {cards}"
            try:
                config = simulated_config(self._model, cell, self._subject, device, self._folder)
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
    server = _Watched(config, distinct)
    result = run_simulated_load(server, closed_loop(cell, concurrency, SEED))
    if result.errors:
        raise ConfigError(f"requests failed: {result.errors}", field="requests", value=result.errors)
    begin, end = (msgspec.structs.asdict(server.ends[index - 1]) for index in (concurrency, -concurrency))
    totals = StepTotals(**{name: end[name] - begin[name] for name in end})
    return measured(cell, result, concurrency, replicas, totals)


class _Watched(SimulatedServer):
    """A server, and its totals at the end of each request: those of the steady time lie between two of them."""

    def __init__(self, config: EngineConfig, distinct: Distinct | None) -> None:
        super().__init__(config, distinct)
        self.ends: list[StepTotals] = []

    async def generate(self, **request: Any) -> AsyncIterator[Delta]:
        """Stream one answer."""
        async for delta in super().generate(**request):
            yield delta
        self.ends.append(msgspec.structs.replace(self.totals))
