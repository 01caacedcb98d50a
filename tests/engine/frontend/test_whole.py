"""Long final records: built in steps, sent in pieces, and the same as in one."""

from __future__ import annotations

import random

import msgspec
import pytest

from cierzo.engine.errors import Interrupted
from cierzo.engine.frontend.detok import Detokenizer
from cierzo.engine.frontend.frames import pack
from cierzo.engine.frontend.stream import Stream
from cierzo.engine.frontend.whole import CHUNK_TOKENS, ONE_PIECE_TOKENS, PIECE_BYTES, build, cut, is_long
from cierzo.engine.messages import (
    Delta,
    Final,
    Finish,
    Generate,
    Hello,
    Ping,
    Pong,
    SamplingParams,
    ServerMessage,
    Submit,
    TokenDelta,
    TokenLogprobs,
)

FINISH = Finish("length", "", None, 3, 0, 0, 0, 0.0, 0.1, 0.2)


class Sink:
    features = frozenset(["accounting"])
    is_paused = False


def ended(rng, tokenizer, *, num_tokens, n=1, brought=0, stop=(), logprobs=None):
    """A stream whose samples have so many tokens, of all lengths of characters and of none."""
    params = SamplingParams(n=n, stop=list(stop), logprobs=logprobs, seed=3)
    stream = Stream(0, 2**40, Sink(), False, n, 0, 5.0, 99.0)

    def detokenizer(_):
        return Detokenizer(tokenizer, tuple(stop))

    data = "".join(rng.choices("abc €𝄞é", k=num_tokens + brought)).encode()
    before, rest = list(data[:brought]), list(data[brought : brought + num_tokens])
    submit = Submit(request_id=0, prompt_token_ids=[1], sampling=params, output_token_ids=before)
    stream.start(submit, 3, [detokenizer(params) for _ in range(n)])
    for sample in stream.samples:
        for start in range(0, num_tokens, 999):
            part = rest[start : start + 999]
            tops = [[rng.randrange(2**17) for _ in range(logprobs or 0)] for _ in part]
            entries = [TokenLogprobs(t, -rng.random(), top, [-1.0] * len(top)) for t, top in zip(part, tops)]
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
    read = stream(num_tokens=9000)
    read.deltas = True
    assert not is_long(read)
    failed = stream(num_tokens=9000)
    failed.error = Interrupted("it stops")
    assert not is_long(failed)


def test_others_go_on_beside_a_long_record(run, serving, peering, cores):
    """Frames of the same connection wait for the record's end; those of another connection do not."""

    async def body():
        async with serving(cores=cores, high_water_bytes=1) as house, peering(house, Hello()) as peer:
            peer.say(Generate(stream=1, token_ids=[0], sampling=SamplingParams(max_tokens=20), deltas=False))
            small = await peer.hear()
            assert len(small.samples[0].token_ids) == 20
            sampling = SamplingParams(max_tokens=4000, n=4, logprobs=1)
            peer.say(Generate(stream=1, token_ids=[0], sampling=sampling, deltas=False))
            peer.say(Generate(stream=2, token_ids=[0], sampling=SamplingParams(max_tokens=4090)))
            while house.frontend.streams.num_read or not house.frontend.counters.finished == 3:
                async with peering(house) as other:
                    other.say(Ping(stream=7))
                    assert isinstance(await other.hear(), Pong)
                if house.frontend.outlets.num_sending:
                    break
            peer.say(Ping(stream=9))
            heard = [await peer.hear()]
            while sum(not isinstance(message, Delta) for message in heard) < 3:
                heard.append(await peer.hear())
            long, short = [message for message in heard if isinstance(message, Final)]
            if long.stream == 2:
                long, short = short, long
            assert [len(end.token_ids) for end in long.samples] == [4000] * 4
            assert [len(end.logprobs) for end in long.samples] == [4000] * 4
            assert sum(len(m.token_ids) for m in heard if isinstance(m, Delta)) == 4090
            assert house.frontend.outlets.num_sending == 0

    run(body())
