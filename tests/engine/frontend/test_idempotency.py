"""Idempotency keys: the same key never generates twice, and always stands for the same request."""

from __future__ import annotations

import msgspec
import pytest

from cierzo.engine.frontend.keeper import digest
from cierzo.engine.messages import (
    Accepted,
    Cancel,
    Delta,
    Failure,
    Final,
    Generate,
    Hello,
    SamplingParams,
)

RESUME = Hello(client="test", features=["resume"])


def generate(stream=1, key="k", prompt=(1,), deltas=True, deadline_s=None, **params):
    sampling = SamplingParams(**{"max_tokens": 5, **params})
    return Generate(
        stream=stream,
        token_ids=list(prompt),
        sampling=sampling,
        deltas=deltas,
        deadline_s=deadline_s,
        idempotency_key=key,
    )


async def hear_all(peer, stream):
    """(request id, token ids, last message) of a stream of a peer."""
    name, token_ids = None, []
    while True:
        message = await peer.hear()
        assert message.stream == stream
        if isinstance(message, Accepted):
            name = message.request_id
        elif isinstance(message, Delta):
            token_ids += message.token_ids
        else:
            return name, token_ids, message


@pytest.mark.parametrize("deltas", [True, False])
def test_a_key_gives_the_kept_answer(run, serving, peering, cores, deltas):
    async def body():
        async with serving(cores=cores) as house:
            heard = []
            for stream in (1, 2):
                async with peering(house, RESUME) as peer:
                    peer.say(generate(stream, deltas=deltas, deadline_s=float(stream)))
                    heard.append(await hear_all(peer, stream))
            (name, token_ids, final), (again, token_ids_again, final_again) = heard
            assert (name, token_ids, final.samples, final.seed, final.timings) == (
                again,
                token_ids_again,
                final_again.samples,
                final_again.seed,
                final_again.timings,
            )
            assert len(token_ids or final.samples[0].token_ids) == 5
            assert len(cores.now.submits) == 1

    run(body())


def test_a_key_joins_the_request_that_runs(run, serving, peering, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, peering(house, RESUME) as first, peering(house, RESUME) as second:
            first.say(generate(seed=0))
            name = (await first.hear()).request_id
            await cores.until(lambda: cores.now.submits)
            cores.now.step()
            await first.hear()
            second.say(generate(9, seed=0))
            assert (await first.hear()).code == "taken_over"
            cores.go_on()
            assert (await hear_all(second, 9))[:2] == (name, [1, 8, 15, 22, 29])
            assert len(cores.now.submits) == 1

    run(body())


def test_a_key_joins_a_request_that_is_still_encoded(run, serving, peering, cores):
    async def body():
        async with (
            serving(cores=cores, inline_chars=0) as house,
            peering(house, RESUME) as first,
            peering(house, RESUME) as second,
        ):
            sampling = SamplingParams(max_tokens=5)
            for stream, peer in ((1, first), (2, second)):
                peer.say(Generate(stream=stream, text="hello", sampling=sampling, idempotency_key="k"))
            ends = [await hear_all(first, 1), await hear_all(second, 2)]
            # Whichever came first was taken over by the other one.
            assert {type(end[2]) for end in ends} == {Failure, Final}
            assert len(cores.now.submits) == 1

    run(body())


def test_the_seed_is_told_though_the_prompt_was_never_encoded(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores, inline_chars=0) as house, peering(house, RESUME) as peer:
            request = Generate(
                stream=1, text="hello", sampling=SamplingParams(max_tokens=5, seed=7), idempotency_key="k"
            )
            peer.say(request)
            peer.say(Cancel(stream=1))
            while not isinstance(end := await peer.hear(), Final):
                pass
            assert end.samples[0].finish_reason == "cancelled"
            assert not cores.now.submits
            peer.say(msgspec.structs.replace(request, stream=2))
            accepted = await peer.hear()
            assert (accepted.stream, accepted.seed) == (2, 7)

    run(body())


@pytest.mark.parametrize(
    "other", [{"prompt": (2,)}, {"max_tokens": 6}, {"seed": 1}, {"deltas": False}, {"logit_bias": {1: 1.0, 2: 2.0}}]
)
def test_a_key_with_another_request_is_refused(run, serving, peering, cores, other):
    async def body():
        async with serving(cores=cores) as house, peering(house, RESUME) as peer:
            peer.say(generate())
            await hear_all(peer, 1)
            peer.say(generate(2, **other))
            refusal = await peer.hear()
            assert (refusal.code, refusal.field, refusal.value) == ("key_reused", "idempotency_key", "k")
            peer.say(generate(3, key="another", **other))
            assert isinstance((await hear_all(peer, 3))[2], Final)

    run(body())


def test_a_refused_request_keeps_no_key(run, serving, peering, cores):
    async def body():
        async with (
            serving(cores=cores, inline_chars=3, max_open_tokens=100) as house,
            peering(house, RESUME) as peer,
        ):
            peer.say(generate(1, prompt=()))
            peer.say(generate(2, prompt=(1,), temperature=-1.0))
            aside = Generate(stream=3, text="x" * 200, sampling=SamplingParams(max_tokens=5), idempotency_key="k")
            codes = []
            for _ in range(2):
                codes.append((await peer.hear()).code)
            peer.say(aside)
            codes.append((await peer.hear()).code)
            assert codes == ["invalid_request"] * 3
            assert len(house.frontend.keeper) == 0
            peer.say(generate(4))
            assert isinstance((await hear_all(peer, 4))[2], Final)

    run(body())


@pytest.mark.parametrize("key", ["", "x" * 129])
def test_a_key_has_a_length(run, serving, peering, key):
    async def body():
        async with serving() as house, peering(house, RESUME) as peer:
            peer.say(generate(key=key))
            refusal = await peer.hear()
            assert (refusal.code, refusal.field) == ("invalid_request", "idempotency_key")
            peer.say(generate(2, key="x" * 128))
            assert isinstance((await hear_all(peer, 2))[2], Final)

    run(body())


def test_keys_are_bounded_and_expire(run, serving, peering, cores):
    async def body():
        limits = {"max_idempotency_keys": 2, "idempotency_s": 0.2}
        async with serving(cores=cores, **limits) as house, peering(house, RESUME) as peer:
            for stream, key in ((1, "a"), (2, "b")):
                peer.say(generate(stream, key))
                await hear_all(peer, stream)
            peer.say(generate(3, "c"))
            refusal = await peer.hear()
            assert (refusal.code, refusal.field, refusal.retry) == ("overloaded", "max_idempotency_keys", True)
            assert 0 <= refusal.retry_after_s <= 0.2
            stream = 3
            while isinstance(refusal, Failure):  # until the first one has expired
                stream += 1
                peer.say(generate(stream, "c"))
                refusal = await peer.hear()
            await hear_all(peer, stream)
            assert len(cores.now.submits) == 3

    run(body())


def test_a_key_is_known_longer_than_its_answer(run, serving, peering, cores):
    """An answer that was forgotten for lack of room is not generated again."""

    async def body():
        async with serving(cores=cores, max_kept_bytes=100) as house, peering(house, RESUME) as peer:
            peer.say(generate())
            await hear_all(peer, 1)
            peer.say(generate(2))
            refusal = await peer.hear()
            assert (refusal.code, refusal.field) == ("not_found", "idempotency_key")
            assert len(cores.now.submits) == 1

    run(body())


def test_an_answer_that_lost_its_beginning_is_not_joined(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores, max_answer_bytes=2000) as house, peering(house, RESUME) as peer:
            peer.say(generate(max_tokens=200, logprobs=1))
            await hear_all(peer, 1)
            peer.say(generate(2, max_tokens=200, logprobs=1))
            refusal = await peer.hear()
            assert (refusal.code, refusal.field) == ("not_found", "idempotency_key")
            assert "max_answer_bytes" in refusal.message
            assert len(cores.now.submits) == 1

    run(body())


def test_an_orphan_with_a_key_is_found_by_it_after_the_death_of_the_core(run, serving, peering, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house:
            async with peering(house, RESUME) as peer:
                peer.say(generate(seed=0))
                await cores.until(lambda: cores.now.submits)
                cores.now.step()
            async with peering(house, RESUME) as peer:
                cores.now.kill()
                await cores.until(lambda: len(cores.lives) == 2 and cores.now.submits)
                peer.say(generate(2, seed=0))
                assert isinstance(await peer.hear(), Accepted)
                cores.go_on()
                assert (await hear_all(peer, 2))[1] == [1, 8, 15, 22, 29]
                assert [len(life.submits) for life in cores.lives] == [1, 1]

    run(body())


def test_the_digest_knows_what_is_asked_for():
    message = generate(logit_bias={1: 1.0, 2: 2.0})
    assert digest(message) == digest(generate(7, "other", deadline_s=3.0, logit_bias={2: 2.0, 1: 1.0}))
    assert digest(message) != digest(generate(logit_bias={1: 1.0, 2: 2.5}))


def test_a_retry_may_have_another_trace(run, serving, peering):
    async def body():
        async with serving() as house, peering(house, Hello(client="test", features=["resume", "trace"])) as peer:
            names = set()
            for stream, caller_id in ((1, "first"), (2, "second")):
                peer.say(msgspec.structs.replace(generate(stream), caller_id=caller_id))
                names.add((await hear_all(peer, stream))[0])
            assert len(names) == 1

    run(body())
