"""Requests that outlive their connection: accepted, resumed from a token, taken over, cancelled by id, kept."""

from __future__ import annotations

import pytest
from streams import until

from cierzo.engine.errors import Overloaded
from cierzo.engine.frontend.client import Client
from cierzo.engine.messages import (
    Accepted,
    Cancel,
    CancelRequest,
    Delta,
    Done,
    Failure,
    Final,
    Generate,
    Hello,
    Resume,
    SamplingParams,
    TokenLogprobs,
)

RESUME = Hello(client="test", features=["resume"])


def generate(stream=1, prompt=(1,), **params):
    fields = {name: params.pop(name) for name in ("deltas", "deadline_s", "output_token_ids") if name in params}
    return Generate(stream=stream, token_ids=list(prompt), sampling=SamplingParams(**params), **fields)


async def hear_all(peer):
    """(token ids by sample, text by sample, last message) of the one stream of a peer."""
    token_ids, texts = {}, {}
    while not isinstance(message := await peer.hear(), Final | Failure | None):
        if isinstance(message, Delta):
            token_ids.setdefault(message.sample, []).extend(message.token_ids)
            texts[message.sample] = texts.get(message.sample, "") + message.text
    return token_ids, texts, message


def test_accepted_comes_first_and_tells_what_counts(run, serving, peering, cores):
    cores.free = False

    async def body():
        async with (
            serving(cores=cores, default_deadline_s=77.0) as house,
            peering(house, RESUME) as peer,
            peering(house) as plain,
        ):
            peer.say(generate(1, seed=5, deadline_s=9.0))
            first = await peer.hear()
            assert (first.stream, first.seed, first.queue_position, first.deadline_s) == (1, 5, 0, 9.0)
            assert len(bytes.fromhex(first.request_id)) == 16
            plain.say(generate(1, [3]))
            peer.say(generate(2, [2]))
            second = await peer.hear()
            assert isinstance(second, Accepted)
            await cores.until(lambda: len(cores.now.submits) == 3)
            assert second.deadline_s == 77.0
            assert second.request_id != first.request_id
            cores.now.step()
            assert [type(await peer.hear()) for _ in range(2)] == [Delta, Delta]
            assert isinstance(await plain.hear(), Delta), "nothing else without the feature"
            peer.say(generate(3, [4]))
            third = await peer.hear_until(Accepted)
            assert third.queue_position == 0, "the others have a token"
            peer.say(generate(4, [5], seed=1))
            fourth = await peer.hear_until(Accepted)
            assert (fourth.queue_position, fourth.seed) == (1, 1)
            peer.say(generate(5, [], seed=1))
            refused = await peer.hear()
            assert (refused.stream, refused.code) == (5, "invalid_request"), "no accepted before it"
            drawn = next(submit for submit in cores.now.submits if submit.prompt_token_ids == [2])
            assert drawn.sampling.seed == second.seed

    run(body())


@pytest.mark.parametrize("inline_chars", [0, 2048])
def test_accepted_comes_for_a_prompt_encoded_aside(run, serving, peering, cores, inline_chars):
    async def body():
        async with serving(cores=cores, inline_chars=inline_chars) as house, peering(house, RESUME) as peer:
            peer.say(Generate(stream=1, text="hello", sampling=SamplingParams(max_tokens=1)))
            assert [type(await peer.hear()) for _ in range(3)] == [Accepted, Delta, Final]

    run(body())


@pytest.mark.parametrize("offset", range(10))
def test_a_lost_connection_is_resumed_from_any_token(run, serving, peering, cores, offset):
    """The answer has characters of two and three bytes, and the beginning of a stop string."""
    answer = list("é€ STxSTOP".encode())
    cores.free, cores.answer = False, lambda submit, sample: answer

    async def body():
        async with serving(cores=cores) as house:
            async with peering(house, RESUME) as peer:
                peer.say(generate(stop=["STOP"], n=2, max_tokens=40))
                name = (await peer.hear()).request_id
                await cores.until(lambda: cores.now.submits)
                for _ in range(9):
                    cores.now.step()
                deltas = [await peer.hear() for _ in range(18)]
            texts = ["".join(d.text for d in [d for d in deltas if d.sample == 0][:k]) for k in (offset, 3)]
            async with peering(house, RESUME) as peer:
                peer.say(Resume(stream=8, request_id=name, received=[offset, 3]))
                again = await peer.hear()
                assert (again.stream, again.request_id, again.queue_position) == (8, name, 0)
                cores.go_on()
                token_ids, rest, final = await hear_all(peer)
            assert token_ids == {0: answer[offset:], 1: answer[3:]}
            assert [known + rest[i] for i, known in enumerate(texts)] == ["é€ STx"] * 2
            assert [(end.stop, end.output_tokens) for end in final.samples] == [("STOP", len(answer))] * 2
            assert not [abort for abort in cores.now.aborts if abort.reason != "stop"]

    run(body())


def test_a_request_that_has_ended_is_kept(run, serving, peering, cores):
    """With its log-probabilities; for all three samples, each from its own token; and whole without deltas."""

    async def body():
        async with serving(cores=cores) as house:
            for deltas in (True, False):
                async with peering(house, RESUME) as peer:
                    peer.say(generate(n=3, max_tokens=5, logprobs=1, seed=0, deltas=deltas))
                    name = (await peer.hear()).request_id
                    first = await peer.hear_until(Final)
                whole = [[(1 + 17 * i + 7 * k) % 256 for k in range(5)] for i in range(3)]
                for received in ([0, 3, 5], [5, 5, 5]):
                    async with peering(house, RESUME) as peer:
                        peer.say(Resume(stream=2, request_id=name, received=received))
                        heard = [await peer.hear()]
                        while not isinstance(heard[-1], Final):
                            heard.append(await peer.hear())
                    assert isinstance(heard[0], Accepted)
                    assert heard[-1].samples == first.samples
                    assert (heard[-1].timings, heard[-1].usage) == (first.timings, first.usage)
                    parts = {d.sample: d for d in heard[1:-1]}
                    want = {i: whole[i][k:] for i, k in enumerate(received) if deltas and k < 5}
                    assert {i: d.token_ids for i, d in parts.items()} == want
                    entries = {
                        i: [TokenLogprobs(t, -1.0, [t, 0], [-1.0, -2.0]) for t in ids] for i, ids in want.items()
                    }
                    assert {i: d.logprobs for i, d in parts.items()} == entries
                if not deltas:
                    assert [end.token_ids for end in first.samples] == whole

    run(body())


def test_a_resume_takes_the_stream_over(run, serving, peering, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, peering(house, RESUME) as old, peering(house, RESUME) as new:
            old.say(generate(max_tokens=6, seed=0))
            name = (await old.hear()).request_id
            await cores.until(lambda: cores.now.submits)
            cores.now.step()
            await old.hear()
            new.say(Resume(stream=1, request_id=name, received=[1]))
            assert isinstance(await new.hear(), Accepted)
            ended = await old.hear()
            assert (ended.stream, ended.code, ended.retry) == (1, "taken_over", False)
            old.say(Cancel(stream=1))  # its id is free: nothing happens
            new.say(Resume(stream=2, request_id=name, received=[0]))  # by the same connection, from the beginning
            assert (await new.hear()).code == "taken_over"
            cores.go_on()
            token_ids, _, final = await hear_all(new)
            assert token_ids == {0: [1, 8, 15, 22, 29, 36]}
            assert final.stream == 2
            assert not cores.now.aborts

    run(body())


def test_what_cannot_be_resumed_is_refused_by_name(run, serving, peering, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, peering(house, RESUME) as peer:
            peer.say(generate(n=2, max_tokens=6))
            name = (await peer.hear()).request_id
            await cores.until(lambda: cores.now.submits)
            cores.now.step()
            wrong = [
                ([0], name, "invalid_request", "received"),
                ([0, 0, 0], name, "invalid_request", "received"),
                ([0, 2], name, "invalid_request", "received[1]"),
                ([-1, 0], name, "invalid_request", "received[0]"),
                ([0, 0], "0" * 32, "not_found", "request_id"),
                ([0, 0], "no hex", "not_found", "request_id"),
            ]
            for stream, (received, request_id, code, field) in enumerate(wrong, start=10):
                peer.say(Resume(stream=stream, request_id=request_id, received=received))
                refusal = await peer.hear_until(Failure)
                assert (refusal.stream, refusal.code, refusal.field) == (stream, code, field)
            peer.say(CancelRequest(stream=30, request_id="f" * 32))
            assert (await peer.hear()).code == "not_found"
            cores.go_on()
            assert (await peer.hear_until(Final)).stream == 1, "the stream itself is not touched"

    run(body())


def test_a_request_is_cancelled_by_its_id_from_another_connection(run, serving, peering, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, peering(house, RESUME) as peer, peering(house, RESUME) as other:
            peer.say(generate())
            name = (await peer.hear()).request_id
            await cores.until(lambda: cores.now.submits)
            other.say(CancelRequest(stream=7, request_id=name))
            assert await other.hear() == Done(stream=7)
            final = await peer.hear_until(Final)
            assert [end.finish_reason for end in final.samples] == ["cancelled"]
            other.say(CancelRequest(stream=8, request_id=name))
            assert await other.hear() == Done(stream=8), "it is kept, and has ended"

    run(body())


def test_an_orphan_goes_on_and_is_cancelled_when_nobody_comes(run, serving, peering, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores, orphan_s=0.05, max_open_samples=2) as house:
            async with peering(house, RESUME) as peer, peering(house) as plain:
                peer.say(generate())
                await peer.hear()
                plain.say(generate(prompt=[2]))
                await cores.until(lambda: len(cores.now.submits) == 2)
            await cores.until(lambda: cores.now.aborts)
            assert cores.now.aborts[0].request_id == 1, "the one that cannot be resumed, at once"
            async with await Client.connect(house.address) as client:
                with pytest.raises(Overloaded, match="max_open_samples"):  # the orphan counts
                    await client.complete(token_ids=[1], n=2)
                await cores.until(lambda: len(cores.now.aborts) == 2)
                await until(lambda: not len(house.frontend.keeper))  # the answer is forgotten after orphan_s
            registry = house.frontend.streams
            assert (len(registry), registry.num_samples, registry.num_tokens) == (0, 0, 0)

    run(body())


def test_an_orphan_is_finished_and_survives_the_core(run, serving, peering, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house:
            async with peering(house, RESUME) as peer:
                peer.say(generate(max_tokens=7, seed=0))
                name = (await peer.hear()).request_id
                await cores.until(lambda: cores.now.submits)
                cores.now.step()
                await peer.hear()
            async with peering(house, RESUME) as peer:
                peer.say(Resume(stream=4, request_id="0" * 32, received=[0]))
                await peer.hear()  # the first connection's end has been seen
                cores.now.step()
                cores.now.kill()
                await cores.until(lambda: len(cores.lives) == 2 and cores.now.submits)
                cores.go_on()
                peer.say(Resume(stream=5, request_id=name, received=[1]))
                token_ids, _, final = await hear_all(peer)
                assert token_ids == {0: [8, 15, 22, 29, 36, 43]}
                assert final.samples[0].output_tokens == 7

    run(body())


def test_the_oldest_answers_are_forgotten_first(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores, max_kept_bytes=3 * 3500) as house, peering(house, RESUME) as peer:
            names = []
            for stream in range(5):
                peer.say(generate(stream, max_tokens=100))
                names.append((await peer.hear()).request_id)
                await peer.hear_until(Final)
                assert house.frontend.keeper.kept_bytes <= 3 * 3500
            known = []
            for stream, name in enumerate(names, start=10):
                peer.say(Resume(stream=stream, request_id=name, received=[100]))
                known.append(isinstance(await peer.hear(), Accepted))
                await peer.hear() if known[-1] else None
            assert known == [False, False, True, True, True]

    run(body())


def test_a_long_answer_loses_its_oldest_log_probabilities_alone(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores, max_answer_bytes=8000) as house, peering(house, RESUME) as peer:
            peer.say(generate(max_tokens=400, logprobs=1, seed=0))
            name = (await peer.hear()).request_id
            whole, _, _ = await hear_all(peer)
            peer.say(Resume(stream=2, request_id=name, received=[0]))
            refusal = await peer.hear()
            assert (refusal.code, refusal.field) == ("invalid_request", "received[0]")
            assert "max_answer_bytes" in refusal.message
            first = int(refusal.limit.split()[0])
            assert 0 < first < 400
            peer.say(Resume(stream=3, request_id=name, received=[first]))
            heard = [await peer.hear()]
            while not isinstance(heard[-1], Final):
                heard.append(await peer.hear())
            token_ids = [t for d in heard[1:-1] for t in d.token_ids]
            assert token_ids == whole[0][first:]
            assert [e.token_id for d in heard[1:-1] for e in d.logprobs] == token_ids

    run(body())


def test_answers_in_one_piece_are_bounded_at_admission(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores, max_answer_bytes=16 * 100 * 317) as house, peering(house) as peer:
            peer.say(generate(n=16, logprobs=20, max_tokens=101, deltas=False))
            refusal = await peer.hear()
            assert (refusal.code, refusal.field, refusal.limit) == ("invalid_request", "sampling.max_tokens", "100")
            peer.say(generate(n=16, logprobs=20, max_tokens=100, deltas=False))
            final = await peer.hear()
            assert [len(end.logprobs) for end in final.samples] == [100] * 16
            assert house.frontend.counters.refused == 1

    run(body())


def test_tokens_that_a_request_brought_count_as_received(run, serving, peering, cores):
    cores.answer = lambda submit, sample: list(b"abc STOP")

    async def body():
        async with serving(cores=cores) as house, peering(house, RESUME) as peer:
            peer.say(generate(output_token_ids=list(b"abc S"), stop=["STOP"], seed=1, max_tokens=20))
            name = (await peer.hear()).request_id
            token_ids, texts, _ = await hear_all(peer)
            assert (token_ids, texts) == ({0: list(b"TOP")}, {0: ""})
            for offset, text in ((0, "abc "), (2, "c "), (6, "")):
                peer.say(Resume(stream=1, request_id=name, received=[offset]))
                await peer.hear()
                token_ids, texts, _ = await hear_all(peer)
                assert (token_ids[0], texts[0]) == (list(b"abc STOP")[offset:], text)

    run(body())


def test_a_cancelled_answer_gives_its_held_back_text_apart(run, serving, peering, cores):
    """The rest of the text comes without tokens, so that it may come again."""
    cores.free, cores.answer = False, lambda submit, sample: list(b"abSTabcdef")

    async def body():
        async with serving(cores=cores) as house, peering(house, RESUME) as peer:
            peer.say(generate(stop=["STOP"]))
            name = (await peer.hear()).request_id
            await cores.until(lambda: cores.now.submits)
            for _ in range(4):
                cores.now.step()
            peer.say(Cancel(stream=1))
            token_ids, texts, final = await hear_all(peer)
            assert (token_ids, texts) == ({0: list(b"abST")}, {0: "abST"})
            assert final.samples[0].finish_reason == "cancelled"
            peer.say(Resume(stream=2, request_id=name, received=[3]))
            heard = [await peer.hear() for _ in range(4)]
            assert [(d.token_ids, d.text) for d in heard[1:3]] == [([ord("T")], ""), ([], "ST")]

    run(body())
