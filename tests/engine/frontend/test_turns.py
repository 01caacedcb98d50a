"""Turns at the event loop: bounded together, in order, and input waits meanwhile."""

from __future__ import annotations

import asyncio

from cierzo.engine.frontend.turns import SLICE_S, TURN_S, Turns


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Worker:
    """Needs so many milliseconds, one at a time."""

    def __init__(self, turns: Turns, clock: Clock, name: str, needs_ms: int, log: list[str]) -> None:
        self.turns, self.clock, self.name, self.left, self.log = turns, clock, name, needs_ms, log

    def work(self, until: float) -> bool:
        while self.left:
            self.left -= 1
            self.clock.now += 0.001
            self.log.append(self.name)
            if self.clock.now >= until:
                break
        return self.left > 0

    def hold(self) -> None:
        self.log.append(f"{self.name} waits")

    def release(self) -> None:
        self.log.append(f"{self.name} goes on")


def test_a_turn_is_bounded_over_all_workers_and_the_rest_takes_turns(run):
    async def body():
        clock, log = Clock(), []
        turns = Turns(clock)
        first, second, third = (Worker(turns, clock, name, ms, log) for name, ms in (("a", 7), ("b", 3), ("c", 1)))
        for worker in (first, second, third):
            turns.enter(worker)
        assert round(clock.now, 6) == TURN_S
        assert log == ["a"] * 5 + ["a waits", "b waits", "c waits"]
        log.clear()
        await asyncio.sleep(0)  # one turn of the loop
        assert SLICE_S == 0.001
        assert log == ["a", "b", "c", "c goes on", "a", "a goes on", "b"]
        log.clear()
        await asyncio.sleep(0)
        assert log == ["b", "b goes on"]
        await asyncio.sleep(0)

    run(body())


def test_who_comes_while_others_wait_comes_after_them(run):
    async def body():
        clock, log = Clock(), []
        turns = Turns(clock)
        turns.enter(Worker(turns, clock, "a", 12, log))
        await asyncio.sleep(0)
        turns.enter(Worker(turns, clock, "b", 1, log))
        assert log[-1] == "b waits"
        for _ in range(3):
            await asyncio.sleep(0)
        assert log.count("b") == 1
        assert log.count("a") == 12

    run(body())
