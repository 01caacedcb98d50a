"""The clients against a whole front end: streaming, completion, many streams, cancellation, errors."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading

import pytest
import uvloop

from cierzo.engine.errors import ConnectionLost, InvalidRequest, Overloaded, VersionMismatch
from cierzo.engine.frontend.client import Client, SyncClient
from cierzo.engine.messages import ChatMessage, SamplingParams

TOKENS = [10, 17, 24, 31, 38]


def test_token_ids_stream(run, serving):
    async def body():
        async with serving() as house, await Client.connect(house.address) as client:
            generation = client.generate(token_ids=[1, 2, 3], max_tokens=5, seed=4)
            with pytest.raises(RuntimeError):
                _ = generation.final
            deltas = [delta async for delta in generation]
            assert [token for delta in deltas for token in delta.token_ids] == TOKENS
            assert "".join(delta.text for delta in deltas) == bytes(TOKENS).decode()
            final = generation.final
            assert (final.samples[0].finish_reason, final.samples[0].output_tokens) == ("length", 5)
            assert final.samples[0].token_ids == []  # they were streamed
            assert (final.usage.prompt_tokens, final.usage.output_tokens, final.usage.cached_tokens) == (3, 5, 3)
            assert final.seed == 4

    run(body())


def test_the_whole_answer_at_once(run, serving):
    async def body():
        async with serving() as house, await Client.connect(house.address) as client:
            final = await client.complete(token_ids=[1, 2, 3], max_tokens=5, seed=4, n=2, logprobs=1)
            first, second = final.samples
            assert first.token_ids == TOKENS
            assert second.token_ids == [27, 34, 41, 48, 55]
            assert second.text == bytes(second.token_ids).decode()
            assert [entry.token_id for entry in second.logprobs] == second.token_ids
            assert final.usage.output_tokens == 10

    run(body())


def test_messages_and_text_reach_the_core_as_tokens(run, serving, cores):
    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            turn = {"role": "user", "content": "Hi"}
            await client.complete(messages=[turn], max_tokens=1, reasoning_effort="high")
            await client.complete(messages=[ChatMessage(role="user", content="Hi")], max_tokens=1)
            await client.complete(text="Hi", max_tokens=1)
            prompts = [submit.prompt_token_ids for submit in cores.now.submits]
            chat = b"[user]Hi"
            assert prompts == [
                [256, *chat, *b"(high)[assistant]"],
                [256, *chat, *b"[assistant]"],
                [256, *b"Hi"],
            ]

    run(body())


def test_parameters_reach_the_core(run, serving, cores):
    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            base = SamplingParams(top_k=7, max_tokens=2)
            await client.complete(
                token_ids=[1], sampling=base, stop="xyz", min_p=0.5, priority=3, deadline_s=9.0, stop_token_ids=[5]
            )
            (submit,) = cores.now.submits
            params = submit.sampling
            assert (params.top_k, params.max_tokens, params.min_p) == (7, 2, 0.5)
            assert (params.stop, params.stop_token_ids) == (("xyz",), (5,))
            assert (submit.priority, submit.deadline_s) == (3, pytest.approx(9.0, abs=1.0))
            assert params.seed is not None  # drawn at admission

    run(body())


def test_many_streams_on_one_connection(run, serving):
    async def body():
        async with serving() as house, await Client.connect(house.address) as client:

            async def one(index):
                generation = client.generate(token_ids=[index], max_tokens=1 + index % 9, seed=0)
                got = [token async for delta in generation for token in delta.token_ids]
                assert got == [(index + 7 * position) % 256 for position in range(1 + index % 9)]

            await asyncio.gather(*map(one, range(200)))
            assert house.frontend.num_streams == 0

    run(body())


def test_control_methods(run, serving, cores):
    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            await client.ping()
            health = await client.health()
            assert health.state == "ready"
            assert health.uptime_s >= 0
            await client.complete(token_ids=[1], max_tokens=2)
            stats = await client.stats()
            assert (stats.connections, stats.streams, stats.accepted, stats.finished) == (1, 0, 1, 1)
            assert stats.core.total_blocks == 9
            model = await client.model_info()
            assert (model.vocab_size, model.eos_token_ids, model.has_chat_template) == (300, [257], True)
            assert cores.now.hello is not None
            assert b"fake" in cores.now.hello

    run(body())


@pytest.mark.parametrize("how", ["break", "task", "method", "close"])
def test_leaving_a_stream_cancels_it(run, serving, cores, how):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house:
            client = await Client.connect(house.address)
            generation = client.generate(token_ids=[1], max_tokens=100)
            await cores.until(lambda: cores.now.submits)
            if how == "break":
                cores.now.step()
                async for _ in generation:
                    break
                del generation
                gc.collect()
            elif how == "task":
                task = asyncio.create_task(anext(generation))
                await client.ping()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif how == "method":
                generation.cancel()
                assert [delta async for delta in generation] == []
                assert generation.final.samples[0].finish_reason == "cancelled"
            else:
                await client.close()
                with pytest.raises(ConnectionLost):
                    await anext(generation)
            await cores.until(lambda: cores.now.aborts)
            assert not cores.now.running
            await client.close()

    run(body())


def test_refusals_are_raised_as_their_class(run, serving):
    async def body():
        async with serving(max_streams_per_connection=1) as house, await Client.connect(house.address) as client:
            with pytest.raises(InvalidRequest) as caught:
                await client.complete(token_ids=[1], top_p=1.5)
            error = caught.value
            assert (error.field, error.value, error.limit) == ("sampling.top_p", "1.5", "more than 0 to 1")
            first, second = (client.generate(token_ids=[1], max_tokens=50) for _ in range(2))
            with pytest.raises(Overloaded) as refused:
                await anext(second)
            assert refused.value.retry_after_s > 0
            assert sum([len(delta.token_ids) async for delta in first]) == 50
            with pytest.raises(TypeError):
                client.generate(token_ids=[1], temprature=1.0)

    run(body())


def test_no_server(run, tmp_path):
    async def body():
        for address in ("127.0.0.1:1", f"unix:{tmp_path}/none"):
            with pytest.raises(ConnectionLost, match="no server answers"):
                await Client.connect(address)

    run(body())


def test_a_server_that_is_silent_or_speaks_another_version(run):
    async def body():
        replies = {"silent": b"", "other": b"\0\0\0\2\x93\x01"}
        for reply, error in ((replies["silent"], ConnectionLost), (replies["other"], Exception)):

            async def answer(reader, writer, reply=reply):
                writer.write(reply)
                await reader.read()
                writer.close()

            async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
                port = server.sockets[0].getsockname()[1]
                with pytest.raises(error):
                    await Client.connect(f"127.0.0.1:{port}", timeout_s=0.05)
            await asyncio.sleep(0)

    run(body())


def test_the_connection_ends_in_the_middle(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house:
            client = await Client.connect(house.address)
            generation = client.generate(token_ids=[1], max_tokens=9)
            await cores.until(lambda: cores.now.submits)
            await house.server.close()
            with pytest.raises(ConnectionLost):
                await anext(generation)
            for call in (client.ping, lambda: client.complete(token_ids=[1])):
                with pytest.raises(ConnectionLost):
                    await call()
            await client.close()

    run(body())


@pytest.fixture
def served(serving):
    """Address of a server in another thread."""
    loop, stop, ready, address = uvloop.new_event_loop(), asyncio.Event(), threading.Event(), []

    async def serve():
        async with serving() as house:
            address.append(house.address)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    ready.wait(10)
    yield address[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


def test_the_blocking_client(served):
    with SyncClient(served) as client:
        generation = client.generate(token_ids=[1, 2, 3], max_tokens=5, seed=4)
        assert [token for delta in generation for token in delta.token_ids] == TOKENS
        assert generation.final.usage.output_tokens == 5
        assert client.complete(token_ids=[1, 2, 3], max_tokens=5, seed=4).samples[0].token_ids == TOKENS
        client.ping()
        assert client.health().state == "ready"
        assert client.model_info().name == client.welcome.model == "fake"
        for _ in client.generate(token_ids=[1], max_tokens=4000):
            break
        with pytest.raises(InvalidRequest):
            client.complete(token_ids=[])
        client.drain()
        assert client.stats().streams == 0
        assert client.health().state == "draining"
    before = threading.active_count()
    with pytest.raises(ConnectionLost):
        SyncClient("127.0.0.1:1")
    assert threading.active_count() == before


def test_importing_the_client_is_light():
    code = (
        "import sys, cierzo.engine.frontend.client as client\n"
        "heavy = {'torch', 'numpy', 'jinja2', 'tokenizers', 'transformers', 'uvloop'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_version_mismatch_is_told_apart(run, serving, monkeypatch):
    async def body():
        async with serving() as house:
            monkeypatch.setattr("cierzo.engine.frontend.rpc.PROTOCOL_VERSION", 3)
            with pytest.raises(VersionMismatch) as caught:
                await Client.connect(house.address)
            assert (caught.value.limit, caught.value.value) == ("3", "2")

    run(body())
