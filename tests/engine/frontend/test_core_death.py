"""A core that dies, again and again or for one request's sake; and one that cannot start."""

from __future__ import annotations

import pytest
from streams import all_of, by_sample

from cierzo.engine.errors import CheckpointError, CoreFailed, Overloaded
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.recovery import LIFE_TOKENS
from cierzo.engine.messages import CoreError


def test_streams_survive_the_death_of_the_core(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            arguments = {"token_ids": [1, 2], "max_tokens": 9, "seed": 3, "n": 2}
            generation = client.generate(**arguments)
            drawn = client.generate(token_ids=[5], max_tokens=6)  # its seed is drawn here, and kept
            await cores.until(lambda: len(cores.now.submits) == 2)
            first = cores.now
            for _ in range(4):
                first.step()
            await client.ping()
            first.kill()
            await cores.until(lambda: len(cores.lives) == 2 and len(cores.now.submits) == 3)  # all at once
            samples = [(s.first_sample, s.sampling.n, len(s.output_token_ids)) for s in cores.now.submits]
            assert samples == [(0, 1, 4), (1, 1, 4), (0, 1, 4)]
            cores.go_on()
            token_ids, _ = await by_sample(generation)
            unbroken = await client.complete(**arguments)
            assert token_ids == {end.sample: end.token_ids for end in unbroken.samples}
            got, _, final = await all_of(drawn)
            assert got == [(5 + final.seed + 7 * position) % 256 for position in range(6)]
            stats = await client.stats()
            assert (stats.core_restarts, stats.finished) == (1, 3)

    run(body())


def test_what_ended_while_the_core_was_dead_is_not_run_again(run, serving, cores, clock):
    cores.free = False
    cores.answer = lambda submit, sample: list(b"xSTOPyyyy")

    async def body():
        async with serving(cores=cores, clock=clock) as house, await Client.connect(house.address) as client:
            late = client.generate(token_ids=[1], deadline_s=5.0)
            cut = client.generate(token_ids=[2], stop=["STOP"])
            cancelled = client.generate(token_ids=[3])
            lasting = client.generate(token_ids=[4], deadline_s=50.0)
            await cores.until(lambda: len(cores.now.submits) == 4)
            dead = cores.now
            dead.data_received = lambda data: None  # it hears nothing any more
            for _ in range(5):
                dead.step()
            assert (await anext(cut)).text == "x"
            cancelled.cancel()
            await client.ping()
            clock.now += 10
            dead.kill()
            await cores.until(lambda: len(cores.lives) == 2 and cores.now.submits)
            (again,) = cores.now.submits
            assert (again.prompt_token_ids, again.deadline_at_s - clock.now) == ([4], 40.0)
            ends = [(await all_of(stream))[2].samples[0] for stream in (late, cut, cancelled)]
            assert [end.finish_reason for end in ends] == ["deadline", "stop", "cancelled"]
            assert (ends[1].stop, ends[1].output_tokens) == ("STOP", 5)
            cores.go_on()
            assert len((await all_of(lasting))[0]) == 9

    run(body())


def test_samples_that_had_ended_do_not_run_again(run, serving, cores):
    cores.free, cores.answer = False, lambda submit, sample: [65, 257, 1] if sample == 0 else [66, 67, 68]

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            generation = client.generate(token_ids=[1], n=2)
            await cores.until(lambda: cores.now.submits)
            cores.now.step()
            cores.now.step()
            await client.ping()
            cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 2 and cores.now.submits)
            assert [(submit.first_sample, submit.sampling.n) for submit in cores.now.submits] == [(1, 1)]
            cores.now.step()
            assert (await by_sample(generation))[0] == {0: [65, 257], 1: [66, 67, 68]}
            assert [end.finish_reason for end in generation.final.samples] == ["stop", "length"]

    run(body())


def test_requests_while_the_core_loads_are_refused(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            open_stream = client.generate(token_ids=[1], max_tokens=3)
            short_lived = client.generate(token_ids=[2], deadline_s=0.05)
            await cores.until(lambda: len(cores.now.submits) == 2)
            cores.silent = True
            cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 2 and cores.now.hello)
            assert (await client.health()).state == "loading"
            with pytest.raises(Overloaded, match="loading"):
                await client.complete(token_ids=[1])
            open_stream.cancel()  # there is no core to ask
            assert (await all_of(open_stream))[2].samples[0].finish_reason == "cancelled"
            assert (await all_of(short_lived))[2].samples[0].finish_reason == "deadline"

    run(body())


def test_a_core_that_keeps_dying_is_given_up(run, serving, cores, clock):
    cores.free = False

    async def body():
        limits = {"max_core_restarts_per_hour": 2}
        async with (
            serving(cores=cores, clock=clock, **limits) as house,
            await Client.connect(house.address) as client,
        ):
            stream = client.generate(token_ids=[1], max_tokens=50, deadline_s=10_000.0)
            for life in range(1, 5):
                await cores.until(lambda life=life: len(cores.lives) == life and cores.now.submits)
                for _ in range(LIFE_TOKENS):
                    cores.now.step()
                await anext(stream)
                if life == 2:
                    clock.now += 3601  # the first death is forgotten
                cores.now.kill()
            with pytest.raises(CoreFailed) as caught:
                await all_of(stream)
            assert (caught.value.field, caught.value.limit) == ("max_core_restarts_per_hour", "2")
            assert (await client.health()).state == "failed"
            with pytest.raises(CoreFailed):
                await client.complete(token_ids=[1])
            assert len(cores.lives) == 4
            assert len(house.frontend.streams) == 0

    run(body())


def _prompts(core):
    """First tokens of the prompts that a core has got, in order."""
    return [submit.prompt_token_ids[0] for submit in core.submits]


def test_a_request_that_kills_the_core_fails_alone(run, serving, cores, caplog):
    """Four streams; the core dies whenever it has got the third. Nothing else is lost, and the core is kept."""
    cores.free = False
    caplog.set_level("INFO")

    async def body():
        async with (
            serving(cores=cores, max_core_restarts=1) as house,
            await Client.connect(house.address) as client,
        ):

            async def life(number, prompts):
                """Wait until core `number` has got these."""
                await cores.until(lambda: len(cores.lives) == number and len(cores.now.submits) == len(prompts))
                assert _prompts(cores.now) == prompts

            streams = [client.generate(token_ids=[i], max_tokens=9, seed=0) for i in range(3)]
            cancelled = client.generate(token_ids=[3], deadline_s=60.0)
            for number in (1, 2):
                await life(number, [0, 1, 2, 3])
                cores.now.kill()
            await life(3, [0, 1])  # half of the suspects
            cancelled.cancel()  # no core has it
            assert (await all_of(cancelled))[2].samples[0].finish_reason == "cancelled"
            late = client.generate(token_ids=[7], max_tokens=9, seed=0)  # no suspect: need not wait
            await life(3, [0, 1, 7])
            for _ in range(LIFE_TOKENS):
                cores.now.step()
            await life(3, [0, 1, 7, 2])  # the other half
            cores.now.kill()
            await life(4, [0, 1, 7])  # these must show life first, as one of them could kill too
            for _ in range(LIFE_TOKENS):
                cores.now.step()
            await life(4, [0, 1, 7, 2])
            cores.now.kill()
            failed = (await all_of(streams[2]))[2].samples[0]
            assert (failed.finish_reason, failed.output_tokens) == ("failed", 0)
            assert "each time that it began this request" in failed.message
            await life(5, [0, 1, 7])
            cores.go_on()
            for first, stream in ((0, streams[0]), (1, streams[1]), (7, late)):
                assert (await all_of(stream))[0] == [first + 7 * i for i in range(9)]
            assert (len(house.frontend.streams), (await client.stats()).core_restarts) == (0, 4)
            assert "4 requests may be the reason, of which 2 are tested next: [0, 1]" in caplog.text
            assert "the core gets 1 suspects: requests [2]" in caplog.text

    run(body())


def test_deaths_before_its_first_step_are_no_proof_against_a_request(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            old = client.generate(token_ids=[1], max_tokens=9, seed=0)
            await cores.until(lambda: cores.now.submits)
            cores.now.step()
            cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 2 and cores.now.submits)
            new = client.generate(token_ids=[2], max_tokens=9, seed=0)
            await cores.until(lambda: len(cores.now.submits) == 2)
            cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 3 and cores.now.submits)
            cores.go_on()
            ends = [(await all_of(stream))[0] for stream in (old, new)]
            assert ends == [[first + 7 * i for i in range(9)] for first in (1, 2)]

    run(body())


def test_timings_add_up_across_cores(run, serving, cores, clock):
    cores.free = False

    async def body():
        async with serving(cores=cores, clock=clock) as house, await Client.connect(house.address) as client:
            streams = [client.generate(token_ids=[i], max_tokens=2) for i in (1, 2)]
            await cores.until(lambda: len(cores.now.submits) == 2)
            del cores.now.running[1, 0]  # the first core never comes to the second one
            clock.now += 1.0
            cores.now.step()
            await anext(streams[0])
            clock.now += 2.0
            cores.now.kill()
            await cores.until(lambda: len(cores.lives) == 2 and len(cores.now.submits) == 2)
            behind = cores.now.running.pop((3, 0))  # the second one comes to it after the first step
            cores.now.step()
            await all_of(streams[0])
            cores.now.running[3, 0] = behind
            for _ in range(2):
                clock.now += 4.0
                cores.now.step()
                await client.ping()
            first, second = streams[0].final.timings, (await all_of(streams[1]))[2].timings
            assert (first.queue_s, first.prefill_s, first.decode_s, first.total_s) == pytest.approx(
                (0.1, 0.9, 2.0, 3.0)
            )
            waits = (second.queue_s, second.prefill_s, second.decode_s, second.total_s)
            assert waits == pytest.approx((0.1, 6.9, 4.0, 11.0))  # the fake core says that it waited 0.1 s

    run(body())


def test_a_core_that_cannot_start_says_why(run, serving, cores):
    cores.error = CoreError(code="checkpoint_error", message="shard 2 is truncated")

    async def body():
        with pytest.raises(CheckpointError, match="shard 2"):
            async with serving(cores=cores):
                pass

    run(body())


def test_a_core_that_never_gets_ready(run, serving, cores):
    cores.silent = True

    async def body():
        with pytest.raises(CoreFailed) as caught:
            async with serving(cores=cores, core_start_timeout_s=0.02):
                pass
        assert caught.value.field == "core_start_timeout_s"
        assert cores.now.exited.done()

    run(body())
