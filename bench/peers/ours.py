"""cierzo, in each of its weight formats."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from cierzo.bench.load import LoadClient
from cierzo.bench.peers.engine import Checkpoint, Engine, Server
from cierzo.bench.peers.process import Worker
from cierzo.bench.peers.served import RunningServer, free_port
from cierzo.engine.errors import ConnectionLost
from cierzo.engine.expert_statistics import ExpertStatistics, difference
from cierzo.engine.frontend.client import Client

PEER = "cierzo"
BF16 = Engine(
    name="cierzo-bf16",
    peer=PEER,
    number_format="bf16",
    setting="as it comes: exact",
    options={"max_model_len": 16_384},
)
ENGINES = (
    BF16,
    *(
        msgspec.structs.replace(
            BF16,
            name=f"cierzo-{weights}",
            number_format=weights,
            setting=f"exact, {weights} weights",
            options={**BF16.options, "weights": weights},
        )
        for weights in ("int8", "int4")
    ),
)


class Cierzo:
    """This package, from this interpreter."""

    engines = ENGINES

    def offline(self, engine: Engine, checkpoint: Checkpoint, folder: Path) -> Worker:
        """The engine core, stepped by a worker."""
        log = folder / "logs" / f"{engine.name}-{checkpoint.name}.log"
        return Worker(
            [sys.executable],
            "cierzo_backend",
            checkpoint.path,
            engine.options,
            vocab_size=checkpoint.vocab_size,
            log=log,
        )

    def server(self, engine: Engine, checkpoint: Checkpoint, folder: Path) -> Server:
        """`cierzo serve` on a loopback port."""
        return _server(checkpoint, engine.options)


class CierzoServer(RunningServer):
    """`cierzo serve` with these options, warm. Experts are counted where they have `expert_statistics`."""

    def __init__(self, checkpoint: Checkpoint, options: dict[str, Any], log: Path, address: str = "") -> None:
        """Start it, on a free loopback port unless there is an address. Raises EngineFailed."""
        super().__init__(_server(checkpoint, options, address), log)
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
        async def ask() -> ExpertStatistics:
            client = await self._connect("")
            assert isinstance(client, Client)
            try:
                statistics = (await client.stats()).core.experts
                assert statistics is not None
                return statistics
            finally:
                await client.close()

        return uvloop.run(ask())


def _server(checkpoint: Checkpoint, options: dict[str, Any], address: str = "") -> Server:
    address = address or f"127.0.0.1:{free_port()}"
    flags = [_flag(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
    command = [sys.executable, "-m", "cierzo", "serve", str(checkpoint.path), "--rpc", address, *flags]

    async def connect() -> LoadClient:
        client = await Client.connect(address)
        if (await client.health()).state == "ready":
            return client
        await client.close()
        raise ConnectionLost("loading")

    return Server(command, connect)


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"--no-{name[2:]}"
    return f"{name}={value}"
