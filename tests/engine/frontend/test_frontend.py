"""Streams between clients and a core: stops, samples, limits, slow readers, drain, resume, and a core that dies."""

from __future__ import annotations

import asyncio
import socket

import pytest

from cierzo.engine.errors import CheckpointError, CoreFailed, Draining, InvalidRequest, Overloaded
from cierzo.engine.frontend.client import Client
from cierzo.engine.messages import CoreError, Delta, Final, Generate, Ping, Pong, SamplingParams


async def _all(generation):
    """(token ids, text, final) of a one-sample generation."""
    deltas = [delta async for delta in generation]
    return [t for d in deltas for t in d.token_ids], "".join(d.text for d in deltas), generation.final


@pytest.mark.parametrize(("stop", "text"), [(["wor"], "Hello "), (["o", "l"], "He"), (["H"], ""), (["zzz"], None)])
@pytest.mark.parametrize("deltas", [True, False])
def test_stop_strings_cut_at_the_completing_token(run, serving, cores, stop, text, deltas):
    answer = list(b"Hello world, and so on")
    cores.answer = lambda submit, sample: answer

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            generation = client.generate(token_ids=[1], stop=stop, logprobs=0, deltas=deltas)
            token_ids, got, final = await _all(generation)
            (end,) = final.samples
            if not deltas:
                token_ids, got = end.token_ids, end.text
                assert len(end.logprobs) == len(token_ids)
            if text is None:
                assert (got, end.stop, end.finish_reason) == (bytes(answer).decode(), None, "length")
                return
            found = next(s for s in stop if bytes(answer).decode()[len(text) :].startswith(s))
            assert got == text
            assert token_ids == list((text + found).encode())
            assert (end.finish_reason, end.stop, end.output_tokens) == ("stop", found, len(token_ids))
            assert final.usage.output_tokens == len(token_ids)
            await cores.until(lambda: not cores.now.running)
            assert all(abort.reason == "stop" for abort in cores.now.aborts)

    run(body())


def test_overrun_of_the_core_is_not_delivered(run, serving, cores, peering):
    """The core runs on until the abort reaches it; with a step already on its way, its tokens are dropped."""
    cores.free, cores.answer = False, lambda submit, sample: list(b"abSTOPcdefgh")

    async def body():
        async with serving(cores=cores) as house, peering(house) as peer:
            peer.say(Generate(stream=1, token_ids=[1], sampling=SamplingParams(stop=("STOP",))))
            await cores.until(lambda: cores.now.submits)
            for _ in range(9):  # three more than needed
                cores.now.step()
            heard = []
            while not heard or not isinstance(heard[-1], Final):
                heard.append(await peer.hear())
            assert [t for d in heard[:-1] for t in d.token_ids] == list(b"abSTOP")
            assert "".join(d.text for d in heard[:-1]) == "ab"
            assert heard[-1].usage.output_tokens == 6

    run(body())


def test_a_stop_token_is_named(run, serving, cores):
    cores.answer = lambda submit, sample: [*b"ok", 257, 1, 2]

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            token_ids, text, final = await _all(client.generate(token_ids=[1]))
            assert (token_ids, text) == ([*b"ok", 257], "ok")
            assert (final.samples[0].finish_reason, final.samples[0].stop) == ("stop", 257)

    run(body())


def test_samples_end_on_their_own(run, serving, cores):
    cores.answer = lambda submit, sample: list(b"abcXdef" if sample == 1 else b"abcdef!")

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            generation = client.generate(token_ids=[1, 2], n=3, stop=["X"])
            texts = {0: "", 1: "", 2: ""}
            async for delta in generation:
                texts[delta.sample] += delta.text
            assert texts == {0: "abcdef!", 1: "abc", 2: "abcdef!"}
            ends = generation.final.samples
            assert [end.finish_reason for end in ends] == ["length", "stop", "length"]
            assert [end.output_tokens for end in ends] == [7, 4, 7]
            assert [(abort.sample, abort.reason) for abort in cores.now.aborts] == [(1, "stop")]

    run(body())


def test_split_characters_come_whole(run, serving, cores):
    cores.answer = lambda submit, sample: [*"né€🙂".encode(), 0xE2, 0x82]

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            generation = client.generate(token_ids=[1])
            texts = [delta.text async for delta in generation]
            assert [text for text in texts if text] == ["n", "é", "€", "🙂", "\ufffd"]

    run(body())


def test_limits_refuse_with_a_hint(run, serving, cores):
    cores.free = False

    async def body():
        limits = {"max_open_samples": 3, "max_open_tokens": 10}
        async with serving(cores=cores, **limits) as house, await Client.connect(house.address) as client:
            kept = client.generate(token_ids=[1, 2], n=2)
            for arguments, field in (({"n": 2}, "max_open_samples"), ({}, "max_open_tokens")):
                prompt = [1] if "n" in arguments else list(range(9))
                with pytest.raises(Overloaded) as caught:
                    await client.complete(token_ids=prompt, **arguments)
                assert (caught.value.field, caught.value.retry_after_s) == (field, 1.0)
            cores.free = True
            cores.now.go_on()
            await _all(kept)
            assert (await client.complete(token_ids=list(range(10)), n=3)).usage.output_tokens == 3 * 256
            stats = await client.stats()
            assert (stats.accepted, stats.refused, stats.finished) == (2, 2, 2)

    run(body())


def test_a_disconnect_frees_everything(run, serving, peering, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house:
            async with peering(house) as peer:
                for stream in range(3):
                    peer.say(Generate(stream=stream, token_ids=[1], sampling=SamplingParams(n=2)))
                await cores.until(lambda: len(cores.now.submits) == 3)
            await cores.until(lambda: len(cores.now.aborts) == 3)
            assert not cores.now.running
            async with await Client.connect(house.address) as client:  # its answer comes behind the core's
                cores.free = True
                await client.complete(token_ids=[1], max_tokens=1)
                assert (house.frontend.num_streams, house.frontend.num_connections) == (0, 1)
                assert house.frontend._open_samples == house.frontend._open_tokens == 0

    run(body())


def test_cancel_of_a_long_prompt_that_is_still_being_encoded(run, serving, cores, peering):
    async def body():
        async with serving(cores=cores, thread_encode_chars=10) as house:
            async with peering(house) as peer:
                peer.raw(b"")
                peer.say(Generate(stream=1, text="x" * 2000))
                peer.say({"type": "cancel", "stream": 1})
                final = await peer.hear()
                assert [end.finish_reason for end in final.samples] == ["cancelled"]
            async with await Client.connect(house.address) as client:
                final = await client.complete(text="x" * 2000, max_tokens=1)
                assert final.usage.prompt_tokens == 2001
                with pytest.raises(InvalidRequest) as caught:
                    await client.complete(text="x" * 5000)
                assert caught.value.field == "text"
                assert len(cores.now.submits) == 1
                assert house.frontend.num_streams == 0

    run(body())


# --- slow readers ------------------------------------------------------------------------------------------


def test_a_slow_reader_holds_back_nobody_and_gets_its_tokens_merged(run, serving, peering, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores, high_water_bytes=2000) as house, peering(house) as peer:
            (connection,) = house.server._connections
            peer.reader._transport.pause_reading()
            peer.say(Generate(stream=1, token_ids=[0], sampling=SamplingParams(max_tokens=4000, seed=0)))
            async with await Client.connect(house.address) as client:
                quick = client.generate(token_ids=[0], max_tokens=4000, seed=0)
                await cores.until(lambda: len(cores.now.submits) == 2)
                connection.pause_writing()  # as the transport does, once the kernel's buffers are full
                cores.free = True
                cores.now.go_on()
                token_ids, _, _ = await _all(quick)
            assert connection._backlog.num_bytes < 40_000
            connection.resume_writing()
            peer.reader._transport.resume_reading()
            merged, final = await peer.hear(), await peer.hear()
            assert isinstance(merged, Delta)
            assert merged.token_ids == token_ids
            assert isinstance(final, Final)

    run(body())


def test_a_reader_that_never_reads_is_closed(run, serving, peering, cores, caplog):
    cores.free = False

    async def body():
        async with serving(cores=cores, high_water_bytes=2000, max_pending_bytes=3000) as house:
            async with peering(house) as peer:
                (connection,) = house.server._connections
                peer.say(Generate(stream=1, token_ids=[0], sampling=SamplingParams(max_tokens=4000)))
                await cores.until(lambda: cores.now.submits)
                connection.pause_writing()
                cores.free = True
                cores.now.go_on()
                await peer.hear_until(Final)  # None: the connection has ended
            await cores.until(lambda: cores.now.aborts)
            assert house.server._connections == set()
        assert "unread" in caplog.text

    run(body())


def test_a_real_full_socket_pauses_and_resumes(run, serving, peering, cores):
    """Many pings whose answers nobody reads, until the kernel takes no more; then all are read, in order."""

    async def body():
        async with serving(cores=cores, high_water_bytes=1000) as house, peering(house) as peer:
            (connection,) = house.server._connections
            for end, option in ((connection._transport, socket.SO_SNDBUF), (peer.writer, socket.SO_RCVBUF)):
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, option, 4096)
            peer.reader._transport.pause_reading()
            stream = 0
            while not connection._paused or len(connection._backlog) < 100:
                for _ in range(100):
                    peer.say(Ping(stream=stream))
                    stream += 1
                await peer.writer.drain()
                await asyncio.sleep(0)
            peer.reader._transport.resume_reading()
            for expected in range(stream):
                assert await peer.hear() == Pong(stream=expected)

    run(body())


# --- drain, resume, death ----------------------------------------------------------------------------------


def test_drain_finishes_what_runs_and_refuses_the_rest(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            running = client.generate(token_ids=[1], max_tokens=3)
            await cores.until(lambda: cores.now.submits)
            drain = asyncio.create_task(client.drain())
            await client.ping()
            assert (await client.health()).state == "draining"
            with pytest.raises(Draining):
                await client.complete(token_ids=[1])
            assert not drain.done()
            cores.free = True
            cores.now.go_on()
            await asyncio.gather(drain, house.frontend.drained())
            assert len((await _all(running))[0]) == 3

    run(body())


def test_a_resumed_stream_goes_on_from_its_tokens_and_text(run, serving, cores):
    text = "abc€ STOP no"
    cores.answer = lambda submit, sample: list(text.encode())

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            whole = list(b"abc\xe2\x82\xac STOP")
            for done in (1, 4, 8, 9):  # in the middle of a character, of the stop string
                arguments = {"token_ids": [1], "seed": 7, "stop": "STOP"}
                first, texts = client.generate(**arguments), []
                async for delta in first:
                    texts.append(delta.text)
                    if len(texts) == done:
                        break
                resumed = client.generate(output_token_ids=whole[:done], **arguments)
                token_ids, rest, final = await _all(resumed)
                assert token_ids == whole[done:]
                assert "".join(texts) + rest == "abc€ "
                assert final.samples[0].output_tokens == len(whole)
            with pytest.raises(InvalidRequest, match="stop string"):
                await client.complete(output_token_ids=whole, **arguments)

    run(body())


def test_streams_survive_the_death_of_the_core(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            arguments = {"token_ids": [1, 2], "max_tokens": 9, "seed": 3, "n": 2}
            generation = client.generate(**arguments)
            drawn = client.generate(token_ids=[5], max_tokens=6)  # its seed is drawn here, and kept
            await cores.until(lambda: len(cores.now.submits) == 2)
            first = cores.now
            for _ in range(4):
                first.step()
            await client.ping()
            first.kill()
            await cores.until(lambda: len(cores.lives) == 2 and len(cores.now.submits) == 2)
            cores.now.step()  # the first stream lives: the next one may come
            await cores.until(lambda: len(cores.now.submits) == 3)
            samples = [(s.first_sample, s.sampling.n, len(s.output_token_ids)) for s in cores.now.submits]
            assert samples == [(0, 1, 4), (1, 1, 4), (0, 1, 4)]
            cores.free = True
            cores.now.go_on()
            token_ids = {0: [], 1: []}
            async for delta in generation:
                token_ids[delta.sample] += delta.token_ids
            unbroken = await client.complete(**arguments)
            assert token_ids == {end.sample: end.token_ids for end in unbroken.samples}
            got, _, final = await _all(drawn)
            assert got == [(5 + final.seed + 7 * position) % 256 for position in range(6)]
            stats = await client.stats()
            assert (stats.core_restarts, stats.finished) == (1, 3)

    run(body())


def test_what_ended_while_the_core_was_dead_is_not_run_again(run, serving, cores, clock):
    cores.free = False
    cores.answer = lambda submit, sample: list(b"xSTOPyyyy")

    async def body():
        async with serving(cores=cores, clock=clock) as house, await Client.connect(house.address) as client:
            late = client.generate(token_ids=[1], deadline_s=5.0)
            cut = client.generate(token_ids=[2], stop=["STOP"])
            cancelled = client.generate(token_ids=[3])
            lasting = client.generate(token_ids=[4], deadline_s=50.0)
            await cores.until(lambda: len(cores.now.submits) == 4)
            dead = cores.now
            dead.data_received = lambda data: None  # it hears nothing any more
            for _ in range(5):
                dead.step()
            assert (await anext(cut)).text == "x"
            cancelled.cancel()
            await client.ping()
            clock.now += 10
            dead.kill()
            await cores.until(lambda: len(cores.lives) == 2 and cores.now.submits)
            (again,) = cores.now.submits
            assert (again.prompt_token_ids, again.deadline_s) == ([4], 40.0)
            ends = [(await _all(stream))[2].samples[0] for stream in (late, cut, cancelled)]
            assert [end.finish_reason for end in ends] == ["deadline", "stop", "cancelled"]
            assert (ends[1].stop, ends[1].output_tokens) == ("STOP", 5)
            cores.free = True
            cores.now.go_on()
            assert len((await _all(lasting))[0]) == 9

    run(body())


def test_samples_that_had_ended_do_not_run_again(run, serving, cores):
    cores.free, cores.answer = False, lambda submit, sample: [65, 257, 1] if sample == 0 else [66, 67, 68]

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            generation = client.generate(token_ids=[1], n=2)
            await cores.until(lambda: cores.now.submits)
            cores.now.step()
            cores.now.step()
            await client.ping()
            cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 2 and cores.now.submits)
            assert [(submit.first_sample, submit.sampling.n) for submit in cores.now.submits] == [(1, 1)]
            cores.now.step()
            got = {0: [], 1: []}
            async for delta in generation:
                got[delta.sample] += delta.token_ids
            assert got == {0: [65, 257], 1: [66, 67, 68]}
            assert [end.finish_reason for end in generation.final.samples] == ["stop", "length"]

    run(body())


def test_requests_while_the_core_loads_are_refused(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            open_stream = client.generate(token_ids=[1], max_tokens=3)
            short_lived = client.generate(token_ids=[2], deadline_s=0.05)
            await cores.until(lambda: len(cores.now.submits) == 2)
            cores.silent = True
            cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 2 and cores.now.hello)
            assert (await client.health()).state == "loading"
            with pytest.raises(Overloaded, match="loading"):
                await client.complete(token_ids=[1])
            open_stream.cancel()  # there is no core to ask
            assert (await _all(open_stream))[2].samples[0].finish_reason == "cancelled"
            assert (await _all(short_lived))[2].samples[0].finish_reason == "deadline"

    run(body())


def test_a_core_that_keeps_dying_is_given_up(run, serving, cores, clock):
    cores.free = False

    async def body():
        limits = {"max_core_restarts": 2, "core_restart_window_s": 60.0}
        async with (
            serving(cores=cores, clock=clock, **limits) as house,
            await Client.connect(house.address) as client,
        ):
            stream = client.generate(token_ids=[1], max_tokens=5)
            for life in range(1, 5):
                await cores.until(lambda life=life: len(cores.lives) == life and cores.now.submits)
                cores.now.step()
                await anext(stream)
                if life == 2:
                    clock.now += 61  # the first death is forgotten
                cores.now.kill()
            with pytest.raises(CoreFailed) as caught:
                await _all(stream)
            assert (caught.value.field, caught.value.limit) == ("max_core_restarts", "2")
            assert (await client.health()).state == "failed"
            with pytest.raises(CoreFailed):
                await client.complete(token_ids=[1])
            assert len(cores.lives) == 4
            assert house.frontend.num_streams == 0

    run(body())


def test_a_request_that_kills_the_core_fails_alone(run, serving, cores):
    """Four streams; the core dies whenever it has got the third. Nothing else is lost, and the core is kept."""
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            streams = [client.generate(token_ids=[i], max_tokens=3, seed=0) for i in range(3)]
            cancelled = client.generate(token_ids=[3], deadline_s=60.0)
            await cores.until(lambda: len(cores.now.submits) == 4)
            cores.now.kill()
            for number in (0, 1, 2):
                await cores.until(lambda n=number: len(cores.lives) == 2 and len(cores.now.submits) == n + 1)
                assert cores.now.submits[-1].prompt_token_ids == [number]
                if number == 1:
                    cancelled.cancel()  # the core has not got it
                    assert (await _all(cancelled))[2].samples[0].finish_reason == "cancelled"
                    late = client.generate(token_ids=[7], max_tokens=3, seed=0)  # waits for its turn as well
                    await client.ping()
                if number < 2:
                    cores.now.step()
            cores.now.kill()  # while the third is on trial
            failed = (await _all(streams[2]))[2].samples[0]
            assert (failed.finish_reason, failed.output_tokens) == ("failed", 0)
            assert "each time that it began this request" in failed.message
            cores.free = True
            await cores.until(lambda: len(cores.lives) == 3 and cores.now.submits)
            cores.now.go_on()
            for first, stream in ((0, streams[0]), (1, streams[1]), (7, late)):
                assert (await _all(stream))[0] == [first, first + 7, first + 14]
            assert (house.frontend.num_streams, (await client.stats()).core_restarts) == (0, 2)

    run(body())


def test_one_death_in_its_first_step_is_no_proof_against_a_request(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            old = client.generate(token_ids=[1], max_tokens=2, seed=0)
            await cores.until(lambda: cores.now.submits)
            cores.now.step()
            cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 2 and cores.now.submits)
            new = client.generate(token_ids=[2], max_tokens=2, seed=0)
            await client.ping()
            cores.now.step()  # the old one ends; the new one is sent
            await cores.until(lambda: len(cores.now.submits) == 2)
            cores.free = True
            cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 3 and cores.now.submits)
            cores.now.go_on()
            assert [(await _all(stream))[0] for stream in (old, new)] == [[1, 8], [2, 9]]

    run(body())


def test_timings_add_up_across_cores(run, serving, cores, clock):
    cores.free = False

    async def body():
        async with serving(cores=cores, clock=clock) as house, await Client.connect(house.address) as client:
            streams = [client.generate(token_ids=[i], max_tokens=2) for i in (1, 2)]
            await cores.until(lambda: len(cores.now.submits) == 2)
            del cores.now.running[1, 0]  # the first core never comes to the second one
            clock.now += 1.0
            cores.now.step()
            await anext(streams[0])
            clock.now += 2.0
            cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 2 and cores.now.submits)
            cores.now.step()
            await _all(streams[0])
            await cores.until(lambda: len(cores.now.submits) == 2)
            for _ in range(2):
                clock.now += 4.0
                cores.now.step()
                await client.ping()
            first, second = streams[0].final.timings, (await _all(streams[1]))[2].timings
            assert (first.queue_s, first.prefill_s, first.decode_s, first.total_s) == (0.0, 1.0, 2.0, 3.0)
            waits = (second.queue_s, second.prefill_s, second.decode_s, second.total_s)
            assert waits == pytest.approx((3.1, 3.9, 4.0, 11.0))  # the fake core waits 0.1 s

    run(body())


def test_a_core_that_cannot_start_says_why(run, serving, cores):
    cores.error = CoreError(code="checkpoint_error", message="shard 2 is truncated")

    async def body():
        with pytest.raises(CheckpointError, match="shard 2"):
            async with serving(cores=cores):
                pass

    run(body())


def test_a_core_that_never_gets_ready(run, serving, cores):
    cores.silent = True

    async def body():
        with pytest.raises(CoreFailed) as caught:
            async with serving(cores=cores, core_start_timeout_s=0.02):
                pass
        assert caught.value.field == "core_start_timeout_s"
        assert cores.now.exited.done()

    run(body())
