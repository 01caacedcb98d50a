"""cierzo, in each of its weight formats, from this interpreter."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from cierzo.bench.load import LoadClient
from cierzo.bench.peers.engine import Checkpoint, Engine
from cierzo.bench.peers.process import HOST, RunningServer, Worker, free_port
from cierzo.engine.errors import ConnectionLost
from cierzo.engine.expert_statistics import ExpertStatistics, difference
from cierzo.engine.frontend.client import Client, SyncClient

PEER = "cierzo"
ENGINES: tuple[Engine, ...] = tuple(
    Engine(
        name=f"{PEER}-{weights}",
        peer=PEER,
        number_format=weights,
        setting=f"exact, {weights} weights",
        options={"max_model_len": 16_384, "weights": weights},
    )
    for weights in ("bf16", "int8", "int4")
)


def offline(engine: Engine, checkpoint: Checkpoint, folder: Path) -> Worker:
    """The engine core, stepped by a worker."""
    return Worker(engine, checkpoint, folder, [sys.executable])


def server(engine: Engine, checkpoint: Checkpoint, folder: Path) -> CierzoServer:
    """`cierzo serve`."""
    return CierzoServer(checkpoint, engine.options, engine.log(checkpoint, folder, "-server"))


class CierzoServer(RunningServer):
    """`cierzo serve` with these options, warm. Experts are counted where they have `expert_statistics`."""

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any], log: Path, address: str = "") -> None:
        """Start it, on a free loopback port unless there is an address. Raises EngineFailed."""
        self._address = address or f"{HOST}:{free_port()}"
        command = [sys.executable, "-m", "cierzo", "serve", str(checkpoint.path), "--rpc", self._address]
        for name, value in options.items():
            flag = name.replace("_", "-")
            is_switch = isinstance(value, bool)
            command.append(f"--{'' if value else 'no-'}{flag}" if is_switch else f"--{flag}={value}")
        super().__init__(command, functools.partial(_connect, self._address), log)
        try:
            self._seen = self._experts() if options.get("expert_statistics") else None
        except BaseException:
            self.close()
            raise

    def chosen_experts(self) -> ExpertStatistics | None:
        """Experts that tokens chose since this was last asked; None where nobody counts them."""
        if self._seen is None:
            return None
        earlier, self._seen = self._seen, self._experts()
        return difference(self._seen, earlier)

    def _experts(self) -> ExpertStatistics:
        with SyncClient(self._address) as client:
            statistics = client.stats().core.experts
        assert statistics is not None
        return statistics


async def _connect(address: str, _: str) -> LoadClient:
    client = await Client.connect(address)
    if (await client.health()).state == "ready":
        return client
    await client.close()
    raise ConnectionLost("loading")
