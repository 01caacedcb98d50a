"""Answers that one server has interrupted and another goes on with, whose connection is lost then."""

from __future__ import annotations

import asyncio

import pytest
from fake_rpc_server import accepted, delta, final, scripted
from streams import until

from cierzo.engine.frontend.client import Client, Reconnect
from cierzo.engine.messages import Delta, Failure, Generate, Resume, TokenLogprobs

AT_ONCE = Reconnect(first_pause_s=0.0, longest_pause_s=0.0)


@pytest.mark.parametrize("is_scored", [False, True])
@pytest.mark.parametrize("is_accepted", [False, True])
@pytest.mark.parametrize("num_taken", [0, 1, 2])
def test_an_answer_that_moved_outlives_its_next_connection(run, is_scored, is_accepted, num_taken):
    """What the first server told is here or was taken: the second one tells none of it again."""
    entries = [TokenLogprobs(2, -1.0, [], []), TokenLogprobs(3, -2.0, [], [])][: 2 * is_scored]
    lost, asked = asyncio.Event(), []

    async def stops(peer, number):
        request = await peer.hear(Generate)
        told = [Delta(stream=request.stream, prompt_logprobs=entries)] if is_scored else []
        peer.say(accepted(request.stream), *told, delta(request.stream, [65]))
        peer.say(Failure(stream=request.stream, code="interrupted", message="stops", value="7"))
        await peer.hear(Generate)

    async def goes_on(peer, number):
        request = await peer.hear((Generate, Resume))
        asked.append(request)
        if number == 0:
            if is_accepted:
                peer.say(accepted(request.stream), delta(request.stream, [66]))
            await lost.wait()
            peer.drop()
            return
        peer.say(accepted(request.stream), delta(request.stream, [66]), final(request.stream, 2))
        await peer.hear(Resume)

    async def body():
        async with (
            scripted(stops) as first,
            scripted(goes_on) as second,
            await Client.connect([first, second], reconnect=AT_ONCE) as client,
        ):
            generation = client.generate(token_ids=[1, 2, 3], prompt_logprobs=0 if is_scored else None)
            deltas = [await anext(generation) for _ in range(min(num_taken, 1 + is_scored))]
            await until(lambda: asked and (not is_accepted or len(generation._inbox.tokens) == 2))
            lost.set()
            await until(lambda: len(asked) == 2)
            deltas += [each async for each in generation]
            assert [token for each in deltas for token in each.token_ids] == [65, 66]
            assert [entry for each in deltas for entry in each.prompt_logprobs] == entries

    run(body())
    first, second = asked
    assert (first.output_token_ids, first.sampling.prompt_logprobs) == ([65], None)
    if is_accepted:
        assert (second.received, second.prompt_received) == ([1], 0)
    else:
        assert second.output_token_ids == [65]
