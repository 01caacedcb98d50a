"""The heap of all answers together is bounded, whoever reads them or does not."""

from __future__ import annotations

import asyncio

from streams import until

from cierzo.engine.messages import Accepted, Delta, Failure, Final, Generate, Hello, Resume, SamplingParams

RESUME = Hello(client="test", features=["resume"])
LIMIT = 64 * 1024


def generate(stream, max_tokens, logprobs=1, **fields):
    sampling = SamplingParams(max_tokens=max_tokens, logprobs=logprobs, seed=0, ignore_eos=True)
    return Generate(stream=stream, token_ids=[stream], sampling=sampling, **fields)


async def _accepted(peer, streams):
    return {(message := await peer.hear_until(Accepted)).stream: message.request_id for _ in streams}


def test_answers_that_nobody_reads_end_at_the_limit(run, serving, peering, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores, max_kept_bytes=LIMIT) as house:
            async with peering(house, RESUME) as peer:
                for stream in range(1, 5):
                    peer.say(generate(stream, 4000))
                names = await _accepted(peer, range(1, 5))
            await until(lambda: not house.frontend.streams.num_sinks)
            most = 0
            while len(house.frontend.streams) == 4:
                cores.now.step()
                await asyncio.sleep(0)
                most = max(most, house.frontend.heap.num_bytes)
            assert most < 1.1 * LIMIT
            async with peering(house, RESUME) as peer:
                peer.say(generate(9, 2))
                refusal = await peer.hear_until(Failure)
                assert (refusal.stream, refusal.code, refusal.field) == (9, "overloaded", "max_kept_bytes")
                codes = set()
                for stream, name in names.items():
                    peer.say(Resume(stream=stream, request_id=name, received=[3]))
                    message = await peer.hear()
                    while message.stream != stream or isinstance(message, Accepted):
                        message = await peer.hear()
                    if isinstance(message, Failure):
                        codes.add((message.code, message.field))
                assert codes == {("overloaded", "max_kept_bytes")}

    run(body())


def test_open_answers_lose_log_probabilities_that_were_sent(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores, max_kept_bytes=LIMIT) as house, peering(house, RESUME) as peer:
            for stream in (1, 2):
                peer.say(generate(stream, 3000))  # twice the limit and more
            tokens = {1: 0, 2: 0}
            finals = 0
            while finals < 2:
                message = await peer.hear()
                assert not isinstance(message, Failure), message
                finals += isinstance(message, Final)
                if isinstance(message, Delta):
                    tokens[message.stream] += len(message.token_ids)
                    assert len(message.logprobs) == len(message.token_ids)
            assert tokens == {1: 3000, 2: 3000}
            assert house.frontend.heap.num_bytes == 0

    run(body())


def test_open_answers_push_out_those_that_have_ended(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores, max_kept_bytes=LIMIT) as house, peering(house, RESUME) as peer:
            peer.say(generate(1, 1000))
            await peer.hear_until(Final)
            assert house.frontend.keeper.kept_bytes > LIMIT // 2
            cores.free = False
            peer.say(generate(2, 1000, deltas=False))
            await until(lambda: len(cores.now.submits) == 2)
            for _ in range(990):
                cores.now.step()
            await until(lambda: house.frontend.heap.num_bytes > LIMIT // 2)
            assert house.frontend.keeper.kept_bytes == 0

    run(body())


def test_an_answer_whose_reader_left_counts_no_longer(run, serving, peering, cores):
    async def body():
        features = Hello(client="test", features=["credit"])
        async with serving(cores=cores, stream_credit_bytes=1024) as house:
            async with peering(house, features) as peer:
                peer.say(generate(1, 500))
                await until(lambda: house.frontend.counters.finished)
                assert house.frontend.heap.num_bytes > 0
            await until(lambda: not house.frontend.streams.num_sinks)
            assert house.frontend.heap.num_bytes == 0

    run(body())


def test_ended_answers_that_are_read_again_count(run, serving, peering, cores):
    async def body():
        reading = Hello(client="test", features=["resume", "credit"])
        async with (
            serving(cores=cores, max_kept_bytes=LIMIT, stream_credit_bytes=1024) as house,
            peering(house, RESUME) as asker,
            peering(house, reading) as reader,
        ):
            for stream in range(1, 41):
                asker.say(generate(stream, 300))
                first = await asker.hear()
                await asker.hear_until(Final)
                reader.say(Resume(stream=stream, request_id=first.request_id, received=[0]))
                await reader.hear_so_far()
            held = sum(stream.num_bytes for stream in house.frontend.streams.with_readers())
            assert LIMIT // 2 < held <= house.frontend.heap.num_bytes < 1.1 * LIMIT

    run(body())
