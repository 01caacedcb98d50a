"""Cells on simulated cards, in virtual time: the real load client, scheduler and cache manager at true size."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from cierzo.bench.campaign import loop
from cierzo.bench.headline.cells import LIMIT_S, Cell, Plan, Subject
from cierzo.bench.headline.figures import Figure, figure, requests_for, thinned
from cierzo.bench.headline.measurement import Headline, Measurement, told, value
from cierzo.bench.headline.search import Choice, NothingKeepsTheLimit, Point, best, choose, estimates
from cierzo.bench.headline.settings import engine_settings, resolved, room
from cierzo.bench.latency import LoadResult, RequestSample
from cierzo.bench.load import LoadClient, LoadSettings
from cierzo.bench.virtual import SimulatedServer, run_simulated_load
from cierzo.engine.config import EngineConfig
from cierzo.engine.cost.cards import named
from cierzo.engine.cost.device import Device
from cierzo.engine.cost.step_model import StepTotals
from cierzo.engine.cost.work import Distinct
from cierzo.engine.errors import ConfigError
from cierzo.engine.messages import Delta

SEED = 5
CLOSE = 0.9  # of the best forecast: nearer, layouts are loaded to be compared


class Layout(msgspec.Struct, frozen=True):
    """`replicas` engines, each on `device`."""

    replicas: int
    device: Device

    @property
    def name(self) -> str:
        """The layout in words."""
        cards = "one card" if self.device.cards == 1 else f"{self.device.cards} cards"
        return f"{self.replicas} engines of {cards}" if self.replicas > 1 else f"one engine on {cards}"


class Simulation(Headline):
    """Models on a simulated device, by name, at true size, or by folder."""

    def __init__(self, plan: Plan, device: Device, models: dict[str, str], folder: Path) -> None:
        """folder: for descriptions of devices that have no name."""
        super().__init__(plan)
        self._device, self._models, self._folder = device, models, folder

    def open(self, block: loop.Block[Cell, Subject], subject: Subject) -> Session:
        """Nothing is loaded."""
        return Session(self, subject)

    def measure(self, cell: Cell, subject: Subject) -> Measurement:
        """One engine over all cards, or a replica on each, whichever is better; where a concurrency is searched
        for, one that is forecast to be far behind is not loaded. Raises ConfigError where none holds the model."""
        engines, others = [], []
        for layout in layouts(self._device):
            try:
                engines.append(self._engine(cell, subject, layout))
            except (ConfigError, NothingKeepsTheLimit) as error:
                others.append(f"{layout.name}: {error}")
        if not engines:
            raise ConfigError("; ".join(others), field="weights")
        most_per_s = max(engine.forecast_per_s for engine in engines)
        found = []
        for engine in engines:
            if engine.forecast_per_s < CLOSE * most_per_s:
                others.append(f"{engine.layout.name}: {engine.forecast_per_s:.4g} requests/s by forecast")
            else:
                found.append(engine.measure())
        choose_best = max if cell.is_throughput else min
        won = choose_best(found, key=lambda one: value(cell, one.figure))
        others += [f"{one.layout}: {told(cell, one.figure)}" for one in found if one is not won]
        return msgspec.structs.replace(won, others=others)

    def _engine(self, cell: Cell, subject: Subject, layout: Layout) -> _Engine:
        config = simulated_config(self._models[subject.model], cell, subject, layout.device, self._folder)
        return _Engine(cell, layout, config)


class Session(loop.Session[Cell]):
    """A subject in a simulation."""

    def __init__(self, simulation: Simulation, subject: Subject) -> None:
        self._simulation, self._subject = simulation, subject

    def measure(self, cell: Cell, number: int) -> Any:
        """Raises ConfigError, or NothingKeepsTheLimit."""
        return msgspec.to_builtins(self._simulation.measure(cell, self._subject))


class _Engine:
    """An engine in one layout, for one cell. forecast_per_s: requests at the concurrency that was searched for."""

    def __init__(self, cell: Cell, layout: Layout, config: EngineConfig) -> None:
        """Raises NothingKeepsTheLimit."""
        self.layout = layout
        self.forecast_per_s = 0.0
        self._cell, self._config, self._room = cell, config, room(config, cell)
        self._replicas = layout.replicas  # of them those that have clients
        self._estimates: list[Point] = []
        self._loads: dict[int, tuple[Figure, list[RequestSample]]] = {}
        if cell.concurrency is None:
            self._estimates = estimates(config, cell, self._room.most, layout.device)
            self.forecast_per_s = best(self._estimates, LIMIT_S).requests_per_s * layout.replicas
        else:
            self._replicas = min(layout.replicas, cell.concurrency)

    def measure(self) -> Measurement:
        """The engine's figure. Raises NothingKeepsTheLimit."""
        if self._cell.concurrency is None:
            choice = choose(self._look, self._estimates, self._room)
        else:
            choice = Choice(-(-self._cell.concurrency // self._replicas))
            self._look(choice.concurrency)
        found, samples = self._loads[choice.concurrency]
        return Measurement(
            layout=self.layout.name,
            figure=found,
            points=[_of_all(point, self._replicas) for point in choice.points],
            bounded_by=choice.bounded_by,
            kv_room_requests=self._room.fit * self.layout.replicas,
            samples=samples,
        )

    def _look(self, concurrency: int) -> Point:
        cell = self._cell
        result, totals = simulate(self._config, cell, concurrency)
        found = figure(
            result, concurrency, is_throughput=cell.is_throughput, replicas=self._replicas, totals=totals
        )
        self._loads[concurrency] = found, thinned(result.samples)
        return Point(
            concurrency=concurrency,
            requests_per_s=found.requests_per_s / found.replicas,
            time_per_output_token_s=found.time_per_output_token_s.p50,
            measured=True,
        )


def layouts(device: Device) -> list[Layout]:
    """How an engine can use a device: all cards together, and a replica on each."""
    if device.cards == 1:
        return [Layout(1, device)]
    single = named(device.name.partition("x")[2])
    if single is None or named(device.name) != device:
        name = f"{device.name}, one of {device.cards}"
        single = msgspec.structs.replace(device, name=name, cards=1, link_bytes_per_s=0.0)
    return [Layout(1, device), Layout(device.cards, single)]


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
    config: EngineConfig, cell: Cell, concurrency: int, distinct: Distinct | None = None
) -> tuple[LoadResult, StepTotals]:
    """A closed loop, and the steps of its steady time. distinct: experts that so many tokens touch; by default as
    if chosen at random. Raises ConfigError if a request failed."""
    requests = requests_for(concurrency)
    server = _Watched(config, concurrency, requests, distinct)
    settings = LoadSettings(
        rpc="",
        requests=requests,
        concurrency=concurrency,
        input_tokens=cell.input_tokens,
        output_tokens=cell.output_tokens,
        seed=SEED,
    )
    result = run_simulated_load(server, settings)
    if result.errors:
        raise ConfigError(f"requests failed: {result.errors}", field="requests", value=result.errors)
    return result, server.steady_totals()


class _Watched(SimulatedServer):
    """A server that notes its totals when the steady time begins and ends."""

    def __init__(self, config: EngineConfig, concurrency: int, requests: int, distinct: Distinct | None) -> None:
        super().__init__(config, distinct)
        self._ended = 0
        self._at = {concurrency: StepTotals(), requests - concurrency: StepTotals()}

    async def connect(self, _: str = "") -> LoadClient:
        """A connection whose answers are counted."""
        return _Counted(await super().connect(), self)

    def request_ended(self) -> None:
        """Count the end of a request, and note the totals where the steady time begins or ends."""
        self._ended += 1
        if self._ended in self._at:
            self._at[self._ended] = msgspec.structs.replace(self.totals)

    def steady_totals(self) -> StepTotals:
        """The totals of the steps in the steady time."""
        begin, end = (msgspec.structs.asdict(self._at[count]) for count in sorted(self._at))
        return StepTotals(**{name: end[name] - begin[name] for name in end})


class _Counted:
    """A `LoadClient` that tells the server of each request's end."""

    def __init__(self, client: LoadClient, server: _Watched) -> None:
        self._client, self._server = client, server

    async def generate(self, **request: Any) -> AsyncIterator[Delta]:
        """Stream one answer."""
        async for delta in self._client.generate(**request):
            yield delta
        self._server.request_ended()

    async def model_info(self) -> Any:
        """The server's."""
        return await self._client.model_info()

    async def close(self) -> None:
        """Nothing to let go of."""


def _of_all(point: Point, replicas: int) -> Point:
    return msgspec.structs.replace(
        point, concurrency=point.concurrency * replicas, requests_per_s=point.requests_per_s * replicas
    )
