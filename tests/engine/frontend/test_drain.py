"""The end of a server: lame duck, no admission, what is left interrupted; undone; by message and by signal."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cierzo.engine.errors import Draining, Interrupted
from cierzo.engine.frontend.client import Client, SyncClient
from cierzo.engine.frontend.frontend import interruption
from cierzo.engine.frontend.stream import Stream
from cierzo.engine.messages import Abort, Done, Drain, Drained, Failure, Generate, SamplingParams
from cierzo.engine.weights.make import make_checkpoint

DEADLINE_S = 20


async def _read(generation, tokens):
    async for delta in generation:
        tokens += delta.token_ids


def test_a_lame_duck_says_so_and_takes_requests_until_its_time_is_over(run, serving, cores):
    async def body():
        async with serving(cores=cores, lame_duck_s=0.05) as house, await Client.connect(house.address) as client:
            house.frontend.drain()
            house.frontend.drain()  # asked for twice: once
            assert (await client.health()).state == "draining"
            assert (await client.complete(token_ids=[1], max_tokens=2)).usage.output_tokens == 2
            assert not house.frontend._drain._over.is_set()  # nothing is open, and something may still come
            await house.frontend.drained()
            with pytest.raises(Draining) as caught:
                await client.complete(token_ids=[1])
            assert caught.value.retry_after_s == 1.0

    run(body())


def test_what_is_left_when_the_time_is_over_can_be_resumed_elsewhere(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores, drain_s=0.05) as house, await Client.connect(house.address) as client:
            arguments = {"token_ids": [3], "max_tokens": 8, "temperature": 1.0}
            cut, orphan = client.generate(**arguments), client.generate(token_ids=[4])
            await cores.until(lambda: len(cores.now.submits) == 2)
            for _ in range(3):
                cores.now.step()
            drained = asyncio.create_task(client.drain())
            tokens = []
            with pytest.raises(Interrupted, match="with this seed") as caught:
                await _read(cut, tokens)
            assert caught.value.retry
            await drained
            await cores.until(lambda: len(cores.now.aborts) == 2)  # the core works no more for them
            assert cores.now.aborts[0] == Abort(request_id=0)
            with pytest.raises(Interrupted):
                await _read(orphan, [])
        async with serving(cores=cores) as other, await Client.connect(other.address) as client:
            cores.free = True
            seed = int(caught.value.value)
            rest = client.generate(**arguments, seed=seed, output_token_ids=tokens)
            tokens += [token async for delta in rest for token in delta.token_ids]
            assert tokens == [(3 + seed + 7 * position) % 256 for position in range(8)]

    run(body())


def test_a_drain_can_be_undone(run, serving, cores, peering):
    cores.free = False

    async def body():
        async with serving(cores=cores, drain_s=0.05) as house, peering(house) as peer, peering(house) as other:
            sampling = SamplingParams(max_tokens=2)
            peer.say(Generate(stream=1, token_ids=[1], sampling=sampling))
            await cores.until(lambda: cores.now.submits)
            peer.say(Drain(stream=2))
            peer.say(Generate(stream=3, token_ids=[1]))
            refusal = await peer.hear_until(Failure)
            assert (refusal.stream, refusal.code) == (3, "draining")
            other.say(Drain(stream=9, undo=True))
            assert await other.hear() == Done(stream=9)
            undone = await peer.hear_until(Failure)
            assert (undone.stream, undone.code, "undone" in undone.message) == (2, "draining", True)
            assert house.frontend.health == "ready"
            peer.say(Generate(stream=4, token_ids=[1], sampling=sampling))
            await cores.until(lambda: len(cores.now.submits) == 2)
            await asyncio.sleep(0.1)  # the drain's timer would have ended them
            assert len(house.frontend.streams) == 2
            other.say(Drain(stream=9))  # and again
            cores.free = True
            cores.now.go_on()
            assert await other.hear() == Drained(stream=9)

    run(body())


def test_the_log_counts_each_request_once(run, serving, cores, peering, caplog):
    cores.free = False
    caplog.set_level("INFO")

    async def body():
        async with serving(cores=cores, drain_s=0.05, lame_duck_s=0.05) as house, peering(house) as peer:
            for stream in (1, 2):
                peer.say(Generate(stream=stream, token_ids=[1], sampling=SamplingParams(max_tokens=2)))
            async with await Client.connect(house.address) as client:
                await client.generate(token_ids=[1]).accepted()
                orphaned = client._session.link
                orphaned._inboxes.clear()  # its end says nothing to the server
                orphaned._transport.abort()
                while house.frontend.streams.num_read > 2:
                    await asyncio.sleep(0)
            house.frontend.drain()
            house.frontend.undo_drain()
            house.frontend.undo_drain()
            house.frontend.drain()
            await house.frontend.drained()

    run(body())
    duck = "a lame duck for 0.05 s: 3 requests are open, and others are taken"
    said = [record.getMessage() for record in caplog.records if record.name.endswith((".drain", ".frontend"))]
    assert said == [
        duck,
        "the drain is undone: requests are taken",
        duck,
        "draining 3 requests, at most 0.05 s; no others are taken",
        "interrupted 3 requests",
    ]


def test_a_request_that_was_not_begun_has_no_seed_to_go_on_with():
    stream = Stream(
        *(1, 1, None, True, 1, 0, 0.0, 1.0),
    )
    error = interruption(stream)
    assert (error.retry, error.field, error.value) == (True, None, None)
    stream.sampling = SamplingParams(seed=7)
    assert (interruption(stream).field, interruption(stream).value) == ("seed", "7")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small; the fake runner reads its config.json alone."""
    return make_checkpoint(tmp_path_factory.mktemp("drain") / "tiny", like="small3")


@pytest.fixture
def start(checkpoint, tmp_path):
    """Start `cierzo serve` on `tmp_path`'s socket, with options; it and its core's process id, once it is ready."""
    servers = []

    def ready(*options: str) -> tuple[subprocess.Popen[str], int]:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "cierzo", "serve", str(checkpoint), "--runner", "fake"),
                *("--rpc", f"unix:{tmp_path / 'rpc.sock'}", *options),
            ],
            stdout=subprocess.PIPE,
            stderr=(tmp_path / "log").open("wb"),
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        servers.append(server)
        assert any(line.startswith("ready: ") for line in server.stdout)
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text(encoding="ascii").split()
        return server, int(children[0])

    yield ready
    for server in servers:
        server.kill()
        server.wait()
        server.stdout.close()


ENDLESS = {"token_ids": [1], "max_tokens": 10**6, "ignore_eos": True, "temperature": 1.0}


def test_sigterm_drains_and_interrupts_what_does_not_end(start, tmp_path):
    server, _ = start("--drain-s", "1", "--lame-duck-s", "0.3")
    with SyncClient(f"unix:{tmp_path / 'rpc.sock'}") as client:
        endless = client.generate(**ENDLESS)
        next(endless)
        signalled_s = time.monotonic()
        server.send_signal(signal.SIGTERM)
        while client.health().state != "draining":
            pass
        assert client.complete(token_ids=[1], max_tokens=2).usage.output_tokens == 2  # a lame duck
        with pytest.raises(Interrupted):
            for _ in endless:
                pass
        assert time.monotonic() - signalled_s >= 1.3
    assert server.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_drain_sooner(start, tmp_path, second):
    server, _ = start("--drain-s", "600")
    with SyncClient(f"unix:{tmp_path / 'rpc.sock'}") as client:
        endless = client.generate(**ENDLESS)
        next(endless)
        server.send_signal(signal.SIGTERM)
        while client.health().state != "draining":
            pass
        server.send_signal(second)
        with pytest.raises(Interrupted):
            for _ in endless:
                pass
    assert server.wait(DEADLINE_S) == 0
    lines = [line.partition(": ")[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert lines[-5:] == [
        "SIGTERM: the server drains",
        "draining 1 requests, at most 600 s; no others are taken",
        f"{second.name}: the drain ends before its time",
        "interrupted 1 requests",
        "the server exits with status 0",
    ]


def test_a_drain_ends_in_time_while_the_core_hangs(start, tmp_path):
    server, core = start("--drain-s", "0.5")
    with SyncClient(f"unix:{tmp_path / 'rpc.sock'}") as client:
        endless = client.generate(**ENDLESS)
        next(endless)
        os.kill(core, signal.SIGSTOP)
        signalled_s = time.monotonic()
        server.send_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            for _ in endless:
                pass
        assert server.wait(DEADLINE_S) == 0
        assert time.monotonic() - signalled_s < 0.5 + 2
