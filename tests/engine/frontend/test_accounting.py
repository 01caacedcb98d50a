"""What finals say of costs: their sums are what the core has counted, whatever happened to the requests."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from fake_core import as_sent

from cierzo.cache.config import CacheConfig
from cierzo.engine.frontend.accounting import add_run
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.frontend.frontend import Frontend
from cierzo.engine.frontend.tenants import EVERYBODY
from cierzo.engine.messages import Abort, Cost, Final, Finish, Generate, Hello, SamplingParams, StepOutput, Submit
from cierzo.engine.testing.local_encoders import local_encoders
from cierzo.engine.text.prompt import PromptEncoder
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.fake import FakeRunner, fake_config
from cierzo.scheduler.config import SchedulerConfig

BLOCK, BLOCKS = 4, 48
CONFIG = fake_config(
    SchedulerConfig(budget_tokens=32, max_chunk_tokens=16, max_running=8, max_model_len=96),
    CacheConfig(block_tokens=BLOCK, num_blocks=BLOCKS, hash_key="00" * 16),
    vocab_size=300,
)


def _finish(computed, recomputed=0, *, prompt=10, output=5, cached=0, reason="length"):
    return Finish(reason, "", None, prompt, output, cached, 2, 0.1, 0.2, 0.3, computed, recomputed, 7, 1.5)


def test_costs_of_runs_add_up():
    first = add_run(Cost(), _finish(14, 3), 0)
    assert first == Cost(computed_tokens=14, recomputed_tokens=3, steps=7, preemptions=2, kv_block_s=1.5)
    assert add_run(first, _finish(14, 3), 0) == Cost(
        computed_tokens=28, recomputed_tokens=6, steps=14, preemptions=4, kv_block_s=3.0
    )


@pytest.mark.parametrize(
    ("finish", "before", "again"),
    [
        (_finish(14), 12, 12),  # all positions anew, of which 12 had been computed
        (_finish(4, cached=10), 12, 2),  # the prompt was found in the prefix cache
        (_finish(2, cached=10), 12, 0),  # ... and the generated tokens too
        (_finish(15), 12, 12),  # a step was under way beyond the end
        (_finish(6, output=3, reason="cancelled"), 12, 6),  # it ended in the middle of what had been computed
        (_finish(18, 4), 12, 12),  # besides what the core itself computed twice
        (_finish(0, output=3, reason="deadline"), 12, 0),
    ],
)
def test_what_an_earlier_run_had_computed_counts_as_recomputed(finish, before, again):
    assert add_run(Cost(), finish, before).recomputed_tokens == finish.recomputed_tokens + again


FRONT, NO_TEXT = FrontendConfig(), PromptEncoder()


class Client:
    """A sink that keeps final records."""

    def __init__(self, *features):
        self.features = frozenset(features)
        self.access, self.peer = EVERYBODY, "a test"
        self.is_paused = False
        self.finals = {}

    def put(self, message):
        if isinstance(message, Final):
            self.finals[message.stream] = message


class Engine:
    """A front end and an `EngineCore` in one thread: what is sent is there at once, steps are taken by hand."""

    def __init__(self, model_info):
        self.frontend = Frontend(FRONT, model_info, NO_TEXT, self, local_encoders(NO_TEXT, FRONT, model_info))
        self.client = Client("accounting")
        self.frontend.connect(self.client)
        self.start()

    def start(self):
        runner = FakeRunner(
            vocab_size=300, num_blocks=BLOCKS, block_tokens=BLOCK, max_running=CONFIG.scheduler.max_running
        )
        self.core = EngineCore(CONFIG, runner)
        self.frontend.core.ready()

    def kill(self):
        self.frontend.core.lost(True)
        self.start()

    def send(self, command):
        command = as_sent(command)
        if isinstance(command, Submit):
            self.core.submit(command)
        elif isinstance(command, Abort):
            self.core.abort(command)

    def forgive(self):
        pass

    def generate(self, stream, token_ids, **sampling):
        sampling = SamplingParams(ignore_eos=True, seed=stream, **sampling)
        self.frontend.generate(self.client, Generate(stream=stream, token_ids=token_ids, sampling=sampling))

    def step(self):
        self.frontend.core.step(StepOutput(deltas=self.core.step(), stats=self.core.stats()))

    def finish(self):
        while self.core.has_work():
            self.step()
        assert not self.frontend.streams

    def sums(self):
        costs = [final.cost for final in self.client.finals.values()]
        return {name: sum(getattr(cost, name) for cost in costs) for name in Cost.__struct_fields__}


def _counted(stats):
    """Counters of the core by the names of a final's."""
    return {
        "computed_tokens": stats.computed_tokens,
        "recomputed_tokens": stats.recomputed_tokens,
        "steps": stats.sequence_steps,
        "preemptions": stats.preemptions,
        "kv_block_s": pytest.approx(stats.kv_block_s),
    }


@pytest.mark.parametrize("pauses", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_sums_over_finals_are_the_cores_counters(run, model_info, seed, pauses):
    """Prefix hits, samples, preemptions, cancels, and pauses if asked for."""

    async def body():
        chance, engine = random.Random(seed), Engine(model_info)
        paused, shared = [], [chance.randrange(256) for _ in range(24)]
        for number in range(40):
            own = [chance.randrange(256) for _ in range(chance.randrange(1, 12))]
            count = 2 if chance.random() < 0.2 else 1
            engine.generate(
                number, shared[: chance.randrange(25)] + own, max_tokens=chance.randrange(1, 40), n=count
            )
            for _ in range(chance.randrange(4)):
                engine.step()
            streams = [stream for stream in engine.frontend.streams if stream not in paused]
            if streams and chance.random() < 0.1:
                engine.frontend.cancel(engine.client, chance.choice(streams).stream_id)
            elif pauses and streams and chance.random() < 0.5:
                paused.append(chance.choice(streams))
                engine.frontend.core.withdraw(paused[-1])
            if paused and chance.random() < 0.4:
                engine.frontend.core.submit(paused.pop(0))
        engine.step()  # the core tells what it had of those that are paused
        for stream in paused:
            engine.frontend.core.submit(stream)
        engine.finish()
        assert len(engine.client.finals) == 40
        sums, counted = engine.sums(), _counted(engine.core.stats())
        assert counted["computed_tokens"] > 0
        assert counted["preemptions"] > 0
        again = sums.pop("recomputed_tokens") - counted.pop("recomputed_tokens")
        assert again > 0 if pauses else again == 0
        assert sums == counted
        for final in engine.client.finals.values():
            timings = final.timings
            assert timings.queue_s + timings.prefill_s + timings.decode_s == pytest.approx(timings.total_s)
            assert min(timings.queue_s, timings.prefill_s, timings.decode_s) >= 0

    run(body())


def test_what_a_dead_core_had_computed_counts_as_recomputed(run, model_info):
    """The dead core's own work is in no final: no core has told it. What it had given tokens for was computed."""

    async def body():
        engine, began = Engine(model_info), time.monotonic()
        engine.generate(0, [5] * 10, max_tokens=9)
        for _ in range(4):
            engine.step()
        had = [len(stream.samples[0].token_ids) for stream in engine.frontend.streams]
        engine.generate(1, [6] * 10, max_tokens=2)  # the dead core never came to it
        engine.kill()
        engine.finish()
        first, second = engine.client.finals[0], engine.client.finals[1]
        assert had[0] >= 3
        assert first.cost.computed_tokens == 10 + 9 - 1
        assert first.cost.recomputed_tokens == 10 + had[0] - 1
        assert second.cost == Cost(
            computed_tokens=11, recomputed_tokens=0, steps=2, preemptions=0, kv_block_s=second.cost.kv_block_s
        )
        assert second.cost.kv_block_s > 0
        wall_s = first.timings.queue_s + first.timings.prefill_s + first.timings.decode_s
        assert wall_s == pytest.approx(first.timings.total_s)
        assert 0 < wall_s < time.monotonic() - began
        counted = _counted(engine.core.stats())
        del counted["recomputed_tokens"]
        assert {name: value for name, value in engine.sums().items() if name in counted} == counted

    run(body())


@pytest.mark.parametrize("features", [[], ["accounting"]])
def test_only_clients_with_the_feature_are_told(run, serving, peering, features):
    async def body():
        async with serving() as house, peering(house, Hello(features=features)) as peer:
            peer.say(Generate(stream=1, token_ids=[1], sampling=SamplingParams(max_tokens=2)))
            final = await peer.hear_until(Final)
            assert (final.cost is not None) is bool(features)

    run(body())


def test_a_late_end_of_a_cancelled_request_is_lost_with_it(run, model_info):
    """The core did not answer in time: the final has gone out, with what was known then."""

    async def body():
        engine = Engine(model_info)
        engine.generate(0, [1, 2, 3], max_tokens=9)
        engine.frontend.cancel(engine.client, 0)
        while not engine.client.finals:
            await asyncio.sleep(0.01)
        engine.step()
        assert engine.client.finals[0].samples[0].finish_reason == "cancelled"
        assert engine.client.finals[0].cost == Cost()

    run(body())
