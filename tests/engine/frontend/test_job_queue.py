"""Turns between tenants whose prompts wait for an encoder."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cierzo.engine.frontend.job_queue import JobQueue


@dataclass(eq=False)
class Job:
    tenant: str
    length_bytes: int
    rank: float = 0.0


@pytest.fixture
def queue():
    return JobQueue[Job]()


def taken(queue, count, most_bytes=math.inf):
    return [job.tenant for _ in range(count) if (job := queue.take(most_bytes)) is not None]


def test_a_flood_of_short_prompts_holds_up_nobody_else(queue):
    for number in range(100):
        queue.add(Job("flood", 10, rank=number))
    queue.add(long := Job("other", 1000, rank=1e9))
    assert queue.take(math.inf).tenant == "flood"
    assert queue.take(math.inf) is long


def test_the_lowest_rank_of_a_tenant_goes_first(queue):
    for rank in (3.0, 1.0, 2.0):
        queue.add(Job("a", 10, rank))
    assert [queue.take(math.inf).rank for _ in range(3)] == [1.0, 2.0, 3.0]
    assert queue.take(math.inf) is None


def test_only_what_fits_is_taken_and_the_rest_keeps_its_place(queue):
    queue.add(long := Job("a", 1000))
    queue.add(short := Job("b", 10))
    queue.add(Job("b", 1000, rank=1.0))
    assert queue.take(100) is short
    assert queue.take(100) is None
    assert queue.take(math.inf) is long


def test_whoever_was_idle_has_saved_nothing_up(queue):
    queue.add(Job("b", 10))
    assert taken(queue, 1) == ["b"]
    for _ in range(40):
        queue.add(Job("a", 10))
    assert taken(queue, 20) == ["a"] * 20
    for _ in range(20):
        queue.add(Job("b", 10))
    assert abs(Counter(taken(queue, 20))["b"] - 10) <= 1


def test_a_job_that_is_dropped_is_not_taken(queue):
    queue.add(job := Job("a", 10))
    assert job in queue
    queue.discard(job)
    queue.discard(job)
    assert job not in queue
    assert [*queue] == []
    assert queue.take(math.inf) is None


def test_tenants_that_are_gone_are_forgotten(queue):
    for number in range(50):
        queue.add(Job(f"tenant {number}", 10))
    taken(queue, 50)
    queue.add(Job("a", 1000))
    queue.add(Job("a", 1000))
    taken(queue, 2)
    assert set(queue._given) <= {"a"}


@given(
    sizes=st.lists(st.lists(st.integers(1, 1000), min_size=30, max_size=30), min_size=2, max_size=4),
    count=st.integers(1, 30),
)
def test_tenants_that_wait_get_the_same_bytes(sizes, count):
    """As long as all have jobs waiting, nobody is ahead of another by more than the longest job."""
    queue, got = JobQueue[Job](), Counter()
    for number, each in enumerate(sizes):
        for rank, length_bytes in enumerate(each):
            queue.add(Job(str(number), length_bytes, rank))
    for _ in range(count):
        job = queue.take(math.inf)
        got[job.tenant] += job.length_bytes
    counts = [got[str(number)] for number in range(len(sizes))]
    assert max(counts) - min(counts) <= max(map(max, sizes))
