"""Log-probabilities of a prompt, on their way from the core to whoever reads them."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import pytest
from fake_rpc_server import accepted, delta, final, scripted
from streams import generate, until

from cierzo.engine import LLM
from cierzo.engine.errors import Interrupted, InvalidRequest
from cierzo.engine.frontend.client import Client, Reconnect, SyncClient
from cierzo.engine.frontend.delta_cost import delta_cost
from cierzo.engine.frontend.generation import Inbox
from cierzo.engine.frontend.prompt_log import PromptLog
from cierzo.engine.frontend.sample import require_bounded
from cierzo.engine.messages import (
    Accepted,
    Cancel,
    Credit,
    Delta,
    Failure,
    Final,
    Generate,
    Hello,
    Resume,
    SamplingParams,
    Submit,
    TokenLogprobs,
)
from cierzo.engine.testing.fake_core import made_up_entry
from cierzo.kernels import registry
from cierzo.scheduler.plan import packed_entry

HELLO = Hello(features=["resume", "prompt_logprobs"])
AT_ONCE = Reconnect(first_pause_s=0.0, longest_pause_s=0.0)
CREDIT = Hello(features=["credit", "resume", "prompt_logprobs"])
PROMPT = [1 + token % 200 for token in range(3000)]


def expected(prompt, count):
    return [made_up_entry(place, token, count) for place, token in enumerate(prompt[1:])]


def ask(count=1, prompt=PROMPT, stream=1, **params):
    fields = {name: params.pop(name) for name in ("deltas", "idempotency_key") if name in params}
    sampling = SamplingParams(**{"max_tokens": 2, "seed": 0, **params}, prompt_logprobs=count)
    return Generate(stream=stream, token_ids=prompt, sampling=sampling, **fields)


async def hear_all(peer, gives_credit=False):
    """All deltas of a peer's one stream, and its last message."""
    deltas = []
    while not isinstance(message := await peer.hear(), Final | Failure | None):
        if isinstance(message, Delta):
            deltas.append(message)
            if gives_credit:
                peer.say(Credit(stream=message.stream, bytes=delta_cost(message)))
    return deltas, message


def entries_of(deltas):
    return [entry for delta in deltas for entry in delta.prompt_logprobs]


# --- what comes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_gets_them_once_and_before_the_tokens(run, serving, cores, n):
    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            generation = client.generate(token_ids=PROMPT[:500], prompt_logprobs=2, max_tokens=3, n=n, seed=1)
            deltas = [delta async for delta in generation]
            assert entries_of(deltas) == expected(PROMPT[:500], 2)
            first = next(index for index, delta in enumerate(deltas) if delta.token_ids and delta.sample == 0)
            assert not entries_of(deltas[first:])
            assert all(not (delta.token_ids and delta.prompt_logprobs) for delta in deltas)
            assert max(len(delta.prompt_logprobs) for delta in deltas) == 128
            assert [end.output_tokens for end in generation.final.samples] == [3] * n

    run(body())


def test_none_come_of_one_token_and_none_unless_asked_for(run, serving, cores):
    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            for fields in ({"token_ids": [1], "prompt_logprobs": 2}, {"token_ids": PROMPT[:9]}):
                assert not entries_of([delta async for delta in client.generate(**fields, max_tokens=1)])

    run(body())


@pytest.mark.parametrize("size", [2, 2900])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_whole_answer_has_them_all(run, serving, cores, size, logprobs):
    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            final = await client.complete(
                token_ids=PROMPT[:size], prompt_logprobs=3, logprobs=logprobs, max_tokens=3, seed=0
            )
            assert final.prompt_logprobs == expected(PROMPT[:size], 3)
            assert len(final.samples[0].token_ids) == 3

    run(body())


def test_a_whole_answer_that_may_be_too_long_is_refused():
    def submit(**params):
        return Submit(request_id=1, prompt_token_ids=[], sampling=SamplingParams(max_tokens=10, **params))

    require_bounded(submit(prompt_logprobs=1), 100, 2 * 100 * 43)
    with pytest.raises(InvalidRequest) as caught:
        require_bounded(submit(prompt_logprobs=1), 101, 2 * 100 * 43)
    assert (caught.value.field, caught.value.limit) == ("sampling.prompt_logprobs", "a prompt of 100 tokens")
    require_bounded(submit(prompt_logprobs=0), 2, 2 * 29 + 10 * 8)
    with pytest.raises(InvalidRequest) as caught:
        require_bounded(submit(prompt_logprobs=0), 2, 2 * 29 + 10 * 8 - 1)
    assert caught.value.field == "sampling.max_tokens"


@pytest.mark.parametrize(
    ("count", "hello", "field"),
    [
        (0, Hello(), "sampling.prompt_logprobs"),
        (-1, HELLO, "sampling.prompt_logprobs"),
        (21, HELLO, "sampling.prompt_logprobs"),
    ],
)
def test_what_cannot_be_is_refused_by_name(run, serving, peering, cores, count, hello, field):
    async def body():
        async with serving(cores=cores) as house, peering(house, hello) as peer:
            peer.say(ask(count))
            refusal = await peer.hear()
            assert (refusal.code, refusal.field) == ("invalid_request", field)

    run(body())


def test_a_served_model_scores_as_one_in_this_process_does(start, checkpoint, tmp_path):
    """Bit for bit, whatever runs beside it; in one process in one chunk, in the other one in many."""
    prompt = [(7 * place) % 200 + 1 for place in range(300)]
    asked = {"prompt_logprobs": 5, "max_tokens": 3, "temperature": 0.0}
    settings = {"threads": 1, "kv_cache_gib": 0.01, "max_model_len": 512}
    with LLM(checkpoint, **settings) as llm:
        (alone,) = llm.generate([prompt], **asked)
    options = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    start("--runner", "model", "--max-chunk-tokens", "48", "--budget-tokens", "64", *options)
    with SyncClient(f"unix:{tmp_path / 'rpc.sock'}") as client:
        others = [client.generate(token_ids=prompt[:size], **asked) for size in (300, 200, 300)]
        found = [entries_of(generation) for generation in others]
        assert client.complete(token_ids=prompt, **asked).usage.cached_tokens == 0
    if registry.default_instruction_set == "reference" or not registry.has_native():
        assert [len(entries) for entries in found] == [299, 199, 299]  # the reference is exact up to rounding
    else:
        assert found == [alone.prompt_logprobs, alone.prompt_logprobs[:199], alone.prompt_logprobs]


# --- readers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hello", [HELLO, CREDIT])
def test_the_core_waits_for_a_slow_reader_and_goes_on_behind_what_it_told(run, serving, peering, cores, hello):
    """Nothing comes twice and nothing is lost, though the core begins the prompt again and again."""

    async def body():
        cores.free = False
        limits = {"stream_credit_bytes": 1024, "max_pending_bytes": 8192, "high_water_bytes": 1024}
        async with serving(cores=cores, **limits) as house, peering(house, hello) as peer:
            peer.writer.transport.pause_reading()
            peer.say(ask(2))
            await cores.until(lambda: cores.now.submits)
            (stream,) = house.frontend.streams
            cores.now.scored_at_once = 100
            cores.go_on()
            if hello is CREDIT:
                await cores.until(lambda: cores.now.aborts)
                assert stream.paused
                assert stream.prompt.unsent_bytes < 8192 + 2 * 100 * 61
            peer.writer.transport.resume_reading()
            deltas, final = await hear_all(peer, gives_credit=hello is CREDIT)
            assert entries_of(deltas) == expected(PROMPT, 2)
            assert final.usage.cached_tokens == 0
            if hello is CREDIT:
                scored = [submit.num_scored for submit in cores.now.submits]
                assert len(scored) > 5
                assert scored == sorted(set(scored))

    run(body())


def test_what_a_cancelled_stream_has_not_been_sent_is_dropped(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores, stream_credit_bytes=1024) as house, peering(house, CREDIT) as peer:
            peer.say(ask(2))
            await peer.hear_until(Delta)
            peer.say(Cancel(stream=1))
            deltas, final = await hear_all(peer)
            assert len(entries_of(deltas)) < 500
            assert final.samples[0].finish_reason in ("cancelled", "length")

    run(body())


@pytest.mark.parametrize("offset", [0, 1, 127, 128, 1000, 2999])
def test_a_lost_connection_is_resumed_behind_any_entry(run, serving, peering, cores, offset):
    async def body():
        cores.free = False
        async with serving(cores=cores) as house:
            async with peering(house, HELLO) as peer:
                peer.say(ask(1))
                name = (await peer.hear()).request_id
                await cores.until(lambda: cores.now.submits)
                for _ in range(3):
                    cores.now.step()
                heard = []
                while len(heard) < 2999:
                    heard += (await peer.hear()).prompt_logprobs
            async with peering(house, HELLO) as peer:
                peer.say(Resume(stream=8, request_id=name, received=[0], prompt_received=offset))
                assert isinstance(await peer.hear(), Accepted)
                cores.go_on()
                deltas, final = await hear_all(peer)
                assert entries_of(deltas) == expected(PROMPT, 1)[offset:]
                assert final.samples[0].output_tokens == 2

    run(body())


def test_who_cannot_have_them_is_refused_on_resume(run, serving, peering, cores):
    async def body():
        cores.free = False
        async with serving(cores=cores) as house, peering(house, HELLO) as peer:
            peer.say(ask(1, idempotency_key="once"))
            peer.say(msgspec.structs.replace(generate(), stream=2))
            name, plain = (await peer.hear()).request_id, (await peer.hear()).request_id
            await cores.until(lambda: len(cores.now.submits) == 2)
            cores.now.step()
            await peer.hear_until(Delta)
            async with peering(house, Hello(features=["resume"])) as other:
                other.say(Resume(stream=1, request_id=name, received=[0]))
                refusal = await other.hear()
                assert (refusal.field, "prompt_logprobs" in refusal.message) == ("request_id", True)
            async with peering(house, HELLO) as other:
                for request_id, offset, limit in (
                    (name, 1025, "0 to 1024"),
                    (name, -1, "0 to 1024"),
                    (plain, 1, "0 to 0"),
                ):
                    other.say(Resume(stream=1, request_id=request_id, received=[0], prompt_received=offset))
                    refusal = await other.hear()
                    assert (refusal.field, refusal.limit) == ("prompt_received", limit)

    run(body())


def test_a_new_core_goes_on_behind_what_the_dead_one_told(run, serving, peering, cores):
    async def body():
        cores.free = False
        async with serving(cores=cores) as house, peering(house, HELLO) as peer:
            peer.say(ask(1))
            await cores.until(lambda: cores.now.submits)
            cores.now.step()
            await peer.hear_until(Delta)
            cores.now.kill()
            cores.free = True
            deltas, final = await hear_all(peer)
            (submit,) = cores.now.submits
            assert submit.num_scored == 1024
            assert entries_of(deltas) == expected(PROMPT, 1)[128:]
            assert [end.output_tokens for end in final.samples] == [2]

    run(body())


def test_samples_that_go_on_alone_are_not_scored_again(run, serving, peering, cores):
    async def body():
        cores.free = False
        async with serving(cores=cores) as house, peering(house, HELLO) as peer:
            peer.say(ask(1, n=2, max_tokens=9))
            await cores.until(lambda: cores.now.submits)
            for _ in range(5):
                cores.now.step()
            await peer.hear_so_far()
            cores.now.kill()
            cores.free = True
            await hear_all(peer)
            asked = [(one.first_sample, one.sampling.prompt_logprobs, one.num_scored) for one in cores.now.submits]
            assert asked == [(0, 1, 2999), (1, None, 2999)]

    run(body())


def test_a_long_prompts_log_stays_within_its_bound(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores, max_answer_bytes=60_000) as house, peering(house, HELLO) as peer:
            cores.free = False
            peer.say(ask(2, idempotency_key="once"))
            name = (await peer.hear()).request_id
            await cores.until(lambda: cores.now.submits)
            (stream,) = house.frontend.streams
            cores.now.scored_at_once = 100
            for _ in range(30):
                cores.now.step()
                await peer.hear_until(Delta)
                await peer.hear_so_far()
                assert stream.num_bytes < 60_000 + 6_100
            assert 0 < stream.prompt.first < stream.prompt.sent == 2999
            peer.say(Resume(stream=2, request_id=name, received=[0], prompt_received=0))
            refusal = await peer.hear()
            assert (refusal.field, "max_answer_bytes, 60000" in refusal.message) == ("prompt_received", True)
            peer.say(ask(2, stream=3, idempotency_key="once"))
            refusal = await peer.hear()
            assert (refusal.code, "max_answer_bytes, 60000" in refusal.message) == ("not_found", True)
            cores.go_on()
            await hear_all(peer)

    run(body())


# --- clients -----------------------------------------------------------------------------------------------


def scores(stream, start, end):
    return Delta(stream=stream, prompt_logprobs=expected(PROMPT, 1)[start:end])


def test_a_client_goes_on_behind_the_entries_that_were_taken(run):
    taken = asyncio.Event()

    async def loses(peer, number):
        if number == 0:
            request = await peer.hear(Generate)
            peer.say(accepted(request.stream), scores(request.stream, 0, 3), scores(request.stream, 3, 9))
            await taken.wait()
            peer.drop()
            return
        request = await peer.hear(Resume)
        assert (request.received, request.prompt_received) == ([0], 3)
        peer.say(accepted(request.stream), scores(request.stream, 3, 9), delta(request.stream, [65]))
        peer.say(final(request.stream, 1))
        await peer.hear(Resume)

    async def body():
        async with scripted(loses) as address, await Client.connect(address, reconnect=AT_ONCE) as client:
            generation = client.generate(token_ids=PROMPT[:200], prompt_logprobs=1)
            deltas = [await anext(generation)]
            taken.set()
            await until(lambda: generation._inbox.reopened)
            deltas += [delta async for delta in generation]
            assert entries_of(deltas) == expected(PROMPT, 1)[:9]

    run(body())


@pytest.mark.parametrize("has_token", [False, True])
def test_an_interrupted_answer_goes_on_elsewhere_once_it_has_a_token(run, has_token):
    """No request can say which entries are known; with a token they all are."""
    asked = []

    async def stops(peer, number):
        request = await peer.hear(Generate)
        peer.say(accepted(request.stream), scores(request.stream, 0, 3))
        if has_token:
            peer.say(delta(request.stream, [65]))
        peer.say(Failure(stream=request.stream, code="interrupted", message="stops", value="7"))
        await peer.hear(Generate)

    async def other(peer, number):
        while (request := await peer.hear(Generate)) is not None:
            asked.append(request)
            peer.say(accepted(request.stream), delta(request.stream, [66]), final(request.stream, 2))

    async def body():
        async with (
            scripted(stops) as first,
            scripted(other) as second,
            await Client.connect([first, second]) as client,
        ):
            generation = client.generate(token_ids=PROMPT[:4], prompt_logprobs=1)
            deltas = []
            with contextlib.nullcontext() if has_token else pytest.raises(Interrupted):
                async for part in generation:
                    deltas.append(part)
            assert len(entries_of(deltas)) == 3
            assert [(one.output_token_ids, one.sampling.prompt_logprobs) for one in asked] == [([65], None)][
                :has_token
            ]

    run(body())


# --- pieces ------------------------------------------------------------------------------------------------


def test_a_log_that_keeps_nothing_forgets_what_it_sends():
    log = PromptLog(1, keeps=False)
    entries = expected(PROMPT[:10], 1)
    assert log.extend(packed_entry(entry) for entry in entries) == log.num_bytes == log.unsent_bytes
    count, packed = log.send(4)
    assert (count, log.first, log.sent, log.end) == (4, 4, 4, 9)
    assert msgspec.msgpack.decode(packed, type=list[TokenLogprobs]) == entries[:4]
    count, packed = log.send(100)
    assert msgspec.msgpack.decode(packed, type=list[TokenLogprobs]) == entries[4:]
    assert (log.is_unsent, log.num_bytes, log.unsent_bytes) == (False, 0, 0)


def test_a_delta_of_them_costs_what_both_sides_compute():
    entries = expected(PROMPT[:10], 3)
    assert delta_cost(Delta(stream=1, prompt_logprobs=entries)) == 64 + 9 * PromptLog(3, keeps=True).cost


def test_an_inbox_counts_them_and_takes_none_for_a_repetition():
    """Deltas without tokens are alike to it but for what they have."""
    delta = Delta(stream=1, prompt_logprobs=expected(PROMPT[:4], 0))

    async def body():
        link = type("Link", (), {"loop": asyncio.get_running_loop(), "features": frozenset()})()
        inbox = Inbox(link, Resume(stream=1, request_id="", received=[0], prompt_received=5), [0])
        for _ in range(2):
            assert not inbox.repeats(delta)
            inbox.add(delta, 1)
            inbox.take()
        assert (inbox.prompt_received, inbox.received) == (11, [0])

    asyncio.run(body())
