"""A script, not a module: load a server with the client of whichever tree PYTHONPATH names, for `bench.rpc`.

    python -P bench/rpc_once.py ADDRESS CLIENTS REQUESTS:TOKENS ... [key_file=PATH] [tls_ca=PATH]

Prints requests and tokens a second of each load, as JSON. It keeps to what older trees have too.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import uvloop

from cierzo.bench.load import LoadSettings, run_load
from cierzo.engine.errors import ConnectionLost
from cierzo.engine.frontend.client import Client

START_S = 60.0


async def main(address: str, clients: str, *words: str) -> None:
    """Wait until the server is ready, then run the loads one after the other."""
    given: dict[str, Any] = dict(word.split("=", 1) for word in words if "=" in word)
    options: dict[str, Any] = {}
    if given:
        from cierzo.engine.options import Access, access  # which older trees lack

        options, given = {**access(Access(**given))}, {"access": Access(**given)}
    until_s = time.monotonic() + START_S
    while True:
        try:
            client = await Client.connect(address, **options)
            is_ready = (await client.health()).state == "ready"
            await client.close()
            if is_ready:
                break
        except ConnectionLost:
            if time.monotonic() > until_s:
                raise
        await asyncio.sleep(0.05)
    figures = []
    for requests, tokens in (load.split(":") for load in words if "=" not in load):
        settings = LoadSettings(
            rpc=address, requests=int(requests), concurrency=int(clients), output_tokens=int(tokens), **given
        )
        result = await run_load(settings)
        assert not result.errors, result.errors
        figures.append([result.requests_per_s, result.output_tokens_per_s])
    print(json.dumps(figures))


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
