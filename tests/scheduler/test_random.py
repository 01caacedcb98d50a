"""Random traffic over tiny pools, against a simulated model that reads what it needs through the block tables.

The simulated cache keeps, at each (block, offset), the whole prefix that a real model's latent depends on: the
tokens so far and the form of each. The next token is a function of what is read back, so a block that is shared
wrongly, overwritten, or not written shows at once, and every request can be run alone for comparison.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from cierzo.cache.config import CacheConfig
from cierzo.cache.manager import KVCacheManager
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.plan import RequestKey, SeqPlan, StepPlan, StepResult
from cierzo.scheduler.request import NewRequest, QueueFull
from cierzo.scheduler.scheduler import Scheduler

EOS = 2
Prefix = tuple[tuple[int, bool], ...]  # (token, is prompt) from the start


def next_token(prefix: Prefix, seed: int) -> int:
    """0 or 1, sometimes EOS."""
    word = zlib.crc32(repr((prefix, seed)).encode())
    return EOS if word % 29 == 0 else word & 1


def run_alone(new: NewRequest, max_model_len: int) -> tuple[list[int], str]:
    """Output tokens and finish reason of a request that has the machine to itself, spelled out once more."""
    prefix: Prefix = tuple((token, True) for token in new.prompt_token_ids)
    output: list[int] = []
    while len(output) < new.sampling.max_tokens and len(prefix) < max_model_len:
        token = next_token(prefix, new.sampling.seed or 0)
        output.append(token)
        prefix += ((token, False),)
        if token == EOS and len(output) >= new.sampling.min_tokens:
            return output, "stop"
    return output, "length"


@dataclass
class Model:
    """Computes a plan from nothing but the plan, and its own pages and tables."""

    block_tokens: int
    pages: dict[tuple[int, int], Prefix] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)
    seeds: dict[tuple[RequestKey, int], int] = field(default_factory=dict)

    def run(self, plan: StepPlan, tokens_of: dict[RequestKey, list[int]]) -> StepResult:
        written: set[tuple[int, int]] = set()
        results = [self._sequence(seq, tokens_of[seq.key], written) for seq in plan.seqs]
        return StepResult(results)

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.block_tokens)
        return self.tables[slot][block], offset

    def _sequence(self, seq: SeqPlan, tokens: list[int], written: set[tuple[int, int]]) -> list[int]:
        if seq.admission is not None:
            self.tables[seq.slot] = []
            self.seeds[seq.key, seq.epoch] = seq.admission.sampling.seed or 0
            known = [*seq.admission.prompt_token_ids, *seq.admission.output_token_ids]
            assert known == tokens
        self.tables[seq.slot] += seq.new_block_ids
        own: Prefix = tuple((token, position < seq.num_prompt_tokens) for position, token in enumerate(tokens))
        end = seq.start + len(seq.token_ids)
        assert tokens[seq.start : end] == seq.token_ids
        for position in range(seq.start):
            assert self.pages[self._place(seq.slot, position)] == own[: position + 1]
        for position in range(seq.start, end):
            place = self._place(seq.slot, position)
            assert place not in written, f"{place} is written twice in one step"
            written.add(place)
            self.pages[place] = own[: position + 1]
        assert seq.samples == (end == len(tokens))
        last = self.pages[self._place(seq.slot, end - 1)]
        return [next_token(last, self.seeds[seq.key, seq.epoch])] if seq.samples else []


class Traffic:
    """Drives a scheduler, keeps the books of what was accepted and delivered, and checks after every step."""

    def __init__(self, cache: CacheConfig, limits: SchedulerConfig) -> None:
        self.now = 0.0
        self.limits = limits
        self.cache = KVCacheManager(cache)
        self.scheduler = Scheduler(limits, self.cache, lambda: self.now)
        self.model = Model(cache.block_tokens)
        self.accepted: dict[RequestKey, NewRequest] = {}
        self.output: dict[RequestKey, list[int]] = {}
        self.ended: dict[RequestKey, str] = {}
        self.num_refused = 0

    def add(self, new: NewRequest) -> None:
        try:
            self.scheduler.add(new)
        except QueueFull:
            self.num_refused += 1
            assert self.scheduler.stats().waiting >= self.limits.max_waiting
            return
        key = (new.request_id, new.sample)
        self.accepted[key] = new
        self.output[key] = list(new.output_token_ids)
        self.collect()

    def abort(self, request_id: int, sample: int | None) -> None:
        alive = [key for key in self.accepted if key[0] == request_id and key not in self.ended]
        expected = [key for key in alive if sample in (None, key[1])]
        assert self.scheduler.abort(request_id, sample) == len(expected)
        self.collect()
        assert all(self.ended.get(key) for key in expected)

    def step(self, *, abort: int | None = None, fail: int | None = None) -> None:
        """One step; `abort` a request between plan and result, or let sequence number `fail` fail."""
        self.now += 1.0
        self.check_order(plan := self.scheduler.schedule())
        self.collect()
        self.scheduler.check()
        result = self.model.run(plan, {key: self.tokens(key) for key in self.accepted})
        if abort is not None:
            self.abort(abort, None)
        if fail is not None and plan.seqs:
            result = StepResult(result.token_ids, failures={fail % len(plan.seqs): "told to"})
        self.scheduler.commit(plan, result)
        self.collect()
        self.scheduler.check()

    def tokens(self, key: RequestKey) -> list[int]:
        return [*self.accepted[key].prompt_token_ids, *self.output[key]]

    def check_order(self, plan: StepPlan) -> None:
        counts = [len(seq.token_ids) for seq in plan.seqs]
        assert sum(counts) == plan.num_tokens <= self.limits.budget_tokens
        assert all(counts)
        assert len({seq.key for seq in plan.seqs}) == len(plan.seqs) <= self.limits.max_running
        assert plan.seqs or not self.scheduler.has_work(), "there is work, and nothing is done"
        running = self.scheduler._running
        admitted = [running[seq.key].order for seq in plan.seqs if seq.admission is not None]
        is_coming = self.scheduler._cache.is_coming  # who waits for a prefix may be overtaken
        waiting = [request.order for request in self.scheduler._tenants.waiting() if not is_coming(request.blocks)]
        assert not admitted or not waiting or max(admitted) < min(waiting), "someone overtook"

    def collect(self) -> None:
        for delta in self.scheduler.take_deltas():
            key = (delta.request_id, delta.sample)
            assert key not in self.ended, f"{key} goes on after its end"
            self.output[key] += delta.token_ids
            if delta.finish is not None:
                self.ended[key] = delta.finish.reason
                assert delta.finish.output_tokens == len(self.output[key])

    def finish(self) -> None:
        """Run to the end: within a bound, everyone ended once, with the tokens it gets alone."""
        self.scheduler.check()
        total = sum(len(new.prompt_token_ids) + new.sampling.max_tokens for new in self.accepted.values())
        bound = 4 * total + 10
        while self.scheduler.has_work():
            assert bound > 0, "someone starves"
            bound -= 1
            self.step()
        assert self.ended.keys() == self.accepted.keys()
        assert self.cache.num_free == self.cache.num_blocks
        self.cache.check([])
        for key, new in self.accepted.items():
            tokens, reason = run_alone(new, self.limits.max_model_len)
            if self.ended[key] in ("stop", "length"):
                assert (self.output[key], self.ended[key]) == (tokens, reason)
            else:
                assert self.output[key] == tokens[: len(self.output[key])]


@st.composite
def machines(draw: st.DrawFn) -> Traffic:
    block_tokens = draw(st.integers(1, 4))
    num_blocks = draw(st.integers(5, 10))
    max_running = draw(st.integers(1, 5))
    budget_tokens = draw(st.integers(max_running, 14))
    capacity = num_blocks * block_tokens
    return Traffic(
        CacheConfig(
            block_tokens=block_tokens,
            num_blocks=num_blocks,
            prefix_caching=draw(st.sampled_from([True, True, False])),
        ),
        SchedulerConfig(
            budget_tokens=budget_tokens,
            max_chunk_tokens=draw(st.integers(1, 6)),
            max_running=max_running,
            max_waiting=draw(st.integers(2, 9)),
            max_model_len=draw(st.sampled_from([capacity, capacity, capacity // 2, 2])),
            priority_aging_s=draw(st.sampled_from([0.0, 3.0, 100.0])),
        ),
    )


PROMPTS = st.one_of(
    st.lists(st.integers(0, 1), min_size=1, max_size=12),
    st.sampled_from([[0, 1, 0, 1, 1, 0, 1, 0, 0], [0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1]]),
)
ADD = st.tuples(
    st.just("add"),
    PROMPTS,
    st.integers(1, 20),  # max_tokens
    st.integers(0, 2),  # priority
    st.one_of(st.none(), st.none(), st.integers(1, 20)),  # deadline
    st.integers(1, 3),  # n
    st.integers(0, 4),  # tokens generated before, by another core
)
ABORT = st.tuples(st.just("abort"), st.integers(0, 9), st.one_of(st.none(), st.integers(0, 2)))
STEP = st.tuples(
    st.just("step"),
    st.integers(1, 4),
    st.one_of(st.none(), st.none(), st.integers(0, 9)),
    st.one_of(st.none(), st.none(), st.none(), st.integers(0, 3)),
)


def add_samples(traffic: Traffic, request_id: int, operation: tuple) -> None:  # type: ignore[type-arg]
    _, prompt, max_tokens, priority, deadline_s, n, num_before = operation
    prompt = prompt[: traffic.limits.max_model_len]
    for sample in range(n):
        sampling = SamplingParams(max_tokens=max_tokens, seed=sample, n=n, min_tokens=min(max_tokens, priority))
        new = NewRequest(
            request_id=request_id,
            sample=sample,
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            eos_token_ids=(EOS,),
            priority=priority,
            deadline_at_s=None if deadline_s is None else traffic.now + deadline_s,
        )
        before, _ = run_alone(new, traffic.limits.max_model_len)
        traffic.add(
            NewRequest(
                request_id=request_id,
                sample=sample,
                prompt_token_ids=tuple(prompt),
                output_token_ids=tuple(before[:num_before]),
                sampling=sampling,
                eos_token_ids=(EOS,),
                priority=priority,
                deadline_at_s=None if deadline_s is None else traffic.now + deadline_s,
            )
        )


@settings(max_examples=250, deadline=None, derandomize=True)
@given(machines(), st.lists(st.one_of(ADD, ADD, ADD, STEP, STEP, ABORT), min_size=6, max_size=30))
def test_random_traffic(traffic: Traffic, operations: list[tuple]) -> None:  # type: ignore[type-arg]
    num_requests = 0
    for operation in operations:
        if operation[0] == "add":
            add_samples(traffic, num_requests, operation)
            num_requests += 1
        elif operation[0] == "abort" and num_requests:
            traffic.abort(operation[1] % num_requests, operation[2])
        elif operation[0] == "step":
            _, count, abort, fail = operation
            for _ in range(count - 1):
                traffic.step()
            traffic.step(abort=None if abort is None or not num_requests else abort % num_requests, fail=fail)
        traffic.scheduler.check()
    traffic.finish()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_busy_traffic(seed: int) -> None:
    """Short prompts, long outputs, few blocks: nearly every run preempts. (Drawn by number: no small cases.)"""
    rng = random.Random(seed)
    block_tokens, num_blocks = rng.randint(1, 3), rng.randint(5, 9)
    max_running = rng.randint(3, 5)
    traffic = Traffic(
        CacheConfig(block_tokens=block_tokens, num_blocks=num_blocks),
        SchedulerConfig(
            budget_tokens=rng.randint(max_running, 12),
            max_chunk_tokens=rng.randint(1, 6),
            max_running=max_running,
            max_waiting=12,
            max_model_len=block_tokens * num_blocks,
            priority_aging_s=2.0,
        ),
    )
    prompts = [[rng.randint(0, 1) for _ in range(rng.randint(1, 2 * block_tokens + 1))] for _ in range(3)]
    for request_id in range(rng.randint(4, 9)):
        n = rng.choice((1, 1, 2))
        add_samples(
            traffic, request_id, ("add", rng.choice(prompts), rng.randint(4, 14), rng.randint(0, 2), None, n, 0)
        )
        for _ in range(rng.randint(0, 3)):
            traffic.step(abort=rng.randrange(request_id + 1) if rng.random() < 0.05 else None)
    traffic.finish()
