"""cierzo, in each of its weight formats, from this interpreter."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import uvloop

from cierzo.bench.load import LoadClient
from cierzo.bench.peers.engine import Checkpoint, Engine, Server
from cierzo.bench.peers.process import RunningServer, Worker, free_port
from cierzo.engine.errors import ConnectionLost
from cierzo.engine.expert_statistics import ExpertStatistics, difference
from cierzo.engine.frontend.client import Client

PEER = "cierzo"
SETTINGS = {
    "bf16": "as it comes: exact",
    "int8": "exact, int8 weights",
    "int4": "exact, int4 weights",
}
ENGINES: tuple[Engine, ...] = tuple(
    Engine(
        name=f"{PEER}-{weights}",
        peer=PEER,
        number_format=weights,
        setting=setting,
        options={"max_model_len": 16_384} | ({} if weights == "bf16" else {"weights": weights}),
    )
    for weights, setting in SETTINGS.items()
)


def offline(engine: Engine, checkpoint: Checkpoint, folder: Path) -> Worker:
    """The engine core, stepped by a worker."""
    return Worker(engine, checkpoint, folder, [sys.executable])


def server(engine: Engine, checkpoint: Checkpoint, folder: Path) -> Server:
    """`cierzo serve` on a loopback port."""
    return _server(checkpoint, engine.options)


class CierzoServer(RunningServer):
    """`cierzo serve` with these options, warm. Experts are counted where they have `expert_statistics`."""

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any], log: Path, address: str = "") -> None:
        """Start it, on a free loopback port unless there is an address. Raises EngineFailed."""
        self._seen: ExpertStatistics | None = None
        super().__init__(_server(checkpoint, options, address), log)
        try:
            self._seen = uvloop.run(self._experts()) if options.get("expert_statistics") else None
        except BaseException:
            self.close()
            raise

    def chosen_experts(self) -> ExpertStatistics | None:
        """Experts that tokens chose since this was last asked; None where nobody counts them."""
        if self._seen is None:
            return None
        earlier, self._seen = self._seen, uvloop.run(self._experts())
        return difference(self._seen, earlier)

    async def _experts(self) -> ExpertStatistics:
        client = await self.connect("")
        assert isinstance(client, Client)
        async with client:
            return await client.experts()


def _server(checkpoint: Checkpoint, options: dict[str, Any], address: str = "") -> Server:
    address = address or f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "cierzo", "serve", str(checkpoint.path), "--rpc", address]
    for name, value in options.items():
        flag = name.replace("_", "-")
        command.append(f"--{flag}={value}" if not isinstance(value, bool) else f"--{'' if value else 'no-'}{flag}")
    return Server(command, functools.partial(_connect, address))


async def _connect(address: str, _: str) -> LoadClient:
    client = await Client.connect(address)
    if (await client.health()).state == "ready":
        return client
    await client.close()
    raise ConnectionLost("loading")
