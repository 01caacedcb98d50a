"""Deltas of one turn in one frame, for who has the feature "batches"."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams import answer, generate, until

from cierzo.engine.frontend.frames import BATCH_DELTAS, in_batches
from cierzo.engine.messages import Delta, Deltas, Final, Hello, Ping, Pong

MESSAGES = st.one_of(
    st.builds(Delta, stream=st.integers(0, 9), token_ids=st.lists(st.integers(0, 9), max_size=2)),
    st.builds(Ping, stream=st.integers(0, 9)),
)


@given(st.lists(MESSAGES, max_size=20))
def test_batches_hold_the_same_messages_in_the_same_order(messages):
    found = [*in_batches(messages)]
    assert [each for one in found for each in (one.deltas if isinstance(one, Deltas) else [one])] == messages
    kinds = [isinstance(message, Delta | Deltas) for message in found]
    assert not any(first and second for first, second in pairwise(kinds))  # all that can be are
    assert all(len(one.deltas) > 1 for one in found if isinstance(one, Deltas))


@pytest.mark.parametrize("count", [BATCH_DELTAS - 1, BATCH_DELTAS, BATCH_DELTAS + 1, 3 * BATCH_DELTAS])
def test_a_batch_is_bounded(count):
    deltas = [Delta(stream=number) for number in range(count)]
    found = [*in_batches(deltas)]
    sizes = [len(one.deltas) if isinstance(one, Deltas) else 1 for one in found]
    assert sizes == [min(BATCH_DELTAS, count - start) for start in range(0, count, BATCH_DELTAS)]


@pytest.mark.parametrize("is_granted", [True, False])
def test_deltas_of_a_step_come_together(run, serving, peering, cores, is_granted):
    async def body():
        hello = Hello(client="test", features=["batches"] if is_granted else [])
        async with serving(cores=cores) as house, peering(house, hello) as peer:
            cores.free = False
            for stream in (1, 2, 3):
                peer.say(generate(stream, max_tokens=4))
            await until(lambda: len(cores.now.submits) == 3)
            cores.go_on()
            heard, tokens = [], {1: [], 2: [], 3: []}
            while len([one for one in heard if isinstance(one, Final)]) < 3:
                heard.append(await peer.hear_frame())
            batches = [message for message in heard if isinstance(message, Deltas)]
            assert bool(batches) == is_granted
            for message in heard:
                for delta in message.deltas if isinstance(message, Deltas) else [message]:
                    if isinstance(delta, Delta):
                        tokens[delta.stream] += delta.token_ids
            assert list(tokens.values()) == [answer(4)] * 3
            peer.say(Ping(stream=5))
            assert await peer.hear() == Pong(stream=5)

    run(body())
