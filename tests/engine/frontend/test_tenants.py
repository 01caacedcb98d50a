"""Tenants at the door: who comes in, what is whose, which limit refuses, and what a new key file changes."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.keys import key_line
from cierzo.engine.frontend.registry import Registry
from cierzo.engine.frontend.stream import Stream
from cierzo.engine.frontend.tenancy import Tenancy
from cierzo.engine.frontend.tenants import Tenant
from cierzo.engine.messages import (
    Accepted,
    Cancel,
    CancelRequest,
    Done,
    Drain,
    Failure,
    Final,
    Generate,
    GetHealth,
    GetModel,
    GetStats,
    Health,
    Hello,
    ModelInfo,
    Resume,
    SamplingParams,
    Stats,
    Welcome,
)

ANN, BOB = "cierzo-the-key-of-ann", "cierzo-the-key-of-bob"


@pytest.fixture
def keys(tmp_path):
    """Write a key file with Ann and Bob, and these fields of Ann's; give its path."""

    def write(ann="", rights=()):
        path = tmp_path / "keys"
        fields = (
            f'{{"tenant": "ann"{ann}}}',
            '{"tenant": "bob"}',
            key_line(ANN, "ann", rights),
            key_line(BOB, "bob"),
        )
        path.write_text("\n".join(fields))
        path.chmod(0o600)
        return str(path)

    return write


def hello(key=None, *features):
    greeting = Hello(client="test", features=["resume", *features])
    return greeting if key is None else msgspec.structs.replace(greeting, key=key)


def generate(stream=1, prompt=(1,), **more):
    sampling = SamplingParams(max_tokens=more.pop("max_tokens", 5))
    return Generate(stream=stream, token_ids=[*prompt], sampling=sampling, **more)


async def last(peer, stream):
    """The last message of a stream."""
    while not isinstance(message := await peer.hear(), Final | Failure | None) or message.stream != stream:
        pass
    return message


async def answer_of(peer, message):
    """The answer to a message that has one."""
    peer.say(message)
    return await peer.hear()


# --- who comes in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "", "wrong", ANN + " ", ANN[:-1], "\x00", "é" * 1000])
def test_whoever_has_no_known_key_hears_the_same_words_and_nothing_else(run, serving, peering, keys, key, caplog):
    async def body():
        async with serving(keys=keys()) as house, peering(house, None) as peer:
            peer.say(hello(key))
            peer.say(generate())
            error = await peer.hear()
            assert (error.stream, error.code, error.retry) == (-1, "unauthorized", False)
            assert (error.message, error.field, error.limit, error.value) == (
                "this server wants a key that it knows",
                "key",
                "one that is known",
                None,
            )
            assert await peer.hear() is None
            assert house.frontend.counters.accepted == 0
            assert "no key that is known came from 127.0.0.1:" in caplog.text
            assert not key or key not in caplog.text

    run(body())


def test_a_stranger_takes_no_memory_that_others_share(run, serving, peering, keys):
    async def body():
        async with serving(keys=keys()) as house, peering(house, None) as peer:
            peer.raw((4 << 20).to_bytes(4, "big") + bytes(3 << 20))
            error = await peer.hear()
            assert (error.stream, error.code, error.limit) == (-1, "frame_too_large", str(64 * 1024))
            assert house.frontend.budget.num_bytes == 0
        async with serving(keys=keys()) as house, peering(house, hello(ANN)) as peer:
            peer.raw((4 << 20).to_bytes(4, "big") + bytes(1 << 20))
            while house.frontend.budget.num_bytes < 1 << 20:
                await asyncio.sleep(0)
            assert house.frontend.budget.pool.used("ann") == 1 << 20

    run(body())


def test_a_key_opens_and_no_log_tells_it(run, serving, peering, keys, caplog):
    async def body():
        async with serving(keys=keys()) as house, peering(house, None) as peer:
            assert isinstance(await answer_of(peer, hello(ANN)), Welcome)
            peer.say(generate())
            assert isinstance(await last(peer, 1), Final)
            assert ANN not in caplog.text

    run(body())


def test_version_2_has_keys_too(run, serving, peering, keys):
    async def body():
        async with serving(keys=keys()) as house, peering(house, None) as peer:
            peer.say({"type": "hello", "magic": "cierzo", "version": 2, "client": "old", "key": ANN})
            assert isinstance(await peer.hear(), Welcome)

    run(body())


def test_rights_are_needed_for_what_is_not_one_s_own(run, serving, peering, keys):
    async def body():
        async with serving(keys=keys(rights=("stats", "drain"))) as house:
            async with peering(house, hello(BOB)) as bob:
                for right, message in (("stats", GetStats(stream=7)), ("drain", Drain(stream=7))):
                    error = await answer_of(bob, message)
                    assert (error.code, error.stream, error.limit) == ("forbidden", 7, right)
                assert (await answer_of(bob, Drain(stream=7, undo=True))).code == "forbidden"
                assert isinstance(await answer_of(bob, GetHealth(stream=7)), Health)
                assert isinstance(await answer_of(bob, GetModel(stream=7)), ModelInfo)
                assert house.frontend.health == "ready"
            async with peering(house, hello(ANN)) as ann:
                assert isinstance(await answer_of(ann, GetStats(stream=7)), Stats)
                ann.say(Drain(stream=8))
                await ann.hear()
                assert house.frontend.health == "draining"

    run(body())


# --- what is whose -----------------------------------------------------------------------------------------------


def test_nobody_reads_resumes_or_cancels_another_s_request(run, serving, peering, keys, cores):
    async def body():
        async with (
            serving(keys=keys(), cores=cores) as house,
            peering(house, hello(ANN)) as ann,
            peering(house, hello(BOB)) as bob,
        ):
            cores.free = False
            ann.say(generate(1, max_tokens=50, idempotency_key="same"))
            accepted = await ann.hear()
            assert isinstance(accepted, Accepted)
            unknown = await answer_of(bob, Resume(stream=1, request_id="0" * 32, received=[0]))
            for stream, message in enumerate(
                [
                    Resume(stream=2, request_id=accepted.request_id, received=[0]),
                    CancelRequest(stream=3, request_id=accepted.request_id),
                ],
                2,
            ):
                error = await answer_of(bob, message)
                assert (error.stream, error.code, error.message) == (stream, "not_found", unknown.message)
            bob.say(Cancel(stream=1))
            bob.say(generate(4, prompt=(9, 9), idempotency_key="same"))  # another request, and no key_reused
            other = await bob.hear()
            assert isinstance(other, Accepted)
            assert other.queue_position == 0
            cores.go_on()
            assert (await last(bob, 4)).samples[0].finish_reason == "length"
            assert (await last(ann, 1)).samples[0].finish_reason == "length"
            bob.say(Resume(stream=5, request_id=accepted.request_id, received=[50]))  # it has ended
            assert (await last(bob, 5)).code == "not_found"
            ann.say(CancelRequest(stream=9, request_id=accepted.request_id))
            assert await ann.hear() == Done(stream=9)

    run(body())


def test_another_connection_of_the_same_tenant_goes_on(run, serving, peering, keys, cores):
    async def body():
        async with serving(keys=keys(), cores=cores) as house:
            async with peering(house, hello(ANN)) as ann:
                cores.free = False
                ann.say(generate(1, max_tokens=3))
                name = (await ann.hear()).request_id
            cores.go_on()
            async with peering(house, hello(ANN)) as again:
                again.say(Resume(stream=4, request_id=name, received=[0]))
                assert (await last(again, 4)).usage.output_tokens == 3

    run(body())


def test_the_core_hears_whose_a_request_is_and_what_it_shares(run, serving, peering, keys, cores):
    async def body():
        path = keys(ann=', "weight": 2.5, "cache_group": "office"')
        async with serving(keys=path, cores=cores) as house:
            heard = []
            for key in (ANN, BOB):
                async with peering(house, hello(key)) as peer:
                    peer.say(generate(1))
                    await last(peer, 1)
                    heard.append(cores.now.submits[-1])
            ann, bob = heard
            assert (ann.tenant, ann.weight, ann.cache_salt) == ("ann", 2.5, b"group:office")
            assert (bob.tenant, bob.weight, bob.cache_salt) == ("bob", 1.0, b"tenant:bob")

    run(body())


def test_the_queue_position_tells_nothing_of_others():
    tenancy = Tenancy(FrontendConfig(), lambda: 0.0)
    registry = Registry(tenancy)
    sink = type("Sink", (), {"features": frozenset()})()
    registry.connect(sink)
    streams = []
    for request_id, name in enumerate(("ann", "ann", "bob", "bob", "ann", "bob")):
        book = tenancy.book(Tenant(name=name))
        stream = Stream(request_id, request_id, sink, True, 1, 0, 0.0, 1.0, book=book)
        registry.open(stream)
        streams.append(stream)
    assert [registry.position(stream) for stream in streams] == [0, 1, 0, 1, 2, 2]
    registry.began(streams[2], 0.1)
    registry.close(streams[0])
    assert [registry.position(stream) for stream in streams] == [0, 0, 0, 0, 1, 1]


# --- limits ------------------------------------------------------------------------------------------------------


def test_a_tenant_s_limits_name_themselves_and_leave_others_alone(run, serving, peering, keys, cores):
    async def body():
        path = keys(ann=', "max_requests": 2, "max_open_tokens": 30, "min_priority": -1, "max_priority": 3')
        async with (
            serving(keys=path, cores=cores) as house,
            peering(house, hello(ANN)) as ann,
            peering(house, hello(BOB)) as bob,
        ):
            cores.free = False
            ann.say(generate(1, prompt=[1] * 20))
            assert isinstance(await ann.hear(), Accepted)
            error = await answer_of(ann, generate(2, prompt=[1] * 11))
            assert (error.code, error.field, error.limit, error.value) == (
                "overloaded",
                "max_open_tokens",
                "30",
                "31",
            )
            error = await answer_of(ann, generate(2, prompt=[1] * 31))
            assert (error.code, error.field, error.limit) == ("invalid_request", "max_open_tokens", "30")
            for priority in (-2, 4):
                error = await answer_of(ann, generate(2, priority=priority))
                assert (error.code, error.field, error.limit) == ("invalid_request", "priority", "-1 to 3")
            ann.say(generate(2, priority=3))
            assert isinstance(await ann.hear(), Accepted)
            error = await answer_of(ann, generate(3))
            assert (error.code, error.field, error.limit, error.value) == ("overloaded", "max_requests", "2", "3")
            assert "the tenant ann" in error.message
            for stream in range(1, 9):
                bob.say(generate(stream, prompt=[1] * 40, priority=90))
                assert isinstance(await bob.hear(), Accepted)
            cores.go_on()
            assert isinstance(await last(ann, 2), Final)
            ann.say(generate(5))
            assert isinstance(await last(ann, 5), Final)

    run(body())


def test_it_is_told_which_limit_refused_and_whose_it_is(run, serving, peering, keys, cores, caplog):
    caplog.set_level("INFO")

    async def body():
        ann_s = ', "max_requests": 1, "max_open_tokens": 30, "max_model_len": 20, "max_tokens_per_minute": 60'
        path = keys(ann=ann_s + ', "max_priority": 3')
        async with (
            serving(keys=path, cores=cores, log_format="json", max_open_tokens=100, max_samples=2) as house,
            peering(house, hello(ANN)) as ann,
            peering(house, hello(BOB)) as bob,
        ):
            for asked in (generate(1, priority=4), generate(1, prompt=[1] * 20), generate(1, prompt=[1] * 31)):
                assert isinstance(await answer_of(ann, asked), Failure)
            cores.free = False
            ann.say(generate(1))
            assert isinstance(await ann.hear(), Accepted)
            assert (await answer_of(ann, generate(2))).code == "overloaded"
            bob.say(generate(1, prompt=[1] * 60))
            assert isinstance(await bob.hear(), Accepted)
            assert (await answer_of(bob, generate(2, prompt=[1] * 60))).code == "overloaded"
            assert (await answer_of(bob, generate(3, prompt=[999_999]))).code == "invalid_request"
            cores.go_on()
            assert house.frontend.observer.refusals == {
                ("invalid_request", "priority", "tenant"): 1,
                ("invalid_request", "max_model_len", "tenant"): 2,
                ("overloaded", "max_requests", "tenant"): 1,
                ("overloaded", "max_open_tokens", "server"): 1,
                ("invalid_request", "", "server"): 1,
            }
        told = [each.told["limit"] for each in caplog.records if hasattr(each, "told")]
        assert told[:6] == ["priority", "max_model_len", "max_model_len", "max_requests", "max_open_tokens", None]

    run(body())


def test_tokens_of_a_minute_come_back_with_time(run, serving, peering, keys, clock, cores):
    async def body():
        path = keys(ann=', "max_tokens_per_minute": 60')
        async with serving(keys=path, clock=clock, cores=cores) as house, peering(house, hello(ANN)) as ann:
            ann.say(generate(1, prompt=[1] * 30, max_tokens=20))
            assert isinstance(await last(ann, 1), Final)
            error = await answer_of(ann, generate(2, prompt=[1] * 30))
            assert (error.code, error.field, error.limit) == ("overloaded", "max_tokens_per_minute", "60")
            assert error.retry_after_s == pytest.approx(20.0)
            clock.now += 19.9
            assert (await answer_of(ann, generate(2, prompt=[1] * 30))).retry_after_s == pytest.approx(0.1)
            clock.now += 0.2
            ann.say(generate(2, prompt=[1] * 30, max_tokens=20))
            assert isinstance(await last(ann, 2), Final)  # 20 tokens in debt
            assert (await answer_of(ann, generate(3))).retry_after_s == pytest.approx(20.9, abs=0.2)
            for jump_s in (-1000.0, 1000.0):  # no clock does that; if one did, nobody would gain or lose
                clock.now += jump_s
                assert (await answer_of(ann, generate(3))).retry_after_s == pytest.approx(20.9, abs=0.2)
            clock.now += 200.0
            ann.say(generate(3, prompt=[1] * 200, max_tokens=1))  # more than a minute has, after a minute of none
            assert isinstance(await last(ann, 3), Final)
            assert (await answer_of(ann, generate(4))).retry_after_s > 100

    run(body())


def test_a_tenant_s_context_ends_its_answers(run, serving, peering, keys):
    async def body():
        path = keys(ann=', "max_model_len": 16')
        async with serving(keys=path) as house, peering(house, hello(ANN)) as ann:
            ann.say(generate(1, prompt=[1] * 10, max_tokens=50))
            final = await last(ann, 1)
            assert (final.usage.output_tokens, final.samples[0].finish_reason) == (6, "length")
            error = await answer_of(ann, generate(2, prompt=[1] * 16))
            assert (error.code, error.field, error.limit, error.value) == (
                "invalid_request",
                "max_model_len",
                "15",
                "16",
            )

    run(body())


def test_a_flood_of_one_leaves_room_for_the_other(run, serving, peering, keys, cores):
    """Each tenant has a part of the connections, of the open answers and of their tokens."""

    async def body():
        limits = {"max_open_samples": 8, "max_open_tokens": 400, "max_connections": 4}
        async with serving(keys=keys(), cores=cores, **limits) as house, peering(house, hello(ANN)) as ann:
            cores.free = False
            refused = None
            for stream in range(1, 9):
                if isinstance(message := await answer_of(ann, generate(stream)), Failure):
                    refused = refused or message
            assert (refused.field, refused.limit, refused.value) == (
                "max_open_samples",
                "8, for all tenants together",
                "7",
            )
            async with peering(house, hello(ANN)), peering(house, hello(ANN)), peering(house, None) as third:
                error = await answer_of(third, hello(ANN))
                assert (error.stream, error.code, error.field) == (-1, "overloaded", "max_connections")
                await third.close()
                async with peering(house, hello(BOB)) as bob:
                    for stream in (1, 2):
                        bob.say(generate(stream))
                        assert isinstance(await bob.hear(), Accepted)
                    assert (await answer_of(bob, generate(3))).field == "max_open_samples"
            cores.go_on()
            assert isinstance(await last(ann, 1), Final)

    run(body())


def test_kept_answers_of_a_flood_push_out_none_of_another_s(run, serving, peering, keys):
    async def body():
        async with serving(keys=keys(), max_kept_bytes=40_000) as house:
            async with peering(house, hello(BOB)) as bob:
                bob.say(generate(1))
                name = (await bob.hear()).request_id
                await last(bob, 1)
            async with peering(house, hello(ANN)) as ann:
                for stream in range(1, 60):
                    ann.say(generate(stream))
                    await last(ann, stream)
            async with peering(house, hello(BOB)) as bob:
                bob.say(Resume(stream=1, request_id=name, received=[0]))
                assert isinstance(await last(bob, 1), Final)

    run(body())


# --- a new key file ----------------------------------------------------------------------------------------------


def test_a_key_that_is_taken_back_ends_its_connections_and_no_others(run, serving, peering, keys, tmp_path, cores):
    async def body():
        async with (
            serving(keys=keys(), cores=cores) as house,
            peering(house, hello(ANN)) as ann,
            peering(house, hello(BOB)) as bob,
        ):
            cores.free = False
            for peer in (ann, bob):
                peer.say(generate(1))
                assert isinstance(await peer.hear(), Accepted)
            path = tmp_path / "keys"
            path.write_text("\n".join(['{"tenant": "ann", "max_requests": 1}', key_line(ANN, "ann")]))
            house.server.reload()
            assert (await bob.hear()).code == "unauthorized"
            assert await bob.hear() is None
            assert (await answer_of(ann, generate(2))).field == "max_requests"  # the new limits count
            async with peering(house, None) as again:
                assert (await answer_of(again, hello(BOB))).code == "unauthorized"
            cores.go_on()
            assert isinstance(await last(ann, 1), Final)

    run(body())


def test_a_file_that_is_wrong_leaves_the_old_keys_in_force(run, serving, peering, keys, tmp_path, caplog):
    async def body():
        async with serving(keys=keys()) as house, peering(house, hello(ANN)) as ann:
            for spoil in (lambda path: path.write_text("no"), lambda path: path.chmod(0o644), lambda p: p.unlink()):
                spoil(tmp_path / "keys")
                house.server.reload()
                ann.say(generate(1))
                assert isinstance(await last(ann, 1), Final)
                async with peering(house, hello(BOB)):
                    pass
            assert caplog.text.count("the keys stay as they were") == 3

    run(body())


@pytest.mark.timeout(60)
def test_a_key_that_becomes_another_tenant_s_needs_a_new_connection(run, serving, peering, keys, tmp_path):
    async def body():
        async with serving(keys=keys()) as house, peering(house, hello(ANN)) as ann:
            lines = ['{"tenant": "ann"}', '{"tenant": "bob"}', key_line(ANN, "bob")]
            (tmp_path / "keys").write_text("\n".join(lines))
            house.server.reload()
            assert (await ann.hear()).code == "unauthorized"

    run(body())


def test_names_of_a_request_are_checked(run, serving, peering):
    async def body():
        async with serving() as house, peering(house, hello(None, "trace")) as peer:
            trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
            peer.say(generate(1, caller_id="cart 7", traceparent=trace))
            assert isinstance(await last(peer, 1), Final)
            for field, value in (
                ("caller_id", "x" * 129),
                ("caller_id", "a\nb"),
                ("traceparent", "00-1"),
                ("traceparent", "x"),
            ):
                error = await answer_of(peer, generate(2, **{field: value}))
                assert (error.code, error.field) == ("invalid_request", field)
            async with peering(house, hello(None)) as plain:
                error = await answer_of(plain, generate(1, caller_id="a"))
                assert (error.code, error.field) == ("invalid_request", "caller_id")

    run(body())
