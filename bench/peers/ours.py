"""cierzo, in each of its weight formats, from this interpreter."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from cierzo.bench.latency import LoadResult
from cierzo.bench.load import LoadClient, LoadSettings
from cierzo.bench.peers.engine import Engine
from cierzo.bench.peers.process import HOST, RunningServer, Worker, free_port
from cierzo.engine.errors import ConnectionLost
from cierzo.engine.expert_statistics import ExpertStatistics, difference
from cierzo.engine.frontend.client import Client, SyncClient


class Cierzo(Engine, frozen=True):
    """cierzo in exact mode."""

    peer: str = "cierzo"

    def offline(self, checkpoint: Path, folder: Path) -> Worker:
        """The engine core, stepped by a worker."""
        return Worker(self, checkpoint, folder, [sys.executable])

    def server(self, checkpoint: Path, folder: Path) -> CierzoServer:
        """`cierzo serve`."""
        return CierzoServer(checkpoint, self.options, self.log(checkpoint, folder, "-server"))


ENGINES = tuple(
    Cierzo(name=f"cierzo-{name}", number_format=name, options={"max_model_len": 16_384, "weights": name})
    for name in ("bf16", "int8", "int4")
)


class CierzoServer(RunningServer):
    """`cierzo serve` with these options, warm. `experts`: those that tokens of the last load chose; None where
    `expert_statistics` is off."""

    experts: ExpertStatistics | None = None

    def __init__(self, checkpoint: Path, options: dict[str, Any], log: Path) -> None:
        """Start it on a free loopback port. Raises EngineFailed."""
        self._address = f"{HOST}:{free_port()}"
        command = [sys.executable, "-m", "cierzo", "serve", str(checkpoint), "--rpc", self._address]
        for name, value in options.items():
            flag = name.replace("_", "-")
            is_switch = isinstance(value, bool)
            command.append(f"--{'' if value else 'no-'}{flag}" if is_switch else f"--{flag}={value}")
        super().__init__(command, functools.partial(_connect, self._address), log)

    def load(self, settings: LoadSettings) -> LoadResult:
        """Run a load, and count the experts that its tokens choose. Raises EngineFailed."""
        before = self._counted()
        result = super().load(settings)
        after = self._counted()
        self.experts = difference(after, before) if before and after else None
        return result

    def _counted(self) -> ExpertStatistics | None:
        with SyncClient(self._address) as client:
            return client.stats().core.experts


async def _connect(address: str, _: str) -> LoadClient:
    client = await Client.connect(address)
    if (await client.health()).state == "ready":
        return client
    await client.close()
    raise ConnectionLost("loading")
