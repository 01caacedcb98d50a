"""Memory of what is over is freed at once: the cycle collector is set to come too rarely to be waited for."""

from __future__ import annotations

import asyncio
import gc
import weakref

from streams import generate, until

from cierzo.engine.messages import FEATURES, Final, Hello


def test_a_connection_that_is_gone_is_in_no_cycle(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores, orphan_s=0.01) as house:
            async with peering(house, Hello(client="test", features=[*FEATURES])) as peer:
                connection = weakref.ref(next(iter(house.server._connections)))
                peer.say(generate(1, max_tokens=3))
                await peer.hear_until(Final)
                cores.free = False
                peer.say(generate(2, max_tokens=100))
                await until(lambda: len(house.frontend.streams))
            await until(lambda: not house.server._connections and not house.frontend.streams)
            await asyncio.sleep(0.05)
            assert connection() is None, gc.get_referrers(connection())

    gc.collect()
    gc.disable()
    try:
        run(body())
    finally:
        gc.enable()
