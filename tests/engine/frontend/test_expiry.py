"""Things that are due after a while."""

from __future__ import annotations

import asyncio
import time
from statistics import median

from cierzo.engine.frontend.expiry import Expiry


def test_each_is_due_once_in_order_unless_it_was_discarded_or_added_anew(run):
    async def body():
        now, due = [0.0], []
        expiry = Expiry(10.0, lambda: now[0], due.append)
        for now[0] in (0.0, 1.0, 2.0, 3.0):
            expiry.add(now[0])
        expiry.discard(1.0)
        now[0] = 5.0
        expiry.add(0.0)
        for now[0], expected in ((9.9, []), (12.0, [2.0]), (14.9, [2.0, 3.0]), (15.0, [2.0, 3.0, 0.0])):
            expiry._fire()
            assert due == expected
        assert len(expiry) == 0
        expiry.close()

    run(body())


def test_what_is_added_or_discarded_meanwhile_waits_or_is_left_out(run):
    async def body():
        due = []

        def took(thing):
            due.append(thing)
            expiry.add(thing)
            expiry.discard("c")

        expiry = Expiry(0.0, lambda: 0.0, took)
        for thing in "abc":
            expiry.add(thing)
        expiry._fire()
        assert due[:2] == ["a", "b"]
        assert "c" not in due
        assert len(due) <= 3  # and not for ever
        expiry.close()

    run(body())


def _filled(count, clock):
    expiry = Expiry(1.0, lambda: clock[0], lambda thing: None)
    for number in range(count):
        clock[0] = number / count
        expiry.add(number)
    return expiry


def test_the_timer_does_not_look_at_all_that_wait(run):
    """A server keeps a minute of answers: 60,000 of them, at a thousand a second."""

    async def body():
        def seconds(count):
            clock, took = [0.0], []
            expiry = _filled(count, clock)
            for number in range(200):  # as many come as go
                clock[0] = 1.0 + number / count
                expiry.add(count + number)
                began = time.perf_counter()
                expiry._fire()
                took.append(time.perf_counter() - began)
            expiry.close()
            return median(took)

        assert seconds(200_000) < 20 * seconds(1_000)

    run(body())


def test_many_that_are_due_at_once_take_a_constant_each(run):
    async def body():
        def seconds_each(count):
            clock = [0.0]
            expiry = _filled(count, clock)
            clock[0], began = 3.0, time.perf_counter()
            expiry._fire()
            assert len(expiry) == 0
            expiry.close()
            return (time.perf_counter() - began) / count

        assert seconds_each(100_000) < 20 * seconds_each(1_000)

    run(body())


def test_what_is_added_anew_meanwhile_does_not_delay_the_others(run):
    async def body():
        due, began = [], time.monotonic()

        def took(thing):
            due.append((thing, time.monotonic() - began))
            if len(due) == 1:
                expiry.add(thing)

        expiry = Expiry(0.2, time.monotonic, took)
        expiry.add("a")
        await asyncio.sleep(0.05)
        expiry.add("b")
        async with asyncio.timeout(5.0):
            while len(due) < 3:
                await asyncio.sleep(0.005)
        assert [thing for thing, _ in due] == ["a", "b", "a"]
        assert due[1][1] < due[2][1] - 0.1

    run(body())


def test_the_loop_calls_when_it_is_time(run):
    async def body():
        due = []
        expiry = Expiry(0.02, time.monotonic, due.append)
        expiry.add(1)
        await asyncio.sleep(0.01)
        expiry.add(2)
        assert due == []
        async with asyncio.timeout(5.0):
            while due != [1, 2]:
                await asyncio.sleep(0.005)

    run(body())
