"""Connections that nobody waits for."""

from __future__ import annotations

import asyncio
import gc

import pytest

from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.client_link import ClientLink


@pytest.mark.timeout(20)
def test_a_connection_that_nobody_waits_for_any_more_is_closed(run):
    """A server that loads must not keep the places of those who have left."""

    async def body():
        ended = asyncio.Event()

        async def answer(reader, writer):
            await reader.read()
            ended.set()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(Client.connect(f"127.0.0.1:{port}"), 0.1)
            await asyncio.wait_for(ended.wait(), 10)

    run(body())


def test_a_connection_that_is_lost_before_anybody_waits_is_told_to_nobody(run, caplog):
    async def body():
        link = ClientLink(asyncio.get_running_loop(), "peer")
        link.connection_lost(None)

    run(body())
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]
