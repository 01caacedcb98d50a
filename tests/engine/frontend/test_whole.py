"""Long final records: built in steps, sent in pieces, and the same as in one."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager

import msgspec
import pytest
from marked import ids
from streams import generate, until

from cierzo.engine.errors import Interrupted
from cierzo.engine.frontend.frames import pack
from cierzo.engine.frontend.outlet import TURN_TOKENS, Outlets
from cierzo.engine.frontend.sample import STATE_TOKENS
from cierzo.engine.frontend.stream import Stream, reader_of
from cierzo.engine.frontend.tenants import EVERYBODY
from cierzo.engine.frontend.whole import (
    CHUNK_PARTS,
    CHUNK_TOKENS,
    ONE_PIECE_TOKENS,
    PIECE_BYTES,
    build,
    cut,
    is_long,
)
from cierzo.engine.messages import (
    Final,
    Finish,
    Generate,
    Ping,
    Pong,
    SamplingParams,
    ServerMessage,
    Submit,
    TokenDelta,
    TokenLogprobs,
)
from cierzo.engine.testing.words import marked_prompts
from cierzo.engine.text.detok import Detokenizer
from cierzo.engine.text.prompt import PromptEncoder

FINISH = Finish("length", "", None, 3, 0, 0, 0, 0.0, 0.1, 0.2)


class Sink:
    features = frozenset(["accounting"])
    access = EVERYBODY
    peer = "a test"
    is_paused = False
    num_taken = 0


def ended(rng, tokenizer, *, num_tokens, n=1, brought=0, stop=(), logprobs=None):
    """A stream whose samples have so many tokens, of all lengths of characters and of none."""
    params = SamplingParams(n=n, stop=list(stop), logprobs=logprobs, seed=3)
    stream = Stream(0, 2**40, Sink(), False, n, 0, 5.0, 99.0)

    def detokenizer(_stream, _sample):
        return Detokenizer(tokenizer, tuple(stop))

    data = "".join(rng.choices("abc €𝄞é", k=num_tokens + brought)).encode()
    before, rest = list(data[:brought]), list(data[brought : brought + num_tokens])
    submit = Submit(request_id=0, prompt_token_ids=[1], sampling=params, output_token_ids=before)
    stream.start(submit, 3, [detokenizer(stream, sample) for sample in range(n)])
    for sample in stream.samples:
        for start in range(0, num_tokens, 999):
            part = rest[start : start + 999]
            tops = [[rng.randrange(2**17) for _ in range(logprobs or 0)] for _ in part]
            entries = [
                TokenLogprobs(t, -rng.random(), top, [-1.0] * len(top)) for t, top in zip(part, tops, strict=True)
            ]
            sample.append(TokenDelta(0, sample.index, part, None if logprobs is None else entries, None))
            if sample.cut:
                break
        stream.end(sample, FINISH)
    stream.close(7.0)
    return stream, detokenizer


def built(stream, detokenizer):
    """The frame, and the tokens of each step."""
    steps, pieces = [], build(stream, detokenizer)
    while True:
        try:
            steps.append(next(pieces))
        except StopIteration as done:
            return [bytes(piece) for piece in cut(done.value)], steps


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, CHUNK_TOKENS - 1, CHUNK_TOKENS + 15, 3 * CHUNK_TOKENS + 16])
@pytest.mark.parametrize(
    "given",
    [{}, {"n": 3}, {"n": 16, "brought": 5}, {"brought": CHUNK_TOKENS + 7}, {"stop": ["nowhere"]}, {"logprobs": 2}],
    ids=str,
)
def test_a_record_in_pieces_is_the_record(tokenizer, num_tokens, given):
    stream, detokenizer = ended(random.Random(num_tokens), tokenizer, num_tokens=num_tokens, **given)
    pieces, steps = built(stream, detokenizer)
    frame, whole = b"".join(pieces), stream.last(detokenizer)
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    message = msgspec.msgpack.decode(frame[4:], type=ServerMessage)
    assert message == msgspec.msgpack.decode(pack((whole,))[4:], type=ServerMessage)
    assert isinstance(message, Final)
    assert len(message.samples[-1].token_ids) == num_tokens + given.get("brought", 0)
    assert max(steps, default=0) <= CHUNK_TOKENS
    assert max(map(len, pieces)) <= PIECE_BYTES


SAID = [
    "[THINK]" + "hm € " * 2000 + '[/THINK]It blows.[TOOL_CALLS]wind[ARGS]{"at":  "' + "Z" * 5000 + '"}',
    "[THINK]a[/THINK]b" * 3000,
    "no marker " * 900,
    "[TOOL_CALLS]wind[ARGS]{}" * 500 + "[TOOL_CALLS]wind",
]


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("brought", [0, 5, 3500])
def test_a_record_of_parts_in_pieces_is_the_record(said, brought):
    prompts: PromptEncoder = marked_prompts()
    tokens, params = ids(said), SamplingParams(n=2, seed=3, max_tokens=10**5)
    stream = Stream(0, 1, Sink(), False, 2, 0, 5.0, 99.0, apart=True)
    new_reader = reader_of(prompts)
    stream.sampling, stream.num_prompt_tokens = params, 3
    readers, states = [new_reader(stream, sample) for sample in range(2)], []
    for start in range(0, brought, STATE_TOKENS):
        for reader in readers:
            reader.push(tokens[start : min(start + STATE_TOKENS, brought)])
        states.append(readers[0].state())
    submit = Submit(request_id=0, prompt_token_ids=[1], sampling=params, output_token_ids=tokens[:brought])
    stream.start(submit, 3, readers, states)
    for sample in stream.samples:
        for start in range(brought, len(tokens), 999):
            sample.append(TokenDelta(0, sample.index, tokens[start : start + 999], None, None))
            sample.remember()
        stream.end(sample, FINISH)
    stream.close(7.0)
    pieces, steps = built(stream, new_reader)
    message = msgspec.msgpack.decode(b"".join(pieces)[4:], type=ServerMessage)
    assert message == msgspec.msgpack.decode(pack((stream.last(new_reader),))[4:], type=ServerMessage)
    end = message.samples[1]
    assert bool(end.parts) == ("[" in said)
    counted = sum(part.num_tokens for part in end.parts)  # with those of a call whose first tokens were brought
    assert not end.parts or len(tokens) - brought <= counted <= len(tokens)
    assert max(steps) <= CHUNK_PARTS
    assert is_long(stream)
    assert message.samples[0].broken_calls == ([500] if said.endswith("wind") else [])


def test_an_answer_that_a_stop_string_cut(tokenizer):
    stream, detokenizer = ended(random.Random(1), tokenizer, num_tokens=9000, stop=["a€b"])
    message = msgspec.msgpack.decode(b"".join(built(stream, detokenizer)[0])[4:], type=ServerMessage)
    assert message == msgspec.msgpack.decode(pack((stream.last(detokenizer),))[4:], type=ServerMessage)
    assert (message.samples[0].finish_reason, message.samples[0].stop) == ("stop", "a€b")


def test_which_records_are_long(tokenizer):
    def stream(**given):
        return ended(random.Random(0), tokenizer, **given)[0]

    assert not is_long(stream(num_tokens=ONE_PIECE_TOKENS))
    assert is_long(stream(num_tokens=ONE_PIECE_TOKENS // 4 + 1, n=4))
    assert is_long(stream(num_tokens=500, logprobs=20))
    apart = stream(num_tokens=ONE_PIECE_TOKENS // 4)
    apart.apart = True
    assert not is_long(apart)
    apart = stream(num_tokens=ONE_PIECE_TOKENS // 4 + 1)
    apart.apart = True
    assert is_long(apart)
    read = stream(num_tokens=9000)
    read.deltas = True
    assert not is_long(read)
    failed = stream(num_tokens=9000)
    failed.error = Interrupted("it stops")
    assert not is_long(failed)


LONG = SamplingParams(max_tokens=2000, n=16, logprobs=20, ignore_eos=True)


@asynccontextmanager
async def half_sent(house, peer, cores):
    """A connection that takes nothing, with a record of 10 MB on its way."""
    entry = TokenLogprobs(1, -1.0 / 3, list(range(100, 120)), [-1.0 / 3] * 20)
    cores.now.logprobs = lambda sequence, token_ids: [entry] * len(token_ids) if token_ids else None
    peer.writer.transport.pause_reading()
    peer.say(Generate(stream=1, token_ids=[0], sampling=LONG, deltas=False))
    await until(lambda: house.frontend.outlets.num_sending)
    yield
    peer.writer.transport.resume_reading()


def test_others_go_on_beside_a_long_record(run, serving, peering, cores):
    """What comes on the same connection waits for the record's end; other connections feel nothing."""

    async def body():
        async with serving(cores=cores) as house, peering(house) as peer, half_sent(house, peer, cores):
            connection = next(iter(house.frontend.streams._sinks))
            assert (
                connection._transport.get_write_buffer_size() < PIECE_BYTES + house.server.config.high_water_bytes
            )
            peer.say(Ping(stream=9))
            peer.say(generate(max_tokens=50))
            async with peering(house) as other:
                other.say(generate(max_tokens=500))
                assert (await other.hear_until(Final)).samples[0].output_tokens == 500
            assert house.frontend.outlets.num_sending
            peer.writer.transport.resume_reading()
            long, pong = await peer.hear(), await peer.hear()
            assert [len(end.logprobs) for end in long.samples] == [2000] * 16
            assert pong == Pong(stream=9)
            assert (await peer.hear_until(Final)).samples[0].output_tokens == 50
            assert not house.frontend.outlets.num_sending

    run(body(), 15.0)


def test_a_reader_that_stops_within_a_record_loses_its_connection(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores, slow_reader_s=0.1) as house, peering(house) as peer:
            async with half_sent(house, peer, cores):
                await until(lambda: not house.server._connections)
            assert not house.frontend.outlets.num_sending
            assert await peer.hear() is None

    run(body(), 15.0)


def test_a_drain_waits_for_the_end_of_a_long_record(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores) as house, peering(house) as peer, half_sent(house, peer, cores):
            house.frontend.drain()
            waiting = asyncio.ensure_future(house.frontend.drained())
            async with peering(house) as other:
                other.say(Ping(stream=1))
                await other.hear()
            assert not waiting.done()
            peer.writer.transport.resume_reading()
            assert len((await peer.hear()).samples) == 16
            await waiting

    run(body(), 15.0)


def test_an_interrupt_does_not_wait_for_a_long_record(run, serving, peering, cores):
    async def body():
        async with (
            serving(cores=cores, drain_s=0.05, slow_reader_s=3600.0) as house,
            peering(house) as peer,
            half_sent(house, peer, cores),
        ):
            house.frontend.drain()
            await house.frontend.drained()

    run(body(), 15.0)


def test_an_interrupt_tells_whoever_waits_behind_a_long_record(run, serving, peering, cores):
    async def body():
        async with serving(cores=cores) as house, peering(house) as peer, half_sent(house, peer, cores):
            peer.say(generate(2, max_tokens=300, logprobs=20, deltas=False))
            peer.say(generate(3, max_tokens=5, deltas=False))
            await until(lambda: house.frontend.counters.finished == 3)
            house.frontend.interrupt()
            peer.writer.transport.resume_reading()
            assert isinstance(await peer.hear(), Final)
            ends = [await peer.hear() for _ in range(2)]
            assert sorted((end.stream, end.code) for end in ends) == [(2, "interrupted"), (3, "interrupted")]

    run(body(), 15.0)


def test_whole_answers_that_end_together_leave_in_turns(run, serving, peering, cores, monkeypatch):
    given, inner = [], Outlets._take_turn

    def counted(self):
        before = self._streams.num_read
        inner(self)
        given.append(before - self._streams.num_read)

    monkeypatch.setattr(Outlets, "_take_turn", counted)
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, peering(house) as peer:
            for stream in range(100):
                peer.say(generate(stream, max_tokens=1000, ignore_eos=True, deltas=False))
            await cores.until(lambda: len(cores.now.submits) == 100)
            cores.go_on()
            for _ in range(100):
                await peer.hear_until(Final)
            assert sum(given) == 100
            assert max(given) <= TURN_TOKENS // 1000 + 1

    run(body())
