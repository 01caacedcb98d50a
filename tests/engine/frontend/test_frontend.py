"""Streams between clients and a core: stops, samples, limits, slow readers, drain, and resume."""

from __future__ import annotations

import asyncio
import socket

import pytest
from streams import all_of, by_sample, generate, until

from cierzo.engine.errors import Draining, InvalidRequest, Overloaded
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.rpc import Connection
from cierzo.engine.messages import Delta, Final, Generate, Ping, Pong, SamplingParams


@pytest.mark.parametrize(("stop", "text"), [(["wor"], "Hello "), (["o", "l"], "He"), (["H"], ""), (["zzz"], None)])
@pytest.mark.parametrize("deltas", [True, False])
def test_stop_strings_cut_at_the_completing_token(run, serving, cores, stop, text, deltas):
    answer = list(b"Hello world, and so on")
    cores.answer = lambda submit, sample: answer

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            generation = client.generate(token_ids=[1], stop=stop, logprobs=0, deltas=deltas)
            token_ids, got, final = await all_of(generation)
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
            token_ids, text, final = await all_of(client.generate(token_ids=[1]))
            assert (token_ids, text) == ([*b"ok", 257], "ok")
            assert (final.samples[0].finish_reason, final.samples[0].stop) == ("stop", 257)

    run(body())


@pytest.mark.parametrize("deltas", [True, False])
@pytest.mark.parametrize(
    ("answer", "params", "taken", "text", "found"),
    [
        ([*b"Hel", 256, *b"lo"], {"stop": ["<s>"]}, 4, "Hel", "<s>"),
        ([*b"Hel", 256, *b"lo"], {"stop": ["zzz", "ello", "<s>", "lol"]}, 4, "Hel", "<s>"),
        ([*b"Hello", 256], {"stop": ["ell", "<s>"]}, 4, "H", "ell"),
        ([*b"a<s>b", 256], {"stop": ["<s>"]}, 4, "a", "<s>"),  # the same characters as plain text
        ([0xE2, 0x82, 256, 0xAC], {"stop": ["<s>"]}, 3, "\ufffd", "<s>"),
        ([256, 97, 256, 98], {"stop": ["<s>"], "min_tokens": 2}, 3, "a", "<s>"),
        ([97, 256], {"stop": ["<s>"], "max_tokens": 2}, 2, "a", "<s>"),
        ([97, 256, 98], {"stop": ["<s>"], "stop_token_ids": [256]}, 2, "a", "<s>"),
        ([97, 257, 98], {"stop": ["</s>"]}, 2, "a", "</s>"),  # an end token of the model
        ([97, 257, 98], {"stop": ["</s>"], "ignore_eos": True}, 2, "a", "</s>"),
        ([97, 257, 98], {"stop": ["<s>"]}, 2, "a", 257),
        ([97, 258, 98], {"stop": ["<two words>"]}, 2, "a", "<two words>"),  # an added token that has text
    ],
)
def test_a_stop_string_that_is_a_special_token_stops_at_the_token(
    run, serving, cores, answer, params, taken, text, found, deltas
):
    cores.answer = lambda submit, sample: answer

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            generation = client.generate(token_ids=[1], logprobs=0, deltas=deltas, **params)
            token_ids, got, final = await all_of(generation)
            (end,) = final.samples
            if not deltas:
                token_ids, got = end.token_ids, end.text
                assert [entry.token_id for entry in end.logprobs] == token_ids
            assert (token_ids, got) == (answer[:taken], text)
            assert (end.finish_reason, end.stop, end.output_tokens) == ("stop", found, taken)
            await cores.until(lambda: not cores.now.running)

    run(body())


def test_a_special_token_ends_each_sample_alone_and_in_the_core(run, serving, cores):
    """The core ends it: nothing is computed beyond the token, and nothing has to be aborted."""
    cores.answer = lambda submit, sample: [*b"abc", 256, *b"de"] if sample else list(b"abcdef")

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            final = await client.complete(token_ids=[1], n=2, stop=["<s>", "x"])
            assert [(end.text, end.stop, end.output_tokens) for end in final.samples] == [
                ("abcdef", None, 6),
                ("abc", "<s>", 4),
            ]
            (submit,) = cores.now.submits
            assert (submit.sampling.stop, submit.sampling.stop_token_ids) == (("<s>", "x"), (256,))
            assert not cores.now.aborts

    run(body())


def test_a_generation_that_ended_at_a_special_token_is_not_resumed(run, serving, cores):
    answer = [*b"ab", 256, *b"cd"]
    cores.answer = lambda submit, sample: answer

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            params = {"token_ids": [1], "stop": ["<s>"], "seed": 1}
            for done in (answer[:3], answer[:4]):
                with pytest.raises(InvalidRequest, match="already ended") as caught:
                    await client.complete(output_token_ids=done, **params)
                assert caught.value.field == "output_token_ids"
            final = await client.complete(output_token_ids=answer[:2], **params)
            assert (final.samples[0].stop, final.samples[0].token_ids) == ("<s>", answer[:3])
            final = await client.complete(output_token_ids=answer[:4], min_tokens=4, **params)
            assert (final.samples[0].stop, final.samples[0].text) == (None, "d")

    run(body())


def test_a_stop_string_around_a_special_token_is_refused(run, serving):
    async def body():
        async with serving() as house, await Client.connect(house.address) as client:
            for string in ("a<s>", "</s>\n", "<s><s>"):
                with pytest.raises(InvalidRequest, match="special token") as caught:
                    await client.complete(token_ids=[1], stop=["ok", string])
                assert (caught.value.field, caught.value.value) == ("sampling.stop[1]", string)
            await client.complete(token_ids=[1], stop=["<s", "s>", "<two words>!"], max_tokens=1)

    run(body())


def test_samples_end_on_their_own(run, serving, cores):
    cores.answer = lambda submit, sample: list(b"abcXdef" if sample == 1 else b"abcdef!")

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            generation = client.generate(token_ids=[1, 2], n=3, stop=["X"])
            assert (await by_sample(generation))[1] == {0: "abcdef!", 1: "abc", 2: "abcdef!"}
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
            cores.go_on()
            await all_of(kept)
            assert (await client.complete(token_ids=list(range(10)), n=3)).usage.output_tokens == 3 * 256
            stats = await client.stats()
            assert (stats.accepted, stats.refused, stats.finished) == (2, 2, 2)

    run(body())


def test_what_no_limit_will_ever_let_in_is_invalid(run, serving, peering, cores):
    """A hint to try again would never come true."""
    cores.free = False

    async def body():
        limits = {"max_samples": 4, "max_open_samples": 4, "max_open_tokens": 10}
        async with serving(cores=cores, **limits) as house, peering(house) as peer:
            peer.say(Generate(stream=1, token_ids=[1], sampling=SamplingParams(n=2)))
            await cores.until(lambda: cores.now.submits)
            for ids, n, field, value in (([1], 5, "sampling.n", "5"), ([1] * 11, 1, "max_open_tokens", "11")):
                peer.say(Generate(stream=2, token_ids=ids, sampling=SamplingParams(n=n)))
                failure = await peer.hear()
                assert (failure.code, failure.field, failure.value) == ("invalid_request", field, value)
                assert failure.retry_after_s is None

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
                assert (len(house.frontend.streams), house.frontend.streams.num_sinks) == (0, 1)
                assert house.frontend.streams.num_samples == house.frontend.streams.num_tokens == 0

    run(body())


def test_cancel_of_a_long_prompt_that_is_still_being_encoded(run, serving, cores, peering):
    async def body():
        async with serving(cores=cores, inline_chars=10) as house:
            async with peering(house) as peer:
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
                assert len(house.frontend.streams) == 0

    run(body())


# --- slow readers ------------------------------------------------------------------------------------------


def test_a_slow_reader_holds_back_nobody_and_gets_its_tokens_merged(run, serving, peering, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores, high_water_bytes=2000) as house, peering(house) as peer:
            (connection,) = house.server._connections
            peer.reader._transport.pause_reading()
            peer.say(generate(max_tokens=4000))
            async with await Client.connect(house.address) as client:
                quick = client.generate(token_ids=[0], max_tokens=4000, seed=0)
                await cores.until(lambda: len(cores.now.submits) == 2)
                connection.pause_writing()  # as the transport does, once the kernel's buffers are full
                cores.go_on()
                token_ids, _, _ = await all_of(quick)
            (slow,) = house.frontend.streams.of(connection).values()
            assert (slow.pending_bytes, connection._outbox, bytes(connection._late)) == (16_000, [], b"")
            connection.resume_writing()
            peer.reader._transport.resume_reading()
            merged, final = await peer.hear(), await peer.hear()
            assert isinstance(merged, Delta)
            assert merged.token_ids == token_ids
            assert isinstance(final, Final)

    run(body())


def test_a_reader_that_asks_on_and_never_reads_is_heard_no_more_and_closed_in_the_end(
    run, serving, peering, cores, caplog
):
    """Answers that are no stream's output are kept within a bound."""
    cores.free = False

    async def body():
        async with serving(cores=cores, max_pending_bytes=3000, slow_reader_s=0.3) as house:
            async with peering(house) as peer:
                (connection,) = house.server._connections
                peer.say(generate(max_tokens=4000))
                await cores.until(lambda: cores.now.submits)
                connection.pause_writing()
                for stream in range(2, 3000):
                    peer.say(Ping(stream=stream))
                await until(lambda: connection in house.server.deaf)
                assert 3000 < len(connection._late) < 3100
                await peer.hear_until(Final)  # None: the connection has ended
            await cores.until(lambda: cores.now.aborts)
            assert house.server._connections == set()
        assert "unread" in caplog.text

    run(body())


def test_a_reader_that_catches_up_is_heard_again(run, serving, peering, monkeypatch):
    """The reader takes longer than slow_reader_s, but takes something all the time."""
    taken = []

    def more(connection):
        taken.append(len(taken))
        return len(taken)

    monkeypatch.setattr(Connection, "num_taken", property(more))

    async def body():
        async with serving(max_pending_bytes=3000, slow_reader_s=0.02) as house, peering(house) as peer:
            (connection,) = house.server._connections
            connection.pause_writing()
            for stream in range(2, 1000):
                peer.say(Ping(stream=stream))
            await until(lambda: len(taken) > 5)
            assert len(connection._late) < 3100
            connection.resume_writing()
            assert [await peer.hear() for _ in range(2, 1000)] == [Pong(stream=stream) for stream in range(2, 1000)]
            assert len(house.server.deaf) == 0

    run(body())


@pytest.mark.parametrize("turns", [0, 1])
def test_output_of_the_turn_in_which_a_connection_fills_up_is_not_unread(run, serving, peering, turns):
    """The transport may say that it is full between a step's output and the end of the turn that sends it."""

    async def body():
        async with serving(max_pending_bytes=3000) as house, peering(house) as peer:
            (connection,) = house.server._connections
            for token in range(500):
                connection.put(Delta(stream=1, token_ids=[token]))
            connection.pause_writing()
            connection.put(Pong(stream=2))
            for _ in range(turns):
                await asyncio.sleep(0)
            connection.resume_writing()
            connection.put(Pong(stream=3))
            for token in range(500):
                assert await peer.hear() == Delta(stream=1, token_ids=[token])
            assert [await peer.hear(), await peer.hear()] == [Pong(stream=2), Pong(stream=3)]

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
            while not connection.is_paused or len(connection._late) < 2000:
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
            cores.go_on()
            await asyncio.gather(drain, house.frontend.drained())
            assert len((await all_of(running))[0]) == 3

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
                token_ids, rest, final = await all_of(resumed)
                assert token_ids == whole[done:]
                assert "".join(texts) + rest == "abc€ "
                assert final.samples[0].output_tokens == len(whole)
            with pytest.raises(InvalidRequest, match="stop string"):
                await client.complete(output_token_ids=whole, **arguments)

    run(body())
