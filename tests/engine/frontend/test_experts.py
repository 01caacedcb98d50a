"""Expert statistics over the RPC: asked of the core, answered to everyone who waits, whatever becomes of either."""

from __future__ import annotations

import asyncio

import pytest

from cierzo.engine.errors import CoreFailed, InvalidRequest, Overloaded
from cierzo.engine.expert_statistics import ExpertStatistics, StepBucket
from cierzo.engine.frontend.client import Client
from cierzo.engine.messages import CoreError, Experts, Failure, GetExperts, Ping, Pong, StepOutput

STATISTICS = ExpertStatistics(
    layers=[1],
    num_experts=4,
    top_k=2,
    expert_tokens=[[5, 0, 2, 1]],
    decode=[StepBucket(most_tokens=4, steps=1, tokens=4, distinct=[3])],
    prefill=[],
)


def test_what_the_core_counted_reaches_the_client(run, serving, cores):
    cores.experts = STATISTICS

    async def body():
        async with (
            serving(cores=cores, counts_experts=True) as house,
            await Client.connect(house.address) as client,
        ):
            assert await client.experts() == STATISTICS
            assert await client.experts() == STATISTICS
            assert cores.now.expert_reads == 2
            assert (await client.model_info()).counts_experts

    run(body())


def test_a_server_that_does_not_count_refuses_and_does_not_ask(run, serving, cores):
    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            with pytest.raises(InvalidRequest, match="without --expert-statistics") as caught:
                await client.experts()
            assert caught.value.field == "expert_statistics"
            assert cores.now.expert_reads == 0
            assert not (await client.model_info()).counts_experts

    run(body())


def test_all_who_wait_are_answered_at_once_but_for_those_who_left(run, serving, cores, peering):
    async def body():
        async with serving(cores=cores, counts_experts=True) as house, peering(house) as peer:
            peer.say(GetExperts(stream=1))
            async with peering(house) as gone:
                gone.say(GetExperts(stream=1))
                gone.say(Ping(stream=2))
                assert await gone.hear() == Pong(stream=2)
            peer.say(GetExperts(stream=7))
            await cores.until(lambda: cores.now.expert_reads)
            while house.frontend.num_connections > 1:
                await asyncio.sleep(0)
            peer.say(Ping(stream=8))
            assert await peer.hear() == Pong(stream=8)
            assert len(house.frontend._expert_waiters) == 2  # a closed connection is not kept for an answer
            cores.now.say(StepOutput(deltas=[], experts=STATISTICS))
            for stream in (1, 7):
                assert await peer.hear() == Experts(stream=stream, statistics=STATISTICS)
            assert cores.now.expert_reads == 1  # one question for all
            cores.experts = STATISTICS
            peer.say(GetExperts(stream=9))
            assert await peer.hear() == Experts(stream=9, statistics=STATISTICS)

    run(body())


def test_who_asks_too_much_at_once_is_refused(run, serving, cores, peering):
    async def body():
        async with (
            serving(cores=cores, counts_experts=True, max_streams_per_connection=2) as house,
            peering(house) as peer,
        ):
            for stream in range(3):
                peer.say(GetExperts(stream=stream))
            refused = await peer.hear()
            assert isinstance(refused, Failure)
            assert (refused.stream, refused.code, refused.field) == (2, "overloaded", "max_streams_per_connection")

    run(body())


def test_a_core_that_dies_before_it_answers(run, serving, cores):
    async def body():
        async with (
            serving(cores=cores, counts_experts=True, max_core_restarts=1) as house,
            await Client.connect(house.address) as client,
        ):
            for restart in range(2):
                asked = asyncio.ensure_future(client.experts())
                await cores.until(lambda: cores.now.expert_reads)
                cores.error = None if restart == 0 else CoreError(code="core_failed", message="no more")
                cores.now.kill()
                with pytest.raises(Overloaded, match="loading"):
                    await asked
                if restart == 0:
                    await cores.until(lambda: len(cores.lives) == 2)
                    while (await client.health()).state != "ready":
                        await asyncio.sleep(0)
            while (await client.health()).state != "failed":
                await asyncio.sleep(0)
            with pytest.raises(CoreFailed):
                await client.experts()

    run(body())
