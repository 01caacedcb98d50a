"""Ends that the front end owes its clients while the core hears and says nothing, and pauses of streams."""

from __future__ import annotations

import asyncio
import time

import pytest
from streams import final_of

from cierzo.engine.errors import CoreStalled
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.core_side import CoreSide
from cierzo.engine.frontend.registry import Registry
from cierzo.engine.frontend.stream import Stream
from cierzo.engine.frontend.tenancy import Tenancy
from cierzo.engine.frontend.tenants import EVERYBODY
from cierzo.engine.messages import Abort, Finish, SamplingParams, StepOutput, Submit, TokenDelta


class Owner:
    """Ends streams as the `Frontend` does, and notes how."""

    def __init__(self, streams):
        self.streams = streams
        self.side = None
        self.ends = []

    def deliver(self, stream, delta):
        if not (sample := stream.samples[delta.sample]).cut:
            sample.take(delta)
        if delta.finish is not None and stream.end(stream.samples[delta.sample], delta.finish):
            self.finish(stream)

    def end(self, stream, reason, message=""):
        stream.end_all(reason, 0.0, message)
        self.finish(stream)

    def finish(self, stream):
        self.ends.append((stream.request_id, stream.samples[0].finish.reason, asyncio.get_running_loop().time()))
        self.streams.close(stream)
        self.side.forget(stream)


class Link:
    """Takes commands, and answers none."""

    def __init__(self):
        self.commands = []

    def send(self, command):
        self.commands.append(command)

    def forgive(self):
        raise AssertionError("there is nothing to forgive")


class Bench:
    """A core's side alone, on the loop's clock."""

    def __init__(self):
        clock = asyncio.get_running_loop().time
        self.link, self.streams = Link(), Registry(Tenancy(FrontendConfig(), clock))
        self.owner = Owner(self.streams)
        self.side = self.owner.side = CoreSide(FrontendConfig(), self.link, self.streams, self.owner, clock)
        self.side.ready()
        self.features = frozenset()  # it is its own sink
        self.access, self.peer = EVERYBODY, "a test"
        self.streams.connect(self)

    def open(self, number, deadline_s=60.0, submitted=True, **sampling):
        now = asyncio.get_running_loop().time()
        stream = Stream(number, number, self, True, sampling.get("n", 1), 0, now, now + deadline_s)
        self.streams.open(stream)
        self.side.opened(stream)
        if submitted:
            params = SamplingParams(seed=1, **sampling)
            submit = Submit(request_id=number, prompt_token_ids=[1, 2, 3], sampling=params)
            stream.start(submit, 3, [None] * params.n)
            self.side.submit(stream)
        return stream

    async def until_ended(self, count):
        """Wait until so many streams have ended; how and when, in seconds from the call."""
        began = asyncio.get_running_loop().time()
        while len(self.owner.ends) < count:
            await asyncio.sleep(0.001)
        return [(number, reason, round(at - began, 3)) for number, reason, at in self.owner.ends]


def test_a_deadline_is_kept_whatever_the_core_does(run):
    async def body():
        bench = Bench()
        bench.open(0, deadline_s=0.06)
        bench.open(1, deadline_s=0.03, submitted=False)  # still being encoded: nobody is asked
        (_, _, encoded_s), (_, _, run_s) = ends = await bench.until_ended(2)
        assert [end[:2] for end in ends] == [(1, "deadline"), (0, "deadline")]
        assert encoded_s >= 0.029
        assert run_s >= 0.069  # the core was asked at 60 ms, and had 10 ms
        assert run_s < 0.5
        assert bench.link.commands[1:] == [Abort(request_id=0, reason="deadline")]
        assert len(bench.streams) == 0
        assert not bench.side._timers

    run(body())


def test_a_cancel_is_answered_whatever_the_core_does(run):
    async def body():
        bench = Bench()
        stream = bench.open(0)
        assert bench.side.abort(stream, "cancelled")
        ((number, reason, after_s),) = await bench.until_ended(1)
        assert (number, reason) == (0, "cancelled")
        assert after_s >= 0.079
        assert after_s < 0.5

    run(body())


def test_a_core_that_answers_in_time_has_the_word(run):
    async def body():
        bench = Bench()
        stream = bench.open(0)
        bench.side.abort(stream, "cancelled")
        finish = Finish("cancelled", "", None, 3, 0, 0, 0, 0.1, 0.2, 0.0, 3, 0, 1, 0.5)
        bench.side.step(StepOutput(deltas=[TokenDelta(stream.run_id, 0, [], None, finish)]))
        assert [end[:2] for end in bench.owner.ends] == [(0, "cancelled")]
        assert (stream.cost.computed_tokens, stream.cost.kv_block_s) == (3, 0.5)
        await asyncio.sleep(0.1)  # the timer that was set finds nothing to end
        assert len(bench.owner.ends) == 1

    run(body())


def test_a_timer_of_an_earlier_run_ends_nothing(run):
    """The core dies after a stop string was found in one of two samples: the new core has one sample less."""

    async def body():
        bench = Bench()
        stream = bench.open(0, n=2)
        stream.samples[0].stop, stream.samples[0].cut = "STOP", True
        bench.side.abort(stream, "stop", stream.samples[0])
        bench.side.lost(True)
        assert stream.samples[0].finish.reason == "stop"
        bench.side.ready()
        assert [command.first_sample for command in bench.link.commands[-1:]] == [1]
        bench.side._unanswered(stream, 0, "cancelled", True)  # what a timer would do
        assert not bench.owner.ends

    run(body())


def test_a_stop_string_ends_its_sample_if_the_core_does_not(run, monkeypatch):
    monkeypatch.setattr("cierzo.engine.frontend.core_side.PATIENCE_S", {"stop": 0.01})

    async def body():
        bench = Bench()
        stream = bench.open(0)
        stream.samples[0].stop, stream.samples[0].cut = "STOP", True
        bench.side.abort(stream, "stop", stream.samples[0])
        assert [end[:2] for end in await bench.until_ended(1)] == [(0, "stop")]

    run(body())


def test_a_withdrawn_stream_goes_on_when_submitted_again(run):
    async def body():
        bench = Bench()
        stream = bench.open(0)
        bench.side.step(StepOutput(deltas=[TokenDelta(0, 0, [7, 8], None, None)]))
        stream.first_token_s = 0.1
        bench.side.withdraw(stream)
        assert bench.link.commands[-1] == Abort(request_id=0)
        late = [TokenDelta(0, 0, [9], None, None)]  # made before the core read the abort: made once more later
        finish = Finish("cancelled", "", None, 3, 3, 0, 1, 0.1, 0.2, 0.3, 6, 1, 4, 0.5)
        late.append(TokenDelta(0, 0, [], None, finish))
        bench.side.step(StepOutput(deltas=late))
        assert stream.samples[0].token_ids.tolist() == [7, 8]
        assert (stream.cost.computed_tokens, stream.cost.recomputed_tokens, stream.cost.steps) == (6, 1, 4)
        bench.side.lost(True)
        bench.side.ready()
        assert len(bench.link.commands) == 2  # it stays withdrawn, whatever becomes of the core
        bench.side.submit(stream)
        again = bench.link.commands[-1]
        assert (again.request_id, again.prompt_token_ids, again.output_token_ids) == (1, [1, 2, 3], [7, 8])
        end = Finish("length", "", None, 3, 3, 0, 0, 0.1, 0.2, 0.3, 5, 0, 1, 0.5)
        bench.side.step(StepOutput(deltas=[TokenDelta(1, 0, [9], None, end)]))
        assert stream.samples[0].token_ids.tolist() == [7, 8, 9]
        # the second run has computed 5 positions, of which 4 had been: 3 of the prompt, and the first token
        assert (stream.cost.computed_tokens, stream.cost.recomputed_tokens) == (11, 5)
        assert not bench.side._withdrawn

    run(body())


def test_a_withdrawn_stream_still_has_its_deadline(run):
    async def body():
        bench = Bench()
        bench.side.withdraw(bench.open(0, deadline_s=0.02))
        assert [end[:2] for end in await bench.until_ended(1)] == [(0, "deadline")]
        assert [type(command) for command in bench.link.commands] == [Submit, Abort]

    run(body())


def test_a_stalled_core_refuses_and_its_streams_wait(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            waiting = client.generate(token_ids=[1], max_tokens=5, seed=0)
            cancelled = client.generate(token_ids=[2], max_tokens=5)
            timed = client.generate(token_ids=[3], max_tokens=5, deadline_s=0.05)
            await cores.until(lambda: len(cores.now.submits) == 3)
            cores.now.deaf = True
            house.frontend.core.stalled(True)
            assert (await client.health()).state == "stalled"
            with pytest.raises(CoreStalled, match="no sign of life") as caught:
                await client.complete(token_ids=[1])
            assert caught.value.retry_after_s == 1.0
            cancelled.cancel()
            began = time.monotonic()
            assert (await final_of(cancelled)).samples[0].finish_reason == "cancelled"
            assert time.monotonic() - began < 1.0
            assert (await final_of(timed)).samples[0].finish_reason == "deadline"
            late = house.frontend.streams
            assert len(late) == 1
            cores.now.deaf = False
            house.frontend.core.stalled(False)
            assert (await client.health()).state == "ready"
            cores.go_on()
            assert (await final_of(waiting)).usage.output_tokens == 5
            cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 2 and cores.now.hello)
            house.frontend.core.stalled(False)  # of the core before: says nothing about this one

    run(body())


def test_what_was_accepted_before_a_stall_is_sent_after_it(run):
    async def body():
        bench = Bench()
        bench.side.stalled(True)
        stream = bench.open(0)
        assert not bench.link.commands
        assert not bench.side.abort(stream, "cancelled")  # it is for the caller to end
        bench.side.stalled(False)
        assert [type(command) for command in bench.link.commands] == [Submit]
        bench.side.stalled(True)
        bench.side.stalled(False)
        assert len(bench.link.commands) == 1

    run(body())


def test_a_request_without_a_deadline_has_the_default_one(run, serving, cores):
    cores.free = False

    async def body():
        async with (
            serving(cores=cores, default_deadline_s=0.05) as house,
            await Client.connect(house.address) as client,
        ):
            generation = client.generate(token_ids=[1])
            await cores.until(lambda: cores.now.submits)
            cores.now.deaf = True
            assert (await final_of(generation)).samples[0].finish_reason == "deadline"

    run(body())
