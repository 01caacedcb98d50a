"""A core that hangs is seen, killed and replaced, and every stream goes on; how often cores may die."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from msgspec.structs import replace
from streams import by_sample, tokens_of

from cierzo.cache.config import CacheConfig
from cierzo.engine.errors import CoreFailed, CoreStalled
from cierzo.engine.flight import Header, packed, read
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.core_link import COMMANDS_PER_WRITE, _ending, _Pipe
from cierzo.engine.frontend.flights import MAX_KEPT, Flights
from cierzo.engine.frontend.frames import pack
from cierzo.engine.frontend.restarts import Restarts
from cierzo.engine.messages import Abort, CoreError
from cierzo.engine.signs import SignsPage
from cierzo.engine.worker.fake import fake_config
from cierzo.engine.worker.replay import Replay
from cierzo.scheduler.config import SchedulerConfig

SUPPORT = Path(__file__).parents[2] / "support"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT), *filter(None, sys.path)])}
CONFIG = fake_config(
    SchedulerConfig(budget_tokens=64, max_chunk_tokens=32, max_running=16, max_model_len=4096),
    CacheConfig(block_tokens=8, num_blocks=4096, hash_key="00" * 16),
    vocab_size=300,
)
REQUESTS = [{"token_ids": [9, i], "max_tokens": 200, "seed": i, "n": 1 + i % 2} for i in range(3)]
LIMIT_S = 60.0


@pytest.fixture
def hanging(children, tmp_path):
    """`hanging("native", 50)`: a spawn of cores the first of which hangs so at that launch."""

    def spawn_of(how, launch=1):
        async def start(path):
            words = [str(SUPPORT / "hanging_core.py"), path, how, str(launch), str(tmp_path / "hung")]
            children.append(await asyncio.create_subprocess_exec(sys.executable, *words, env=ENVIRONMENT))
            return children[-1]

        return start

    return spawn_of


async def _answers(client):
    """The tokens of REQUESTS, sample by sample."""
    answers = await asyncio.gather(*(by_sample(client.generate(**request)) for request in REQUESTS))
    return [tokens for tokens, _ in answers]


async def _begun(house, client):
    """The task of `_answers`, once every stream has tokens."""
    answers = asyncio.create_task(_answers(client))
    while [stream.first_token_s is not None for stream in house.frontend.streams] != [True] * len(REQUESTS):
        await asyncio.sleep(0.005)
    return answers


async def _until(client, state):
    while (await client.health()).state != state:
        await asyncio.sleep(0.02)


# --- hangs -------------------------------------------------------------------------------------------------


def test_a_stopped_core_is_seen_within_two_seconds_and_replaced(run, serving, hanging, children):
    async def body():
        async with (
            serving(engine_config=CONFIG, spawn=hanging("never"), core_hang_s=6.0) as house,
            await Client.connect(house.address) as client,
        ):
            unbroken = await _answers(client)
            answers = await _begun(house, client)
            os.kill(children[0].pid, signal.SIGSTOP)
            stopped_s = time.monotonic()
            await _until(client, "stalled")
            assert 1.0 < time.monotonic() - stopped_s < 2.5  # the rule's own bound, 2 s, is in test_signs.py
            with pytest.raises(CoreStalled, match="no sign of life") as caught:
                await client.complete(token_ids=[1])
            assert caught.value.retry_after_s
            assert await answers == unbroken
            assert ((await client.health()).state, (await client.stats()).core_restarts) == ("ready", 1)
        assert [child.returncode for child in children] == [-signal.SIGKILL, 0]

    run(body(), LIMIT_S)


def test_a_short_stop_is_nothing_and_a_longer_one_is_over_when_the_core_goes_on(run, serving, hanging, children):
    async def body():
        async with (
            serving(engine_config=CONFIG, spawn=hanging("never"), core_stall_s=1.0, core_hang_s=60.0) as house,
            await Client.connect(house.address) as client,
        ):
            unbroken = await _answers(client)
            answers = await _begun(house, client)
            os.kill(children[0].pid, signal.SIGSTOP)
            for _ in range(10):
                await asyncio.sleep(0.05)
                assert (await client.health()).state == "ready"
            os.kill(children[0].pid, signal.SIGCONT)
            assert await answers == unbroken
            os.kill(children[0].pid, signal.SIGSTOP)
            await _until(client, "stalled")
            os.kill(children[0].pid, signal.SIGCONT)
            await _until(client, "ready")
            assert await _answers(client) == unbroken
            assert (await client.stats()).core_restarts == 0
        assert [child.returncode for child in children] == [0]

    run(body(), LIMIT_S)


@pytest.mark.parametrize(("how", "told"), [("native", "has run for"), ("interpreter", "no sign of life")])
def test_a_step_that_never_returns_is_a_hang(run, serving, hanging, children, caplog, how, told):
    async def body():
        async with (
            serving(engine_config=CONFIG, spawn=hanging(how, 40), core_stall_s=0.5, core_hang_s=1.0) as house,
            await Client.connect(house.address) as client,
        ):
            broken = await _answers(client)
            assert (await client.stats()).core_restarts == 1
            assert await _answers(client) == broken
        assert [child.returncode for child in children] == [-signal.SIGKILL, 0]

    run(body(), LIMIT_S)
    assert any("the core process hung" in message and told in message for message in caplog.messages)


def test_a_long_step_is_no_hang(run, serving, hanging, children, tmp_path):
    async def body():
        async with (
            serving(engine_config=CONFIG, spawn=hanging("long", 40), core_hang_s=1.0) as house,
            await Client.connect(house.address) as client,
        ):
            await _answers(client)
            assert (tmp_path / "hung").exists()  # the long step has been taken
            assert ((await client.health()).state, (await client.stats()).core_restarts) == ("ready", 0)
        assert [child.returncode for child in children] == [0]

    run(body(), LIMIT_S)


# --- restarts ----------------------------------------------------------------------------------------------


def _restarts(**limits):
    return Restarts(FrontendConfig(**limits))


def test_fruitless_deaths_count_in_the_window_and_fruitful_ones_in_the_hour():
    restarts = _restarts(max_core_restarts=3, max_core_restarts_per_hour=6)
    for second in range(4):
        restarts.record(second, committed=True)
        assert restarts.refusal("x") is None
        assert restarts.delay_s == 0.0
    restarts.record(1000.0, committed=False)
    restarts.record(1001.0, committed=False)
    assert restarts.refusal("x") is None
    restarts.record(1002.0, committed=True)
    error = restarts.refusal("it was shot")
    assert (error.field, error.limit) == ("max_core_restarts_per_hour", "6")
    assert "within an hour" in error.message
    assert "it was shot" in error.message
    restarts.record(3602.5, committed=True)
    assert restarts.refusal("x") is None  # the first ones are forgotten


def test_the_window_forgets():
    restarts = _restarts(max_core_restarts=2, core_restart_window_s=60.0)
    for second in (0.0, 30.0, 61.0):
        restarts.record(second, committed=False)
        assert restarts.refusal("x") is None
    restarts.record(89.0, committed=False)
    error = restarts.refusal("x")
    assert (error.field, error.limit) == ("max_core_restarts", "2")
    assert "without ending a step within 60 s" in error.message


def test_restarts_back_off_until_a_core_ends_a_step():
    restarts = _restarts(max_core_restarts=100)
    delays = []
    for second in range(9):
        restarts.record(second, committed=False)
        delays.append(restarts.delay_s)
    assert delays == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]
    restarts.record(10, committed=True)
    restarts.record(11, committed=False)
    assert restarts.delay_s == 0


def test_a_death_of_the_hunt_is_forgiven_once():
    restarts = _restarts(max_core_restarts=1)
    for second in range(20):
        restarts.record(second, committed=False)
        restarts.forgive()
        restarts.forgive()
        assert (restarts.refusal("x"), restarts.delay_s) == (None, 0.0)
    restarts.record(30, committed=False)
    restarts.record(31, committed=False)
    restarts.record(32, committed=True)
    restarts.forgive()  # it did not count there
    assert restarts.refusal("x").field == "max_core_restarts"


def test_the_fourth_kill_of_cores_that_ended_steps_does_not_end_the_server(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            stream = client.generate(token_ids=[1], max_tokens=7, seed=0)
            got = []
            for life in range(1, 7):
                await cores.until(lambda life=life: len(cores.lives) == life and cores.now.submits)
                cores.now.step()
                got += (await anext(stream)).token_ids
                cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 7 and cores.now.submits)
            cores.now.step()
            got += await tokens_of(stream)
            assert got == [1 + 7 * position for position in range(7)]
            assert ((await client.health()).state, (await client.stats()).core_restarts) == ("ready", 6)

    run(body())


def test_four_cores_that_die_before_a_step_end_the_server(run, serving, cores, clock):
    cores.free = False

    async def body():
        async with (
            serving(cores=cores, clock=clock) as house,
            await Client.connect(house.address) as client,
        ):
            for life in range(1, 5):
                await cores.until(lambda life=life: len(cores.lives) == life and cores.now.hello)
                await _until(client, "ready")
                cores.now.kill()
                await client.ping()
            await _until(client, "failed")
            with pytest.raises(CoreFailed):
                await client.complete(token_ids=[1])
            assert len(cores.lives) == 4

    run(body())


def test_a_core_that_does_not_start_again_counts_as_dead(run, serving, cores, caplog):
    async def body():
        async with (
            serving(cores=cores, max_core_restarts=2) as house,
            await Client.connect(house.address) as client,
        ):
            cores.error = CoreError(code="checkpoint_error", message="somebody removed it")
            cores.now.kill()
            await _until(client, "failed")
            assert len(cores.lives) == 3

    run(body())
    assert (
        "died more than 2 times without ending a step within 60 s (max_core_restarts); last: somebody"
        in caplog.text
    )


def test_a_start_that_lacks_something_is_tried_again_and_is_no_death(run, serving, cores, caplog, monkeypatch):
    create, tries = SignsPage.create, []

    def lacking(folder):
        tries.append(folder)
        if len(tries) < 4:
            number = errno.EMFILE if len(tries) == 1 else errno.ENOSPC
            raise OSError(number, os.strerror(number))
        return create(folder)

    async def body():
        async with (
            serving(cores=cores, max_core_restarts=1, max_core_restarts_per_hour=1) as house,
            await Client.connect(house.address) as client,
        ):
            monkeypatch.setattr("cierzo.engine.frontend.restarts.FIRST_DELAY_S", 0.01)
            monkeypatch.setattr(SignsPage, "create", lacking)
            cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 2 and cores.now.hello)
            await _until(client, "ready")

    run(body())
    assert "it cannot start: [Errno 28] No space left on device" in caplog.text
    assert len(tries) == 4
    assert not any(os.path.exists(folder) for folder in tries)


def test_the_front_end_may_forgive_while_it_hears_of_a_death(run, serving, cores):
    async def body():
        async with (
            serving(cores=cores, max_core_restarts=0) as house,
            await Client.connect(house.address) as client,
        ):
            lost = house.frontend.core.lost
            house.frontend.core.lost = lambda committed: (house.link.forgive(), lost(committed))
            for life in range(2, 5):
                cores.now.kill()
                await cores.until(lambda life=life: len(cores.lives) == life and cores.now.hello)
                await _until(client, "ready")
            house.frontend.core.lost = lost
            cores.now.kill()
            await _until(client, "failed")

    run(body())


# --- flight records ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "reason"), [("native", "hung"), ("never", "died")])
def test_the_record_of_a_dead_core_is_kept(run, serving, hanging, children, tmp_path, caplog, how, reason):
    folder = tmp_path / "flights"
    config = replace(CONFIG, flight_folder=str(folder), record_prompts=True)

    async def body():
        flights = Flights(str(folder))
        async with (
            serving(engine_config=config, spawn=hanging(how, 40), core_hang_s=1.0, flights=flights) as house,
            await Client.connect(house.address) as client,
        ):
            answers = await _begun(house, client)
            if how == "never":
                children[0].kill()
            await answers
            (kept,) = folder.glob("*.flight")
            assert kept.name.endswith(f"-{reason}.flight")
            assert kept.stat().st_mode & 0o777 == 0o600
            assert folder.stat().st_mode & 0o777 == 0o700
            assert f"cierzo replay {kept}" in caplog.text
            cause = (
                "was killed by SIGKILL (the kernel's out-of-memory killer" if reason == "died" else "hung: its turn"
            )
            assert f"the core is gone: the core process {cause}" in caplog.text
            assert "starting it again at once" in caplog.text
            assert re.search(r"a new core is ready after \d+\.\d s; [1-9]\d* requests go on", caplog.text)
            replay = Replay(read(kept))
            assert (replay.kept.reason, replay.is_whole) == (reason, True)
            replay.run()
            assert replay.describe_outcome().endswith("equal rows and tokens")
            if how == "native":
                assert f"at step {replay.last_step}:" in replay.describe_outcome()
                assert replay.last_step >= 40
            assert {path.name for path in folder.iterdir()} == {kept.name, f"live-{children[1].pid}.0"}
        assert list(folder.iterdir()) == [kept]  # a core that ends in order leaves nothing

    run(body(), LIMIT_S)


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (None, "closed its socket"),
        (1, "ended with exit status 1"),
        (-signal.SIGSEGV, "was killed by SIGSEGV"),
        (-signal.SIGKILL, "was killed by SIGKILL (the kernel's out-of-memory killer, if nobody else: see dmesg)"),
        (-200, "was killed by signal 200"),
    ],
)
def test_how_a_core_ended(status, told):
    assert _ending(status) == told


def test_the_log_says_if_prompts_were_not_recorded(run, tmp_path, caplog):
    async def body(with_prompts):
        header = packed(Header(number=0, config=b"", with_prompts=with_prompts))
        (tmp_path / "live-5.0").write_bytes(len(header).to_bytes(8, sys.byteorder) + header)
        await Flights(str(tmp_path), with_prompts).keep(5, "died", "")

    run(body(True))
    assert "are kept; to replay them" in caplog.text
    run(body(False))
    assert "are kept (prompts were not recorded: --record-prompts); to replay them" in caplog.text


def test_the_oldest_records_make_room(run, tmp_path):
    async def body():
        flights = Flights(str(tmp_path))
        paths = []
        for number in range(MAX_KEPT + 3):
            header = Header(number=0, config=b"", with_prompts=False)
            (tmp_path / f"live-{number}.0").write_bytes(
                len(packed(header)).to_bytes(8, sys.byteorder) + packed(header)
            )
            paths.append(await flights.keep(number, "died", "it was shot"))
        assert sorted(tmp_path.iterdir()) == sorted(paths[3:])
        assert await flights.keep(77, "died", "it had none") is None

    run(body())


def test_a_record_that_cannot_be_kept_is_a_line_in_the_log(run, tmp_path, caplog):
    (tmp_path / "live-5.0").write_bytes(b"no header")

    async def body():
        assert await Flights(str(tmp_path)).keep(5, "died", "") is None

    run(body())
    assert "flight record is not kept" in caplog.text


def test_segments_of_processes_that_are_gone_are_swept(tmp_path):
    for pid in (os.getpid(), 2**22 + 1):
        (tmp_path / f"live-{pid}.0").touch()
    (tmp_path / "live-x.0").touch()
    Flights(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {f"live-{os.getpid()}.0", "live-x.0"}
    assert Flights.under("", with_prompts=False) is None


def test_commands_of_a_turn_leave_together_and_in_order(run):
    written = []

    class Transport:
        write = staticmethod(written.append)

    async def body():
        pipe = _Pipe(b"hello", lambda step: None)
        pipe.connection_made(Transport())
        commands = [Abort(request_id=number) for number in range(COMMANDS_PER_WRITE + 3)]
        for command in commands:
            pipe.send(command)
        first, rest = commands[:COMMANDS_PER_WRITE], commands[COMMANDS_PER_WRITE:]
        assert written == [b"hello", pack(first)]
        await asyncio.sleep(0)
        assert written[2:] == [pack(rest)]
        pipe.send(commands[0])
        pipe.connection_lost(None)
        await asyncio.sleep(0)
        assert len(written) == 3

    run(body())


@pytest.mark.parametrize("turns", range(8))
def test_a_core_that_dies_as_the_server_ends_does_not_hold_it_up(run, serving, cores, turns):
    """The core's end may be seen in the very turn of the loop in which everything is cancelled."""

    async def body():
        async with serving(cores=cores) as house:
            cores.now.kill()
            for _ in range(turns):
                await asyncio.sleep(0)
            await asyncio.wait_for(house.link.close(), 5.0)

    run(body())
