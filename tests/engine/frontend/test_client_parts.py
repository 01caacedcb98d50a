"""Clients and answers in parts: what a generation offers, conversations with tools, lost connections."""

from __future__ import annotations

import pytest
from marked import RIGHT, TOKENS, bare, ids
from streams import tokens_of

from cierzo.engine.errors import InvalidRequest
from cierzo.engine.frontend.client import Client, SyncClient
from cierzo.engine.messages import FEATURES, Part
from cierzo.engine.testing.words import EOS


@pytest.fixture(autouse=True)
def speaks(cores):
    """Every answer is this one."""
    cores.answer = lambda submit, sample: TOKENS


def test_a_conversation_with_tools(run, marking, cores):
    """Until the model calls no more; its turns go back to it letter by letter."""
    says = [ids('[THINK]hm[/THINK][TOOL_CALLS]wind[ARGS]{"at":  "here"}'), list(b"It blows.")]
    cores.answer = lambda submit, sample: [*says[len(cores.now.submits) - 1], EOS]
    tools = [{"name": "wind", "description": "", "parameters": {"type": "object"}}]

    async def body():
        async with marking() as house, await Client.connect(house.address) as client:
            messages = [{"role": "user", "content": "Wind?"}]
            while (answer := await client.ask(messages=messages, tools=tools, max_tokens=100)).tool_calls:
                messages.append(answer.turn)
                for call in answer.tool_calls:
                    assert (call.name, call.arguments) == ("wind", '{"at":  "here"}')
                    messages.append({"role": "tool", "content": "yes", "tool_call_id": call.id, "name": call.name})
            assert answer.text == "It blows."
            assert (answer.finish_reason, answer.broken_calls) == ("stop", [])
            first, second = cores.now.submits
            assert second.prompt_token_ids[len(first.prompt_token_ids) :][:6] == [*b"[assis"]
            said = ids('[THINK]hm[/THINK][TOOL_CALLS]wind[ARGS]{"at":  "here"}')
            place = len(first.prompt_token_ids) + len("[assistant]")
            assert second.prompt_token_ids[place : place + len(said)] == said

    run(body())


def test_a_generation_offers_the_answer_so_far(run, marking, cores):
    async def body():
        async with marking() as house, await Client.connect(house.address) as client:
            assert set(client.welcome.features) == set(FEATURES)
            generation = client.generate(token_ids=[1], n=2, max_tokens=200)
            first = await generation.next()
            assert generation.answer(first.sample).parts in ([], [Part(kind="thinking", num_tokens=1)])
            async for delta in generation:
                assert delta.text in generation.answer(delta.sample).text
            assert [bare(generation.answer(sample).parts) for sample in range(2)] == [RIGHT] * 2
            assert [call.name for call in generation.answer(1).tool_calls] == ["wind", "rain"]
            batch = client.generate(token_ids=[1], max_tokens=200)
            while await batch.next_batch():
                pass
            assert bare(batch.answer().parts) == RIGHT

    run(body())


def test_a_lost_connection_does_not_cost_or_double_a_part(run, marking, cores):
    cores.free = False

    async def body():
        async with marking() as house, await Client.connect(house.address, reconnect=True) as client:
            generation = client.generate(token_ids=[1], max_tokens=200)
            await generation.accepted()
            await cores.until(lambda: cores.now.submits)
            for count in range(len(TOKENS) - 1):
                cores.now.step()
                await generation.next()
                if count in (3, 20, 35):
                    for connection in [*house.server._connections]:
                        connection.drop()
            cores.go_on()
            async for _ in generation:
                pass
            assert bare(generation.answer().parts) == RIGHT

    run(body())


def test_the_blocking_client_has_the_same(served, cores):
    cores.answer = lambda submit, sample: [*b"It blows.", EOS]
    with SyncClient(served.address) as client:
        generation = client.generate(token_ids=[1])
        assert generation.answer().text == ""
        for _ in generation:
            pass
        assert generation.answer().text == "It blows."
        assert client.ask(token_ids=[1]).turn.content == "It blows."


def test_what_needs_the_feature_is_refused_by_the_client_where_it_is_missing(run, marking):
    async def body():
        async with marking() as house, await Client.connect(house.address, features=("resume",)) as client:
            with pytest.raises(InvalidRequest, match="needs the feature parts") as caught:
                client.generate(messages=[{"role": "user", "content": "x"}], tools=[{"name": "wind"}])
            assert caught.value.field == "tools"

    run(body())


def test_without_the_feature_a_whole_answer_alone_is_joined(run, serving):
    """Deltas are not kept then, and a part of an answer is not passed off as all of it."""

    async def body():
        async with serving() as house, await Client.connect(house.address, features=("credit",)) as client:
            generation = client.generate(token_ids=[1], max_tokens=3)
            assert len(await tokens_of(generation)) == 3
            with pytest.raises(InvalidRequest, match="feature parts") as caught:
                generation.answer()
            assert (caught.value.field, caught.value.limit) == ("features", "parts")
            assert (await client.ask(token_ids=[1], max_tokens=3)).finish_reason == "length"

    run(body())
