"""The search for streams that kill cores: against simulated cores, and 200 streams through a front end."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from streams import final_of, tokens_of

from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.recovery import LIFE_TOKENS, MAX_DEATHS, Recovery

MANY_DEATHS = 1000


@dataclass
class World:
    """Streams that want `goal` tokens, and cores that die when stream k makes token `killers[k]`.

    A stream makes its first token on a core after `delay` turns. Who is told to fail is in `failed`.
    """

    killers: dict[int, int]
    goal: int = 12
    delay: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)
    core: dict[int, int] = field(default_factory=dict)  # stream -> turns until it makes a token
    deaths: int = 0
    recovery: Recovery[int] = field(default_factory=Recovery)

    def arrive(self, stream: int) -> None:
        self.tokens[stream] = 0
        assert self.recovery.may_go(stream)
        self.send([stream])

    def send(self, streams: list[int]) -> None:
        for stream in streams:
            assert stream in self.tokens
            assert stream not in self.core, "sent twice"
            self.core[stream] = self.delay.get(stream, 0)
            self.recovery.sent(stream, 1)
        while due := self.recovery.due():
            self.send(due)

    def leave(self, stream: int) -> None:
        """A stream ends, whoever ends it."""
        del self.tokens[stream]
        self.core.pop(stream, None)
        self.recovery.ended(stream)
        self.send([])

    def die(self) -> None:
        self.deaths += 1
        assert self.deaths < MANY_DEATHS
        self.core.clear()
        found = self.recovery.died()
        if found is not None:
            self.failed.append(found)
            del self.tokens[found]
            self.recovery.ended(found)
        self.send(self.recovery.restart(self.tokens))
        missing = set(self.tokens) - set(self.core)
        assert self.recovery.searching or not missing

    def turn(self) -> None:
        """A step: one token of each stream whose prompt is done; nothing of it counts if the core dies."""
        ready = [stream for stream, left in self.core.items() if left == 0]
        self.core = {stream: max(0, left - 1) for stream, left in self.core.items()}
        if any(self.tokens[stream] == self.killers.get(stream) for stream in ready):
            self.die()
            return
        for stream in ready:
            self.tokens[stream] += 1
            ended = self.tokens[stream] == self.goal
            if self.recovery.made(stream, 1, ended=ended):
                self.send([])
            if ended:
                self.leave(stream)

    def finish(self) -> None:
        for _ in range(10_000):
            if not self.tokens:
                return
            self.turn()
        raise AssertionError(f"{len(self.tokens)} streams never end")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 200])
@pytest.mark.parametrize("place", [0, 1, 5])
def test_a_killer_is_found_within_a_few_deaths_and_nobody_else_fails(count, place):
    for killer in {0, count // 2, count - 1}:
        world = World({killer: place})
        for stream in range(count):
            world.arrive(stream)
        world.finish()
        assert world.failed == [killer]
        halvings = (count - 1).bit_length()
        assert world.deaths <= 2 + halvings + MAX_DEATHS


def test_two_killers_at_once_are_both_found():
    for first in range(0, 20, 3):
        for second in range(first + 1, 20, 4):
            world = World({first: 0, second: first % 5})
            for stream in range(20):
                world.arrive(stream)
            world.finish()
            assert sorted(world.failed) == [first, second]
            assert world.deaths <= 2 * (2 + 5 + MAX_DEATHS)


def test_a_killer_that_comes_while_another_is_searched_blames_no_bystander():
    for when in range(12):
        world = World({5: 0, 100: 0, 101: 4})
        for stream in range(16):
            world.arrive(stream)
        for turn in range(40):
            if turn == when:
                world.arrive(100)
                world.arrive(101)
            world.arrive(200 + turn)  # there are always new ones
            world.turn()
        world.finish()
        assert sorted(world.failed) == [5, 100, 101]


@pytest.mark.parametrize("seed", range(60))
def test_whatever_comes_killers_fail_and_nobody_else(seed):
    """Arrivals, slow prompts, cancels and some killers, at random: exactly the killers that stay fail."""
    chance = random.Random(seed)
    killers = {stream: chance.randrange(10) for stream in range(60) if chance.random() < 0.06}
    world = World(killers, delay={stream: chance.randrange(12) for stream in range(60) if chance.random() < 0.2})
    arrived, cancelled = 0, set()
    while arrived < 60:
        for _ in range(chance.randrange(4)):
            if arrived < 60:
                world.arrive(arrived)
                arrived += 1
        if world.tokens and chance.random() < 0.2:
            cancelled.add(stream := chance.choice([*world.tokens]))
            world.leave(stream)
        world.turn()
    world.finish()
    assert set(world.failed) == set(killers) - cancelled


@pytest.mark.parametrize("seed", range(60))
def test_kills_from_outside_fail_nobody(seed):
    """A kill every few turns, often before anybody has shown life, but never MAX_DEATHS + 1 times in a row."""
    chance = random.Random(seed)
    world = World({}, delay={stream: chance.randrange(6) for stream in range(40)})
    in_a_row = 0
    for stream in range(40):
        world.arrive(stream)
        world.turn()
        early = bool(world.recovery._lifeless)
        if chance.random() < 0.4 and not (early and in_a_row == MAX_DEATHS):
            in_a_row = in_a_row + 1 if early else 0
            world.die()
        elif not world.recovery._lifeless:
            in_a_row = 0
    world.finish()
    assert world.failed == []


def test_kills_from_outside_beside_a_killer():
    for seed in range(40):
        chance = random.Random(seed)
        world = World({7: 3})
        for stream in range(30):
            world.arrive(stream)
        quiet = 0
        while world.tokens:
            quiet += 1
            if quiet > 25 and chance.random() < 0.1:
                quiet = 0
                world.die()
            world.turn()
        assert world.failed == [7]


def test_a_lone_suspect_has_as_many_chances_as_the_rule_says():
    recovery: Recovery[str] = Recovery()
    recovery.sent("x", 1)
    assert recovery.died() is None
    assert recovery.restart("x") == ["x"]  # a death alone says nothing
    recovery.sent("x", 1)
    assert recovery.died() is None
    for _ in range(MAX_DEATHS - 1):
        assert recovery.searching
        assert recovery.restart("x") == []
        assert recovery.due() == ["x"]
        assert recovery.due() == []
        recovery.sent("x", 1)
        found = recovery.died()
    assert found == "x"
    assert not recovery.searching


def test_who_makes_some_tokens_on_every_core_is_no_suspect():
    """A killer dies at the same place; kills from outside, one token apart, are no proof, however many."""
    recovery: Recovery[str] = Recovery()
    for number in range(1, 20):
        for stream in [*recovery.restart("x"), *recovery.due()]:
            recovery.sent(stream, 1)
        assert recovery.made("x", 1, ended=False) is (number % LIFE_TOKENS == 0)
        assert recovery.died() is None


def test_suspects_follow_when_the_others_have_shown_life():
    recovery: Recovery[str] = Recovery()
    for _ in range(2):
        for stream in "abcd":
            recovery.sent(stream, 2)
        recovery.died()
        assert recovery.restart("abcd") == ([] if recovery.searching else [*"abcd"])
    assert recovery.group == [*"ab"]
    recovery.sent("new", 1)
    assert recovery.due() == [*"ab"]  # nobody is there who must show life first
    for stream in "ab":
        recovery.sent(stream, 2)
    recovery.died()
    assert recovery.restart([*"abcd", "new"]) == ["new"]
    assert recovery.due() == []  # first the new one
    recovery.sent("new", 1)
    recovery.made("new", LIFE_TOKENS, ended=False)
    assert recovery.due() == ["a"]
    recovery.sent("a", 2)
    assert not recovery.made("a", LIFE_TOKENS, ended=False)
    assert recovery.made("a", LIFE_TOKENS, ended=False)
    assert recovery.due() == ["b"]
    recovery.sent("b", 2)
    recovery.made("b", 0, ended=True)
    assert not recovery.made("b", 1, ended=False)  # of two samples, one
    recovery.ended("b")
    assert recovery.due() == [*"cd"]
    recovery.ended("c")
    recovery.sent("d", 1)
    recovery.made("d", LIFE_TOKENS, ended=False)
    assert not recovery.searching


def test_200_streams_come_back_at_once_and_new_ones_join(run, serving, cores):
    """The new core has all of them, in order of arrival, before it makes its first step."""
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            arguments = {"max_tokens": 20, "seed": 0}
            streams = [client.generate(token_ids=[i], **arguments) for i in range(200)]
            await cores.until(lambda: len(cores.now.submits) == 200)
            for _ in range(5):
                cores.now.step()
            for stream in streams:
                await anext(stream)
            cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 2 and len(cores.now.submits) == 200)
            new = client.generate(token_ids=[200], **arguments)
            await cores.until(lambda: len(cores.now.submits) == 201)
            got = [(submit.prompt_token_ids, len(submit.output_token_ids)) for submit in cores.now.submits]
            assert got == [([i], 5) for i in range(200)] + [([200], 0)]
            cores.go_on()
            for i, stream in enumerate([*streams, new]):
                tokens = await tokens_of(stream)
                assert tokens[-5:] == [(i + 7 * position) % 256 for position in range(15, 20)]
            assert not house.frontend.core._recovery.searching

    run(body())


def test_held_streams_keep_their_deadlines_and_can_be_cancelled(run, serving, cores, clock):
    cores.free = False

    async def body():
        async with (
            serving(cores=cores, clock=clock, max_core_restarts=2) as house,
            await Client.connect(house.address) as client,
        ):
            streams = [client.generate(token_ids=[i], max_tokens=9, deadline_s=500.0) for i in range(3)]
            timed = client.generate(token_ids=[3], max_tokens=9, deadline_s=0.05)
            for life in (1, 2):
                await cores.until(lambda life=life: len(cores.lives) == life and len(cores.now.submits) == 4)
                cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 3 and len(cores.now.submits) == 2)
            streams[2].cancel()
            assert (await final_of(streams[2])).samples[0].finish_reason == "cancelled"
            clock.now += 1
            assert (await final_of(timed)).samples[0].finish_reason == "deadline"
            assert len(house.frontend.streams) == 2
            assert house.frontend.core._recovery.searching
            cores.go_on()
            for stream in streams[:2]:
                await final_of(stream)
            assert not house.frontend.core._recovery.searching

    run(body())
