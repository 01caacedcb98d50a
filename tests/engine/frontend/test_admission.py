"""The estimate of the time to a first token, against queues in virtual time; and refusals by it."""

from __future__ import annotations

import heapq
import random

import pytest
from streams import final_of

from cierzo.bench.virtual import VirtualClock, VirtualCore
from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.errors import DeadlineUnreachable
from cierzo.engine.frontend.admission import EVIDENCE_S, FEWEST_STARTS, OPTIMISM, Admission
from cierzo.engine.frontend.client import Client
from cierzo.engine.frontend.prompt_line import MOST_SHARING, PromptLine
from cierzo.engine.messages import CoreStats, SamplingParams, StepOutput, Submit

RATE = 10_000.0  # prompt tokens per second
STEP_S = 0.02
PUBLISH_S = 0.1
FACTOR = 1.5  # between estimate and truth
SLACK_S = 2 * STEP_S + 0.01  # what no estimate can know: where in a step a request arrives


def _knowing(rate, **gauges):
    """Admission that has seen an engine compute so many tokens a second under a backlog, then told `gauges`."""
    admission = Admission()
    for _ in range(2):
        admission.published(CoreStats(prefill_tokens_per_s=rate, waiting_tokens=1 << 40), 0.0)
    admission.published(CoreStats(prefill_tokens_per_s=rate, **gauges), 0.0)
    return admission


class Queue:
    """A core in virtual time: prompts first come, first served in steps of STEP_S; so many places, each held for
    about `decode_s` after the first token. The front end's `Admission` is told what a front end sees."""

    def __init__(self, places=10_000, decode_s=0.0, seed=0):
        self.chance = random.Random(seed)
        self.now = 0.0
        self.admission = Admission()
        self.places, self.decode_s = places, decode_s
        self.waiting = []  # [run, tokens left]
        self.running = []
        self.leaves = []  # times at which places become free
        self.first_token_s = {}
        self.published_s = 0.0
        self.arrivals = []
        self.runs = 0

    def send(self, num_tokens):
        self.runs += 1
        self.admission.sent(self.runs, num_tokens, 0, self.now)
        self.arrivals.append([self.runs, num_tokens])
        return self.runs

    def advance(self, seconds):
        """Let time pass; a step takes what came before it began."""
        end_s = self.now + seconds
        while self.now < end_s - 1e-9:
            self.waiting += self.arrivals
            self.arrivals = []
            self.step()

    def step(self):
        self.now += STEP_S
        while self.leaves and self.leaves[0] <= self.now:
            heapq.heappop(self.leaves)
        while self.waiting and len(self.running) + len(self.leaves) < self.places:
            self.running.append(self.waiting.pop(0))
        budget = RATE * STEP_S
        while self.running and budget > 0:
            taken = min(budget, self.running[0][1])
            self.running[0][1] -= taken
            budget -= taken
            if self.running[0][1] > 0:
                break
            run = self.running.pop(0)[0]
            self.first_token_s[run] = self.now
            if self.decode_s:
                heapq.heappush(self.leaves, self.now + self.decode_s * self.chance.uniform(0.5, 1.5))
            self.admission.left(run, self.now, started=True)
        if self.now - self.published_s >= PUBLISH_S:
            self.published_s = self.now
            self.admission.published(self.stats(), self.now)

    def stats(self):
        return CoreStats(
            waiting=len(self.waiting),
            running=len(self.running) + len(self.leaves),
            waiting_tokens=int(sum(tokens for _, tokens in [*self.waiting, *self.running])),
            prefill_tokens_per_s=RATE,
            step_s=STEP_S,
        )

    def until_first_token(self, run):
        while run not in self.first_token_s:
            self.advance(STEP_S)
        return self.first_token_s[run]


def _estimated_s(queue, num_tokens):
    estimate = queue.admission.estimate(num_tokens, 0, queue.now)
    return None if estimate is None else estimate.queue_s + estimate.own_s


def _agree(estimated_s, true_s):
    return true_s / FACTOR - SLACK_S <= estimated_s <= true_s * FACTOR + SLACK_S


def test_nothing_is_refused_while_no_rate_is_known():
    admission = Admission()
    admission.sent(1, 10**9, 0, 0.0)
    assert admission.estimate(10**9, 0, 0.0) is None
    admission.require(10**9, 0, 0.001, 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_is_near_the_truth_when_prompts_queue(seed):
    chance = random.Random(seed)
    queue = Queue()
    queue.send(5000)
    queue.advance(0.6)
    expected = []
    for _ in range(300):
        num_tokens = chance.choice([10, 100, 500, 3000])
        expected.append((queue.now, _estimated_s(queue, num_tokens), queue.send(num_tokens)))
        queue.advance(chance.choice([0.0, 0.0, 0.02, 0.1, 0.25]))
    for sent_s, estimated_s, run in expected:
        assert _agree(estimated_s, queue.until_first_token(run) - sent_s)
    assert max(estimated_s for _, estimated_s, _ in expected) > 2.0  # there was a queue


@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_is_near_the_truth_when_places_are_what_is_waited_for(seed):
    chance = random.Random(seed)
    queue = Queue(places=16, decode_s=1.0)  # 16 requests a second, whatever the prompts allow
    expected = []
    for _ in range(600):
        expected.append((queue.now, _estimated_s(queue, 50), queue.send(50)))
        queue.advance(chance.choice([0.0, 0.02, 0.04, 0.08]))
    late = expected[300:]  # once the rate of requests has been seen
    for sent_s, estimated_s, run in late:
        assert _agree(estimated_s, queue.until_first_token(run) - sent_s)
    assert max(estimated_s for _, estimated_s, _ in late) > 3.0


@pytest.mark.parametrize("places", [10_000, 16])
@pytest.mark.parametrize("seed", range(5))
def test_a_retry_after_the_hint_is_accepted_and_in_time(places, seed):
    """Who follows the hints is accepted after the first hint; where places are waited for, which become free at
    random, a factor of the first hint may pass."""
    by_prompts = places > 100
    queue = Queue(places, 0.0 if by_prompts else 1.0, seed)
    for _ in range(100):
        queue.send(500)
    queue.advance(2.0)  # it is seen how fast requests start
    deadline_s = 1.0
    with pytest.raises(DeadlineUnreachable, match="first token is about") as caught:
        queue.admission.require(200, 0, deadline_s, queue.now)
    asked_s, hint_s = queue.now, caught.value.retry_after_s
    queue.advance(hint_s / 2)
    with pytest.raises(DeadlineUnreachable):  # the hint is no longer than it must be
        queue.admission.require(200, 0, deadline_s, queue.now)
    queue.advance(hint_s / 2 + SLACK_S)
    while not by_prompts:
        try:
            queue.admission.require(200, 0, deadline_s, queue.now)
            break
        except DeadlineUnreachable as again:
            queue.advance(again.retry_after_s)
    assert queue.now - asked_s <= hint_s * FACTOR + SLACK_S
    queue.admission.require(200, 0, deadline_s, queue.now)
    sent_s, run = queue.now, queue.send(200)
    assert queue.until_first_token(run) - sent_s <= deadline_s * (1 if by_prompts else FACTOR)


def test_what_even_an_idle_engine_cannot_do_is_refused_for_good():
    queue = Queue()
    queue.send(5000)
    queue.advance(0.6)
    with pytest.raises(DeadlineUnreachable, match="a retry is of no use") as caught:
        queue.admission.require(50_000, 0, 1.0, queue.now)
    assert caught.value.retry_after_s is None
    assert (caught.value.field, caught.value.value) == ("deadline_s", "1 s left")
    queue.admission.require(50_000, 0, 5.1, queue.now)


def test_a_rate_counts_while_there_is_evidence_that_it_is_the_engines_best():
    admission = Admission()

    def told(rate, waiting_tokens, now):
        stats = CoreStats(prefill_tokens_per_s=rate, waiting_tokens=waiting_tokens, step_s=0.1)
        admission.published(stats, now)
        estimate = admission.estimate(1000, 0, now)
        return None if estimate is None else round(estimate.own_s - 0.1, 3)

    assert told(100.0, 5, 0.0) is None  # short prompts: steps were not full
    assert told(100.0, 21, 1.0) is None  # a backlog of more than two steps, for the first time
    assert told(200.0, 1000, 2.0) == 5.0
    assert told(100.0, 5, 3.0) == 5.0  # not full again: it can do no less than before
    assert told(400.0, 5, 4.0) == 2.5  # but more
    assert told(400.0, 0, 2.0 + EVIDENCE_S) == 2.5
    assert told(400.0, 0, 2.1 + EVIDENCE_S) is None


def test_only_what_goes_first_counts():
    admission = _knowing(100.0)
    admission.sent(1, 1000, 0, 0.1)
    admission.sent(2, 300, -1, 0.1)
    assert [admission.estimate(0, level, 0.1).queue_s for level in (-2, -1, 0, 5)] == [0.0, 3.0, 13.0, 13.0]
    admission.left(2, 0.2, started=True)
    admission.left(2, 0.3)  # told twice: once its first token, once its end
    assert admission.estimate(0, 5, 0.3).queue_s == 10.0
    admission.left(1, 0.3)
    assert admission.estimate(0, 5, 0.3).queue_s == 0.0


def test_who_floods_waits_behind_itself_and_nobody_else_does():
    admission = _knowing(100.0)
    for run in range(10):
        admission.sent(run, 1000, 0, 0.1, "flood", 1.0)

    def queue_s(num_tokens, tenant, weight=1.0, priority=0):
        return admission.estimate(num_tokens, priority, 0.1, tenant, weight).queue_s

    assert queue_s(100, "flood") == 100.0
    assert queue_s(100, "mail") == pytest.approx(1.0)  # its own second takes two, at half of the rate
    assert queue_s(100, "mail", weight=3.0) == pytest.approx(1 / 3)
    assert queue_s(100, "mail", priority=100) == pytest.approx(1.0)  # priorities order its own requests alone
    assert queue_s(100_000, "mail") == pytest.approx(100.0)  # what all others have is all that it can wait for
    admission.require(100, 0, 2.5, 0.1, "mail")
    with pytest.raises(DeadlineUnreachable):
        admission.require(100, 0, 2.5, 0.1, "flood")
    admission.sent(20, 200, 0, 0.1, "mail", 1.0)
    assert queue_s(100, "mail") == pytest.approx(
        5.0
    )  # three seconds' work, one of them its own, at half of the rate
    with pytest.raises(DeadlineUnreachable) as caught:
        admission.require(100, 0, 2.5, 0.1, "mail")
    assert caught.value.retry_after_s == pytest.approx(4.0, abs=0.6)
    for run in range(10):
        admission.left(run, 0.1)
    assert queue_s(100, "mail") == pytest.approx(2.0)  # alone it has all
    assert queue_s(100, "flood") == pytest.approx(1.0)


def test_long_prompts_of_another_tenant_are_not_in_line():
    admission = _knowing(100.0, max_chunk_tokens=512)
    admission.sent(1, 10_000, 0, 0.1, "flood", 1.0)
    assert admission.estimate(100, 0, 0.1, "mail", 1.0).queue_s == pytest.approx(1.0)
    assert admission.estimate(1000, 0, 0.1, "flood", 1.0).queue_s == pytest.approx(10.0)


def test_what_was_sent_within_the_cores_last_step_is_not_in_its_gauges():
    admission = _knowing(100.0)
    admission.sent(1, 50, 0, 0.5)
    admission.sent(2, 70, 0, 0.95)
    admission.published(CoreStats(prefill_tokens_per_s=100.0, waiting_tokens=50, step_s=0.1), 1.0)
    assert admission.estimate(0, 0, 1.0).queue_s == pytest.approx(1.2)
    admission.published(CoreStats(prefill_tokens_per_s=100.0, waiting_tokens=110, step_s=0.1), 1.1)
    assert admission.estimate(0, 0, 1.1).queue_s == pytest.approx(1.1)
    assert admission.estimate(0, 0, 1.6).queue_s == pytest.approx(0.6)  # it goes on meanwhile


def test_tokens_that_the_prefix_cache_spares_cost_nothing():
    admission = _knowing(100.0, waiting_tokens=50, prompt_tokens=1000, cached_tokens=800)
    admission.sent(1, 50, 0, 0.0)
    estimate = admission.estimate(100, 0, 0.0)
    assert (estimate.queue_s, estimate.own_s) == (pytest.approx(0.1), pytest.approx(0.2))


def test_a_rate_of_requests_needs_enough_of_them_and_a_queue():
    admission = _knowing(1e9, waiting=1)
    for run in range(FEWEST_STARTS):
        admission.sent(run, 1, 0, 0.0)
        admission.sent(100 + run, 1, 0, 0.0)
        admission.left(run, float(run), started=True)
        known = run + 1 == FEWEST_STARTS
        assert (admission.estimate(1, 0, 8.0).queue_s > 1.0) is known
    assert admission.estimate(1, 0, 8.0).queue_s == 8.0  # eight wait; eight began in eight seconds
    admission.published(CoreStats(prefill_tokens_per_s=1e9), 9.0)
    assert admission.estimate(1, 0, 9.0).queue_s < 0.001


def test_the_front_end_refuses_by_it(run, serving, cores):
    cores.free = False

    async def body():
        async with serving(cores=cores) as house, await Client.connect(house.address) as client:
            for waiting_tokens in (1000, 1000, 0):
                stats = CoreStats(prefill_tokens_per_s=10.0, waiting_tokens=waiting_tokens, total_blocks=7)
                cores.now.say(StepOutput(deltas=[], stats=stats))
            while (await client.stats()).core.waiting_tokens or not house.frontend.core.stats.total_blocks:
                pass
            first = client.generate(token_ids=[1] * 50, max_tokens=1)
            with pytest.raises(DeadlineUnreachable) as caught:
                await client.complete(token_ids=[2] * 10, deadline_s=4.0)
            assert caught.value.retry_after_s == pytest.approx(2.0, abs=0.2)
            with pytest.raises(DeadlineUnreachable) as caught:
                await client.complete(token_ids=[2] * 50, deadline_s=3.0)
            assert caught.value.retry_after_s is None
            stats = await client.stats()
            assert (stats.accepted, stats.refused, stats.streams) == (1, 2, 1)
            cores.now.step()
            await final_of(first)

    run(body())


class VirtualEngine:
    """The real scheduler on a simulated card, in its own virtual time, and the `Admission` of its front end."""

    def __init__(self, max_model_len=8192):
        options = EngineOptions(model="small4", device="simulated:h200", weights="fp8", max_model_len=max_model_len)
        config = resolve(options)
        self.clock, self.admission = VirtualClock(), Admission()
        self.core = VirtualCore(config, self.clock)
        self.first_token_s = {}
        self.told_s = 0.0

    def run_until(self, then_s):
        """Take steps until a time, which the last one may overrun, or until nothing is left."""
        while self.clock.now_s < then_s and self.core.has_work():
            for delta in self.core.step_plain():
                if delta.token_ids and delta.request_id not in self.first_token_s:
                    self.first_token_s[delta.request_id] = self.clock.now_s
                    self.admission.left(delta.request_id, self.clock.now_s, started=True)
            if self.clock.now_s - self.told_s >= PUBLISH_S:
                self.told_s = self.clock.now_s
                self.admission.published(self.core.stats(), self.clock.now_s)

    def send(self, number, num_tokens):
        sampling = SamplingParams(max_tokens=20, ignore_eos=True, seed=0)
        prompt = [number] * num_tokens
        self.admission.sent(number, num_tokens, 0, self.clock.now_s)
        self.core.submit(Submit(request_id=number, prompt_token_ids=prompt, sampling=sampling))

    def until_first_token(self, number):
        """Seconds to the first token of what was sent now."""
        sent_s = self.clock.now_s
        while number not in self.first_token_s:
            self.run_until(self.clock.now_s + 1e-6)
        return self.first_token_s[number] - sent_s

    def refusal(self, num_tokens, deadline_s):
        """The error that a request would get now, None where it would be let in."""
        try:
            self.admission.require(num_tokens, 0, deadline_s, self.clock.now_s)
        except DeadlineUnreachable as error:
            return error
        return None


def test_the_estimate_is_near_the_truth_with_the_real_scheduler_on_a_simulated_card():
    """Prompts of 200 to 4,000 tokens, twice as fast as an H200 can take them."""
    engine, chance, expected, next_s = VirtualEngine(), random.Random(1), {}, 0.0
    for number in range(400):
        next_s += chance.choice([0.0, 0.01, 0.02])
        engine.run_until(next_s)
        num_tokens = chance.choice([200, 1000, 4000])
        now = engine.clock.now_s = max(engine.clock.now_s, next_s)
        estimate = engine.admission.estimate(num_tokens, 0, now)
        if estimate is not None:
            expected[number] = (now, estimate.queue_s + estimate.own_s)
        engine.send(number, num_tokens)
    asked_s, deadline_s = engine.clock.now_s, 5.0
    with pytest.raises(DeadlineUnreachable) as caught:
        engine.admission.require(1000, 0, deadline_s, asked_s)
    engine.run_until(asked_s + caught.value.retry_after_s + PUBLISH_S)
    engine.admission.require(1000, 0, deadline_s, engine.clock.now_s)
    retried_s = engine.clock.now_s
    engine.send(1000, 1000)
    engine.run_until(float("inf"))
    assert engine.first_token_s[1000] - retried_s <= deadline_s
    assert len(expected) > 300  # all but those before a rate was known
    waits = {number: engine.first_token_s[number] - sent_s for number, (sent_s, _) in expected.items()}
    assert max(waits.values()) > 10.0
    for number, wait_s in waits.items():
        assert _agree(expected[number][1], wait_s)


def test_short_ones_beside_a_long_prompt_are_let_in():
    """A prompt of 60,000 tokens takes 5 s; beside it short ones take little longer than alone."""
    engine, chance, truths = VirtualEngine(65536), random.Random(1), []
    engine.send(0, 60_000)
    engine.run_until(0.5)
    assert engine.refusal(60_000, 4.0) is not None  # a rate is known, and by it the queue is long
    number = 0
    while 0 not in engine.first_token_s:
        number += 1
        num_tokens = chance.choice([10, 500, 3000])
        estimate = engine.admission.estimate(num_tokens, 0, engine.clock.now_s)
        refused_at = [d for d in (0.05, 0.1, 0.2, 0.4, 1.0, 1.5) if engine.refusal(num_tokens, d) is not None]
        engine.send(number, num_tokens)
        truth_s = engine.until_first_token(number)
        truths.append(truth_s)
        assert _agree(estimate.queue_s + estimate.own_s, truth_s)
        assert all(deadline_s < truth_s * FACTOR for deadline_s in refused_at)
        engine.run_until(engine.clock.now_s + 0.1)
    assert len(truths) > 8
    assert max(truths) < 0.5


def _after_a_change_of_load():
    """An engine that has computed a long context of 60,000 tokens, then got 60 prompts of 2,000 at once."""
    engine = VirtualEngine(65536)
    engine.send(0, 60_000)
    engine.until_first_token(0)
    for number in range(1, 61):
        engine.send(number, 2000)
    engine.run_until(engine.clock.now_s + 0.3)
    return engine


@pytest.mark.parametrize("deadline_s", [0.5, 2.0])
def test_a_hint_is_near_the_truth_after_a_change_of_load(deadline_s):
    """The truth: the first moment at which the same request, sent to the same engine, is in time."""
    asked = _after_a_change_of_load()
    hint_s = asked.refusal(500, deadline_s).retry_after_s
    truth_s = 0.0
    while True:
        engine = _after_a_change_of_load()
        engine.run_until(asked.clock.now_s + truth_s)
        is_refused = engine.refusal(500, deadline_s) is not None
        engine.send(1000, 500)
        until_s = engine.until_first_token(1000)
        assert not (is_refused and until_s * FACTOR <= deadline_s)
        if until_s <= deadline_s:
            break
        truth_s += 0.1
    assert truth_s > 1.0
    assert truth_s / 2 <= hint_s <= truth_s * 2


def test_a_hint_beside_a_long_prompt_waits_for_its_end():
    """Nothing but the end of the long one helps a request whose own half of each step is too little."""
    engine = VirtualEngine(65536)
    engine.send(0, 60_000)
    engine.run_until(0.5)
    hint_s = engine.refusal(20_000, 0.8).retry_after_s
    left_s = engine.until_first_token(0)
    assert left_s / 2 <= hint_s <= left_s * 2


def test_long_prompts_leave_half_of_what_is_left():
    assert PromptLine([], 3.0).queue_s(1.0) == 3.0
    assert PromptLine([10.0], 0.0).queue_s(1.0) == 1.0  # half of each step
    assert PromptLine([10.0], 2.0).queue_s(1.0) == 5.0
    assert PromptLine([0.5], 0.0).queue_s(1.0) == 0.5  # it ends meanwhile
    assert PromptLine([10.0, 10.0], 0.0).queue_s(1.0) == 3.0
    assert PromptLine([10.0] * (MOST_SHARING + 2), 0.0).queue_s(0.0) == 20.0
    assert PromptLine([4.0, 0.0], 3.0).after(2.0).queue_s(0.0) == 4.0  # 3 and 2 are left
    assert PromptLine([4.0], 1.0).after(5.0).queue_s(9.0) == 0.0
    assert PromptLine([4.0], 0.0).after(1.0).queue_s(9.0) == 3.0  # alone it has the whole step
    assert PromptLine([], 3.0).time_until(1.0, 1.0) == pytest.approx(2.0)
    assert PromptLine([10.0], 0.0).time_until(1.0, 0.25) == pytest.approx(9.75)


def test_in_doubt_a_request_is_let_in():
    admission = _knowing(100.0)
    admission.sent(1, 1000, 0, 0.1)
    with pytest.raises(DeadlineUnreachable):
        admission.require(0, 0, OPTIMISM * 10.0 - 0.01, 0.1)
    admission.require(0, 0, OPTIMISM * 10.0, 0.1)


def test_a_price_counts_work_instead_of_tokens():
    """By tokens the second half of a long context would be worth as much as the first."""
    priced = {"prompt_row_s": 0.01, "prompt_pair_s": 0.0002, "prefill_share": 0.5, "max_chunk_tokens": 5000}
    admission = _knowing(100.0, waiting_tokens=0)
    for waiting_tokens in (1 << 40, 1 << 40, 0):
        stats = CoreStats(prefill_tokens_per_s=100.0, waiting_tokens=waiting_tokens, **priced)
        admission.published(stats, 0.0)
    own_s = [admission.estimate(count, 0, 0.0).own_s for count in (100, 1000)]
    assert own_s == [pytest.approx((1 + 1) / 0.5), pytest.approx((10 + 100) / 0.5)]
