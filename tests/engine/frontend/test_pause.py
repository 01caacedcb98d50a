"""What a stream that is paused for its reader keeps of the log-probabilities that were sent."""

from __future__ import annotations

import msgspec
from streams import generate

from cierzo.engine.frontend.delta_cost import delta_cost
from cierzo.engine.frontend.sample import Sample
from cierzo.engine.messages import (
    Accepted,
    Credit,
    Hello,
    Resume,
    TokenDelta,
    TokenLogprobs,
)


def test_what_a_paused_stream_has_forgotten_is_refused_by_the_bound(run, serving, peering, cores):
    async def body():
        cores.free = False
        limits = {"stream_credit_bytes": 1024, "max_pending_bytes": 1000}
        hello = Hello(features=["credit", "resume"])
        async with serving(cores=cores, **limits) as house, peering(house, hello) as peer:
            message = generate(max_tokens=3000, logprobs=1, ignore_eos=True)
            peer.say(msgspec.structs.replace(message, idempotency_key="once"))
            name = (await peer.hear()).request_id
            await cores.until(lambda: cores.now.submits)
            for _ in range(100):
                cores.now.step()
                peer.say(Credit(stream=1, bytes=delta_cost(await peer.hear())))
            cores.go_on()
            await cores.until(lambda: cores.now.aborts)
            async with peering(house, hello) as other:
                other.say(msgspec.structs.replace(message, stream=2, idempotency_key="once"))
                other.say(Resume(stream=3, request_id=name, received=[0]))
                for code in ("not_found", "invalid_request"):
                    refusal = await other.hear()
                    assert refusal.code == code
                    assert "stream_credit_bytes, 1024" in refusal.message

    run(body())


def test_a_paused_stream_keeps_what_its_reader_may_lack_of_each_sample(run, serving, peering, cores):
    """All that the reader has not consumed is of one sample, as the others have ended."""

    async def body():
        cores.free = False
        hello = Hello(features=["credit", "resume"])
        limits = {"stream_credit_bytes": 4096, "max_pending_bytes": 1000}
        async with serving(cores=cores, **limits) as house, peering(house, hello) as peer:
            stops = tuple(chr(7 * 4 + 17 * sample) for sample in range(3))
            peer.say(generate(max_tokens=3000, logprobs=1, ignore_eos=True, n=4, stop=stops))
            name = (await peer.hear()).request_id
            await cores.until(lambda: cores.now.submits)
            got = [0] * 4
            while got[3] < 20:
                cores.now.step()
                for _ in range(4 if got[0] < 5 else 1):
                    delta = await peer.hear()
                    got[delta.sample] += len(delta.token_ids)
                    peer.say(Credit(stream=1, bytes=delta_cost(delta)))
            assert got[:3] == [5, 5, 5]
            for _ in range(10):
                cores.now.step()
            delta = await peer.hear()  # of ten; the others are not consumed
            peer.say(Credit(stream=1, bytes=delta_cost(delta)))
            got[3] += len(delta.token_ids)
            await peer.hear_so_far()
            (stream,) = house.frontend.streams
            cores.go_on()
            await cores.until(lambda: any(abort.sample is None for abort in cores.now.aborts))
            assert stream.paused
            assert 0 < stream.samples[3].first_offset <= got[3], "what was consumed goes, but for the last"
            async with peering(house, hello) as other:
                other.say(Resume(stream=5, request_id=name, received=got))
                assert isinstance(await other.hear(), Accepted)
                delta = await other.hear()
                assert (delta.sample, delta.token_ids[0]) == (3, (51 + 7 * got[3]) % 256)

    run(body())


def test_a_sample_that_keeps_nothing_can_be_paused_with_others():
    """It was behind, caught up, and went on at once since."""
    sample = Sample(0, None, [], keeps=False, whole=False)

    def delta(token_id):
        return TokenDelta(
            request_id=0,
            sample=0,
            token_ids=[token_id],
            logprobs=[TokenLogprobs(token_id, -1.0, [], [])],
            finish=None,
        )

    sample.append(delta(1))
    sample.read(10)
    sample.take(delta(2))
    sample.keep_sent(1)
    sample.append(delta(3))
    token_ids, _, logprobs, _ = sample.read(10)
    assert token_ids == [entry.token_id for entry in logprobs] == [3]
