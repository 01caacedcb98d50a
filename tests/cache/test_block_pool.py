"""Free order and reference counts, by exact block ids."""

from __future__ import annotations

import pytest

from cierzo.cache.block_pool import BlockPool


def test_blank_blocks_come_first_in_order_of_id() -> None:
    pool = BlockPool(4)
    assert pool.take(2) == ([0, 1], 0)
    assert pool.num_free == 2
    pool.release(0, keep=True)
    assert pool.take(3) == ([2, 3, 0], 1)  # the cached one last, and reported as evicted
    assert pool.num_free == 0


def test_cached_blocks_leave_in_the_order_of_their_last_use() -> None:
    pool = BlockPool(3)
    pool.take(3)
    for block_id in (1, 2, 0):
        pool.release(block_id, keep=True)
    pool.share(1)  # used again: now the most recent
    pool.release(1, keep=True)
    assert pool.take(3) == ([2, 0, 1], 3)


def test_a_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(1)
    pool.take(1)
    pool.share(0)
    pool.release(0, keep=True)
    assert pool.num_free == 0
    assert pool.is_held(0)
    pool.release(0, keep=True)
    assert (pool.num_free, pool.num_cached, pool.is_held(0)) == (1, 1, False)


def test_discarded_content_makes_a_cached_block_blank_and_leaves_a_held_one_alone() -> None:
    pool = BlockPool(3)
    pool.take(2)
    pool.release(0, keep=True)
    pool.discard(0)
    pool.discard(1)
    assert (pool.num_free, pool.num_cached) == (2, 0)
    assert pool.take(2) == ([0, 2], 0)  # never an evicted one


def test_releasing_twice_is_a_bug_that_shows() -> None:
    pool = BlockPool(1)
    pool.take(1)
    pool.release(0, keep=False)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(0, keep=False)


def test_check_sees_a_leak() -> None:
    pool = BlockPool(2)
    pool.take(1)
    pool.check([1, 0], indexed=set())
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check([0, 0], indexed=set())
