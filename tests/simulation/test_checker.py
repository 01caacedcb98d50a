"""The checker's own rules, on histories written by hand."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any, cast

from cierzo.bench.virtual import VirtualClock, VirtualLoop
from cierzo.engine.frontend.config import FrontendConfig
from simulation.checker import Checker, costs
from simulation.history import Attempt, Body, History, Request
from simulation.link import Line
from simulation.network import Wire
from simulation.peer import Peer

COST = {"computed_tokens": 5, "recomputed_tokens": 1, "steps": 3, "preemptions": 0, "kv_block_s": 0.5}


def history(*ends: Body | None) -> History:
    """One request that was tried so often; None is a connection that was lost."""
    request = Request(0, {"token_ids": [2], "sampling": {}})
    for end in ends:
        attempt = Attempt(request, "generate", 1, 0, frozenset(), 0.0, [[]], [""], [""], [[]], [[]], end=end)
        attempt.lost_s = 1.0 if end is None else None
        request.attempts.append(attempt)
    return History(requests=[request])


def final(**fields: object) -> Body:
    told = {"samples": [{"sample": 0, "finish_reason": "length", "output_tokens": 3}], "usage": {}, "timings": {}}
    return {"type": "final", **told, "seed": 1, "cost": COST, **fields}


def refusal(code: str) -> Body:
    return {"type": "error", "code": code}


def test_a_request_costs_what_its_final_says_whatever_came_after():
    assert costs(history(final())) == COST
    assert costs(history(None, final(), refusal("overloaded"))) == COST
    assert costs(history(final(), refusal("not_found"))) == COST
    assert costs(history(final(), final(cost=None))) == COST


def test_a_request_that_was_refused_costs_nothing():
    told = costs(history(refusal("overloaded"), refusal("draining")))
    assert told is not None
    assert not any(told.values())


def test_what_a_request_cost_that_ended_for_nobody_is_not_known():
    assert costs(history(None)) is None
    assert costs(history(None, refusal("not_found"))) is None
    assert costs(history(None, refusal("overloaded"))) is None
    assert costs(history(refusal("slow_reader"))) is None
    assert costs(history(final(cost=None))) is None


def wrongs_of(*ends: Body) -> list[str]:
    """What is wrong with these ends of one request, of which cores told 5 computed tokens."""
    told, link = history(*ends), SimpleNamespace(deaths=[0.0], computed={(2,): 5})
    checker = Checker(told, cast(Any, link), FrontendConfig(), cast(Any, None))
    checker._once(told.requests[0])
    return checker.wrongs


def test_all_readers_of_a_request_are_told_one_end():
    other = {"sample": 0, "finish_reason": "cancelled", "output_tokens": 3}
    assert not wrongs_of(final(), final(cost=None))
    assert "ended as" in wrongs_of(final(), final(samples=[other]))[0]
    assert "ended as" in wrongs_of(final(), final(seed=2))[0]


def test_a_final_costs_what_cores_told():
    dear = {**COST, "computed_tokens": 6}
    assert "cost 6 computed tokens" in wrongs_of(final(cost=dear))[0]
    for reason, stop in (("cancelled", None), ("deadline", None), ("stop", "text")):  # the core's word may be late
        sample = {"sample": 0, "finish_reason": reason, "output_tokens": 3, "stop": stop}
        assert not wrongs_of(final(cost=dear, samples=[sample]))


def test_a_request_may_be_forgotten_since_the_last_attempt_that_surely_came():
    """Two connections were lost, the second as soon as it had asked: the server may not have heard of that."""
    for second_was_heard, end_s, may_be in ((False, 10.0, True), (True, 10.0, False), (False, 5.0, False)):
        told = history(None, None, refusal("not_found"))
        first, second, last = told.requests[0].attempts
        for attempt in told.requests[0].attempts:
            attempt.kind = "resume"
        first.accepted, second.accepted = {"type": "accepted"}, {"type": "accepted"} if second_was_heard else None
        first.lost_s, second.lost_s, last.end_s = 4.0, 9.9, end_s
        link = SimpleNamespace(has_failed=False, stalls=[], withdrawals={(2,): 0})
        checker = Checker(told, cast(Any, link), FrontendConfig(orphan_s=10.0), cast(Any, None))
        checker._error(second, last)
        assert bool(checker.wrongs) is not may_be


def test_a_key_may_name_a_stream_that_its_reader_was_too_slow_for():
    for first, is_wrong in ((refusal("slow_reader"), False), (None, True)):
        told = history(first, refusal("slow_reader"))
        link = SimpleNamespace(has_failed=False, stalls=[], withdrawals={(2,): 0})
        checker = Checker(told, cast(Any, link), FrontendConfig(), cast(Any, None))
        before, last = told.requests[0].attempts
        checker._error(before, last)
        assert bool(checker.wrongs) is is_wrong


def test_times_do_not_count_while_a_link_is_frozen():
    """Also for what was sent before; of other connections they do."""

    async def freeze_one() -> None:
        server = cast(Any, SimpleNamespace(_connection=asyncio.Protocol))
        peers = [Peer(Wire(random.Random(0), server, number, 3000), History(), ()) for number in range(2)]
        attempts = [peer.start(history().requests[0], {"type": "generate"}, "generate") for peer in peers]
        for attempt in attempts:
            attempt.disturbed = False  # as on a wide link
        peers[0].wire.freeze(True)
        assert [attempt.disturbed for attempt in attempts] == [True, False]
        for peer in peers:
            peer.wire.reset()
            await peer.task

    loop = VirtualLoop(VirtualClock(0.0))
    loop.run_until_complete(freeze_one())
    loop.close()


def test_a_line_keeps_the_order_of_what_arrives_at_one_moment():
    async def send_at_once() -> list[tuple[float, int]]:
        arrived: list[tuple[float, int]] = []
        line, loop = Line(), asyncio.get_running_loop()
        for number in range(20):
            line.put(10.0 - (number > 10), lambda number=number: arrived.append((loop.time(), number)))
        await asyncio.sleep(11.0)
        return arrived

    loop = VirtualLoop(VirtualClock(0.0))
    arrived = loop.run_until_complete(send_at_once())
    loop.close()
    assert [number for _, number in arrived] == [*range(20)]
    assert all(at_s >= 10.0 for at_s, _ in arrived)
