"""Random traffic over tiny pools: whatever happens, everyone gets the tokens that it gets alone."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_traffic import EOS, Traffic, run_alone

from cierzo.cache.config import CacheConfig
from cierzo.scheduler.config import SchedulerConfig
from cierzo.scheduler.params import SamplingParams
from cierzo.scheduler.request import NewRequest


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
    st.one_of(st.none(), st.integers(0, 5)),  # the prompt is scored, and so many entries came before
)
ABORT = st.tuples(st.just("abort"), st.integers(0, 9), st.one_of(st.none(), st.integers(0, 2)))
STEP = st.tuples(
    st.just("step"),
    st.integers(1, 4),
    st.one_of(st.none(), st.none(), st.integers(0, 9)),
    st.one_of(st.none(), st.none(), st.none(), st.integers(0, 3)),
)


def add_samples(traffic: Traffic, request_id: int, operation: tuple) -> None:  # type: ignore[type-arg]
    _, prompt, max_tokens, priority, deadline_s, n, num_before, num_scored = operation
    prompt = prompt[: traffic.limits.max_model_len]
    for sample in range(n):
        sampling = SamplingParams(
            max_tokens=max_tokens,
            seed=sample,
            n=n,
            min_tokens=min(max_tokens, priority),
            prompt_logprobs=None if num_scored is None or sample else 0,
        )
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
                num_scored=0 if num_scored is None or sample else min(num_scored, len(prompt) - 1),
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
        job = ("add", rng.choice(prompts), rng.randint(4, 14), rng.randint(0, 2), None, n, 0, rng.choice((None, 0)))
        add_samples(traffic, request_id, job)
        for _ in range(rng.randint(0, 3)):
            traffic.step(abort=rng.randrange(request_id + 1) if rng.random() < 0.05 else None)
    traffic.finish()
