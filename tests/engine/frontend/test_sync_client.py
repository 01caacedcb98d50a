"""The blocking client: the same answers, from any thread; and how it ends."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import threading
import time

import pytest

from cierzo.engine.errors import ConnectionLost, InvalidRequest
from cierzo.engine.frontend.client import SyncClient
from cierzo.engine.frontend.loop_thread import LoopThread

TOKENS = [10, 17, 24, 31, 38]
REQUEST = {"token_ids": [1, 2, 3], "max_tokens": 5, "seed": 4}


def tokens_of(deltas):
    return [token for delta in deltas for token in delta.token_ids]


def test_the_blocking_client(served):
    with SyncClient(served.address) as client:
        client.wait_ready(timeout_s=10)
        generation = client.generate(**REQUEST)
        assert tokens_of(generation) == TOKENS
        assert tokens_of(generation) == []
        assert generation.next() is None
        assert generation.final.usage.output_tokens == 5
        assert client.complete(**REQUEST).samples[0].token_ids == TOKENS
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


def test_what_cannot_be_sent_is_refused_in_the_caller_s_thread(served):
    with SyncClient(served.address) as client:
        before = client.generate(**REQUEST)
        for bad in (
            {"text": "\ud800"},
            {"token_ids": [1], "max_tokens": 2**70},
            {"token_ids": [1], "max_token": 3},
        ):
            for ask in (client.generate, client.complete):
                with pytest.raises(InvalidRequest):
                    ask(**bad)
        assert tokens_of(before) == TOKENS

        def prompt():
            yield from client.complete(**REQUEST).samples[0].token_ids[:0]
            yield from (1, 2, 3)

        assert tokens_of(client.generate(**REQUEST | {"token_ids": prompt()})) == TOKENS


def test_a_timeout_leaves_the_generation_running(served, cores):
    cores.free = False
    with SyncClient(served.address) as client:
        generation = client.generate(**REQUEST)
        served.do(lambda: cores.until(lambda: cores.now.submits))
        got = []
        for _ in TOKENS:
            with pytest.raises(TimeoutError, match=r"nothing came for 0\.01 s"):
                generation.next(timeout_s=0.01)
            served.do(cores.now.step)
            got.append(generation.next(timeout_s=10))
        assert tokens_of(got) == TOKENS
        assert generation.next(timeout_s=10) is None
        assert not cores.now.aborts


def test_cancel(served, cores):
    cores.free = False
    with SyncClient(served.address) as client:
        generation = client.generate(**REQUEST)
        served.do(lambda: cores.until(lambda: cores.now.submits))
        with pytest.raises(RuntimeError, match="has not ended"):
            _ = generation.final
        for _ in range(2):
            generation.cancel()
        assert list(generation) == []
        assert generation.final.samples[0].finish_reason == "cancelled"
        generation.cancel()
        client.ping()
        assert len(cores.now.aborts) == 1
    generation.cancel()


def test_threads_share_a_client_and_a_generation(served):
    with SyncClient(served.address) as client:
        generation, got = client.generate(**REQUEST | {"max_tokens": 500}), []

        def take():
            for delta in generation:
                got.extend(delta.token_ids)
            assert client.complete(**REQUEST).samples[0].token_ids == TOKENS

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert sorted(got) == sorted((10 + 7 * position) % 256 for position in range(500))


def test_after_close_everything_is_refused_by_name(served):
    client = SyncClient(served.address)
    generation, threads = client.generate(token_ids=[1], max_tokens=4000), threading.active_count()
    client.close()
    assert threading.active_count() == threads - 1
    client.close()
    calls = [client.ping, client.health, client.stats, client.model_info, client.drain]
    calls += [client.wait_ready, generation.next, lambda: client.generate(text="x"), lambda: next(iter(generation))]
    for call in [*calls, lambda: client.complete(text="x")]:
        with pytest.raises(ConnectionLost, match="this client is closed"):
            call()
    with pytest.raises(ConnectionLost), client:
        client.ping()


def test_what_waits_in_other_threads_when_the_client_closes(served, cores):
    cores.free = False
    client, ends = SyncClient(served.address), []
    served.do(lambda: setattr(cores, "silent", True))
    served.do(cores.now.kill)
    served.do(lambda: cores.until(lambda: len(cores.lives) == 2 and cores.now.hello))

    def wait(call):
        with pytest.raises(ConnectionLost, match="this client is closed"):
            call()
        ends.append(call)

    calls = [client.wait_ready, lambda: client.wait_ready(timeout_s=60)]  # one sleeps between two questions
    threads = [threading.Thread(target=wait, args=(call,)) for call in calls]
    threads += [threading.Thread(target=client.close) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(ends) == len(calls)


def test_closing_after_the_connection_is_lost(served):
    with SyncClient(served.address, reconnect=False) as client:
        generation = client.generate(token_ids=[1], max_tokens=4000)
        served.do(served.house.server.close)
        with pytest.raises(ConnectionLost, match=f"{served.address} has closed the connection"):
            list(generation)
        with pytest.raises(ConnectionLost):
            client.ping()


def test_it_stays_in_its_process(served):
    with SyncClient(served.address) as client:
        for leave in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="SyncClient objects cannot be pickled or copied"):
                leave(client)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                client.close()
                client.ping()
            except RuntimeError as error:
                status = 0 if "a fork of it" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        client.ping()


def test_an_interrupt_before_the_loop_has_a_call_leaves_nothing_behind():
    """And one right behind it cancels the call. A coroutine that never ran would be told on stderr."""
    loop, log = LoopThread("test"), []

    async def body():
        try:
            await asyncio.sleep(60)
        finally:
            log.append("ended")

    def ask():
        log.append("asked")
        return body()

    def interrupted(before):
        def call(*arguments):
            if not before:
                call_soon_threadsafe(*arguments)
            raise KeyboardInterrupt

        return call

    call_soon_threadsafe = loop._loop.call_soon_threadsafe
    try:
        for before in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop._loop, "call_soon_threadsafe", interrupted(before))
                with pytest.raises(KeyboardInterrupt):
                    loop.run(ask)
        loop.run(lambda: asyncio.sleep(0.1))
        assert log == ["asked", "ended"]  # one of the two was asked, and does not run on
    finally:
        loop.close()


def test_an_error_before_there_is_a_coroutine_is_raised_where_the_call_stands():
    loop = LoopThread("test")

    def ask():
        raise TypeError("no such keyword")

    try:
        with pytest.raises(TypeError, match="no such keyword"):
            loop.run(ask)
        assert loop.run(lambda: asyncio.sleep(0, 3)) == 3
    finally:
        loop.close()
