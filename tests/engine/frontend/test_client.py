"""The clients against a whole front end: streaming, completion, many streams, cancellation, errors."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from contextlib import asynccontextmanager

import numpy as np
import pytest
from streams import tokens_of, until

from cierzo.engine.errors import (
    ConnectionLost,
    CoreFailed,
    Draining,
    FrameTooLarge,
    InvalidRequest,
    Overloaded,
    ProtocolError,
    VersionMismatch,
)
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.frames import pack
from cierzo.engine.messages import ChatMessage, Health, Limits, Ready, SamplingParams, Welcome

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
            assert (submit.priority, submit.deadline_at_s) == (3, pytest.approx(submit.arrival_s + 9.0))
            assert params.seed is not None  # drawn at admission

    run(body())


def test_many_streams_on_one_connection(run, serving):
    async def body():
        async with serving() as house, await Client.connect(house.address) as client:

            async def one(index):
                generation = client.generate(token_ids=[index], max_tokens=1 + index % 9, seed=0)
                got = await tokens_of(generation)
                assert got == [(index + 7 * position) % 256 for position in range(1 + index % 9)]

            await asyncio.gather(*map(one, range(200)))
            assert len(house.frontend.streams) == 0

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
            first = client.generate(token_ids=[1], max_tokens=50)
            with pytest.raises(Overloaded, match="max_streams is 1"):
                client.generate(token_ids=[1], max_tokens=50)
            assert sum([len(delta.token_ids) async for delta in first]) == 50
            with pytest.raises(InvalidRequest, match="did you mean temperature"):
                client.generate(token_ids=[1], temprature=1.0)

    run(body())


def test_no_server(run, tmp_path):
    async def body():
        for address in ("127.0.0.1:1", f"unix:{tmp_path}/none"):
            with pytest.raises(ConnectionLost, match="no server answers"):
                await Client.connect(address)

    run(body())


@asynccontextmanager
async def answering(first, *more):
    """A server that answers every connection with `first`, and each further frame with the next of `more`."""

    tasks = []

    async def answer(reader, writer):
        tasks.append(asyncio.current_task())
        for reply in (first, *more):
            await reader.read(65536)
            if reply is None:
                break
            writer.write(reply)
        else:
            await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.gather(*tasks)


HTTP = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("reply", "timeout_s", "error", "message"),
    [
        (
            b"",
            0.3,
            ConnectionLost,
            "takes connections, but did not say welcome within 0.3 s: is it a cierzo server?",
        ),
        (b"\0\0", 0.3, ConnectionLost, "did not say welcome within 0.3 s"),
        (None, 10, ConnectionLost, "has closed the connection before it said welcome: is it a cierzo server?"),
        (
            HTTP,
            10,
            ProtocolError,
            "does not speak cierzo's protocol (its answer begins with b'HTTP/1.1 400 Bad Req",
        ),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 10, ProtocolError, "its answer begins with b'SSH-2.0-OpenSSH_9.2"),
        (b"220 mail ESMTP\r\n", 10, ProtocolError, "its answer begins with b'220 mail ESMTP"),
        (b"\0\0\0\2\x93\x01", 10, ProtocolError, "does not speak cierzo's protocol"),
        (b"\0\0\0\4\xa3\xed\xa0\x80", 10, ProtocolError, "does not speak cierzo's protocol"),
        # no UTF-8: msgspec's words for it differ from version to version
        (b"\0\0\0\x0a\x81\xa4type\xa3\xed\xa0\x80", 10, ProtocolError, r"begins with b'\x00\x00\x00\n\x81\xa4type"),
    ],
)
def test_what_is_no_cierzo_server_is_told_in_words(run, reply, timeout_s, error, message):
    async def body():
        async with answering(reply) as address:
            with pytest.raises(error) as caught:
                await Client.connect(address, timeout_s=timeout_s)
            assert type(caught.value) is error
            assert caught.value.message.startswith(address)
            assert message in caught.value.message

    run(body())


def test_an_address_where_nobody_answers(run):
    async def body():
        with pytest.raises(ConnectionLost, match=r"no server answers at 127.0.0.1:1: .+"):
            await Client.connect("127.0.0.1:1")

    run(body())


def test_the_connection_ends_in_the_middle(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house:
            client = await Client.connect(house.address, reconnect=False)
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


def test_an_error_of_many_generations_keeps_no_traces_of_them(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house:
            client = await Client.connect(house.address)
            generations = [client.generate(token_ids=[1], max_tokens=9) for _ in range(50)]
            await cores.until(lambda: len(cores.now.submits) == 50)
            await house.server.close()
            for generation in generations:
                with pytest.raises(ConnectionLost) as caught:
                    await anext(generation)
            assert len(caught.traceback) < 5
            await client.close()

    run(body())


@pytest.mark.parametrize(
    "bad",
    [
        {"text": "a\ud800b"},
        {"token_ids": [1], "max_tokens": 2**70},
        {"token_ids": np.array([[1]])},
        {"token_ids": [1], "stop": "\ud800"},
        {"messages": [{"role": "user", "content": "\udce9"}]},
        {"token_ids": [1], "temperature": object()},
    ],
)
def test_what_cannot_be_sent_is_refused_at_once_and_takes_nobody_with_it(run, serving, bad):
    async def body():
        async with serving() as house, await Client.connect(house.address) as client:
            before = client.generate(token_ids=[1, 2, 3], max_tokens=5, seed=4)
            with pytest.raises(InvalidRequest):
                client.generate(**bad)
            with pytest.raises(InvalidRequest):
                await client.complete(**bad)
            behind = client.generate(token_ids=[1, 2, 3], max_tokens=5, seed=4)
            assert [await tokens_of(generation) for generation in (before, behind)] == [TOKENS, TOKENS]
            assert (await client.stats()).refused == 0  # none of it was sent

    run(body())


def test_a_request_longer_than_the_server_reads_is_refused_here(run, serving):
    """Without the feature "attach", with which it would be cut."""

    async def body():
        async with (
            serving(max_frame_bytes=1000) as house,
            await Client.connect(house.address, features=()) as client,
        ):
            other = client.generate(token_ids=[1, 2, 3], max_tokens=5, seed=4)
            with pytest.raises(FrameTooLarge, match="max_frame_bytes 1000") as caught:
                client.generate(text="x" * 1000)
            assert (caught.value.field, caught.value.limit) == ("max_frame_bytes", "1000")
            too_many = int(caught.value.value) - 1000
            with pytest.raises(FrameTooLarge):
                client.generate(text="x" * (1000 - too_many + 1))
            assert await tokens_of(client.generate(text="x" * (1000 - too_many)))
            assert await tokens_of(other) == TOKENS
            await client.ping()  # the connection lives

    run(body())


def test_a_timeout_leaves_the_generation_running_and_whole(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            generation = client.generate(token_ids=[1, 2, 3], max_tokens=5, seed=4)
            await cores.until(lambda: cores.now.submits)
            got = []
            for wait in (generation.next, generation.next_batch) * 2:
                with pytest.raises(TimeoutError, match=r"nothing came for 0\.01 s"):
                    await wait(timeout_s=0.01)
                cores.now.step()
                answer = await wait(timeout_s=10)
                got += [answer] if wait == generation.next else answer
            with pytest.raises(TimeoutError):
                await generation.next(timeout_s=0)
            cores.now.step()
            got.append(await anext(generation))
            assert [token for delta in got for token in delta.token_ids] == TOKENS
            assert await generation.next(timeout_s=10) is None
            assert await generation.next_batch(timeout_s=10) == []
            assert generation.final.samples[0].finish_reason == "length"
            assert not cores.now.aborts

    run(body())


def test_what_was_not_iterated_yet_comes_first_in_a_batch(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            generation = client.generate(token_ids=[1, 2, 3], max_tokens=5, seed=4)
            await cores.until(lambda: cores.now.submits)
            for _ in range(4):
                cores.now.step()
            await client.ping()
            got = [await anext(generation), *await generation.next_batch()]
            assert [token for delta in got for token in delta.token_ids] == TOKENS[:4]

    run(body())


def test_iterators_of_one_generation_share_it_and_all_end(run, serving):
    async def body():
        async with serving() as house, await Client.connect(house.address) as client:
            generation = client.generate(token_ids=[1, 2, 3], max_tokens=5, seed=4)
            parts = await asyncio.gather(*(tokens_of(generation) for _ in range(3)))
            assert sorted(token for part in parts for token in part) == TOKENS
            assert await tokens_of(generation) == []  # and after the end as well
            refused = client.generate(token_ids=[1], top_p=2.0)
            ends = await asyncio.gather(*(tokens_of(refused) for _ in range(3)), return_exceptions=True)
            assert [type(end) for end in ends] == [InvalidRequest] * 3
            with pytest.raises(InvalidRequest, match=r"sampling.top_p is 2.0"):
                _ = refused.final

    run(body())


def test_wait_ready_waits_while_the_server_loads(run, serving, cores):
    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            await client.wait_ready(timeout_s=5)
            cores.silent = True
            cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 2 and cores.now.hello)
            with pytest.raises(TimeoutError, match=r"not ready after 0\.2 s; its state is loading"):
                await client.wait_ready(timeout_s=0.2)
            waiting = asyncio.create_task(client.wait_ready())
            await asyncio.sleep(0.1)
            assert not waiting.done()
            cores.now.say(Ready(startup="fake core"))
            await waiting
            assert await tokens_of(client.generate(token_ids=[1, 2, 3], max_tokens=5, seed=4)) == TOKENS
            await client.drain()
            with pytest.raises(Draining, match="takes no new requests"):
                await client.wait_ready()

    run(body())


def test_wait_ready_of_a_server_that_never_will_be(run, serving, cores):
    async def body():
        async with (
            serving(cores=cores, max_core_restarts=0) as house,
            await Client.connect(house.address) as client,
        ):
            cores.now.kill()
            await until(lambda: house.frontend.health != "ready")
            with pytest.raises(CoreFailed, match="its state is failed"):
                await client.wait_ready(timeout_s=10)
        limits = Limits(max_frame_bytes=9999, max_streams=1, max_model_len=1, max_samples=1)
        welcome = pack([Welcome(version=2, server="", model="", limits=limits)])
        async with answering(welcome) as address, await Client.connect(address) as client:
            with pytest.raises(TimeoutError, match=r"not ready after 0\.05 s; its state is unknown"):
                await client.wait_ready(timeout_s=0.05)
        loading = pack([Health(stream=1, state="loading", uptime_s=0.0)])
        async with answering(welcome, loading, None) as address, await Client.connect(address) as client:
            with pytest.raises(ConnectionLost, match=f"{address} has closed the connection"):
                await client.wait_ready(timeout_s=10)

    run(body())


def test_closing_twice_and_a_close_that_is_cancelled(run, serving):
    async def body():
        async with serving() as house:
            client = await Client.connect(house.address)
            generation = client.generate(token_ids=[1], max_tokens=4000)
            closing = asyncio.create_task(client.close())
            await asyncio.sleep(0)
            closing.cancel()
            await client.close()
            await client.close()
            for call in (client.ping, client.wait_ready, generation.next):
                with pytest.raises(ConnectionLost, match="this client is closed"):
                    await call()
            with pytest.raises(ConnectionLost, match="this client is closed"):
                await client.complete(token_ids=[1])

    run(body())


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
            monkeypatch.setattr("cierzo.engine.frontend.receiving.OLDEST_VERSION", 4)
            monkeypatch.setattr("cierzo.engine.frontend.receiving.PROTOCOL_VERSION", 4)
            with pytest.raises(VersionMismatch) as caught:
                await Client.connect(house.address)
            assert (caught.value.limit, caught.value.value) == ("4", "3")

    run(body())
