"""A limit that tenants share: nobody is refused within the part that is kept for it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cierzo.engine.errors import Overloaded
from cierzo.engine.frontend.pool import Pool
from cierzo.engine.frontend.tenants import Tenant

NAMES = ("a", "b", "c", "stranger")
moves = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 40), st.booleans()), max_size=60)


def fits(pool, name, count):
    """Whether a tenant gets so much more, which is then taken."""
    try:
        pool.require(name, count, 1.0)
    except Overloaded:
        return False
    pool.add(name, count)
    return True


def test_one_tenant_has_all_of_it():
    pool = Pool("max_things", 10)
    pool.divide([Tenant()])
    assert fits(pool, "default", 10)
    with pytest.raises(Overloaded, match="max_things is 10") as caught:
        pool.require("default", 1, 2.5)
    error = caught.value
    assert (error.field, error.limit, error.value, error.retry_after_s) == ("max_things", "10", "11", 2.5)


def test_half_is_kept_by_weight():
    pool = Pool("max_things", 100)
    pool.divide([Tenant(name="a", weight=3), Tenant(name="b")])
    assert fits(pool, "b", 62)  # 12 that are its own, and the common half
    pool.add("a", 7)
    with pytest.raises(Overloaded, match="max_things is 100, for all tenants together") as caught:
        pool.require("b", 2, 1.0)
    assert (caught.value.limit, caught.value.value) == ("100, for all tenants together", "64")  # its own alone
    pool.add("a", -7)
    assert fits(pool, "a", 37)
    pool.add("b", -10)
    assert fits(pool, "a", 10)
    assert pool.num == 99


@given(moves, st.integers(1, 100), st.lists(st.floats(0.001, 1000), min_size=3, max_size=3))
@settings(max_examples=300, deadline=None)
def test_nobody_is_refused_within_its_part_and_all_together_stay_within_the_limit(moves, limit, weights):
    pool = Pool("max_things", limit)
    tenants = [Tenant(name=name, weight=weight) for name, weight in zip("abc", weights, strict=True)]
    pool.divide(tenants)
    parts = {each.name: int(limit / 2 * each.weight / sum(weights)) for each in tenants} | {"stranger": 0}
    used = dict.fromkeys(NAMES, 0)
    for name, count, gives_back in moves:
        if gives_back:
            count = min(count, used[name])
            pool.add(name, -count)
            used[name] -= count
            continue
        common = limit - sum(parts.values())
        beyond = {each: max(0, used[each] + count * (each == name) - parts[each]) for each in NAMES}
        expected = used[name] + count <= parts[name] or sum(beyond.values()) <= common
        assert fits(pool, name, count) == expected
        used[name] += count * expected
        assert pool.num == sum(used.values()) <= limit
        assert [pool.over(each) for each in NAMES] == [max(0, used[each] - parts[each]) for each in NAMES]


def test_nothing_is_left_of_who_has_gone():
    pool = Pool("max_things", 10)
    pool.divide([Tenant(name="a")])
    for name in ("stranger", "another"):
        pool.add(name, 3)
        pool.add(name, -3)
    assert pool._parts.keys() == {"a"}


@given(moves, st.lists(st.floats(0.01, 100), min_size=3, max_size=3))
@settings(max_examples=100, deadline=None)
def test_another_division_counts_what_is_taken_already(moves, weights):
    pool, limit = Pool("max_things", 100), 100
    pool.divide([Tenant()])
    for name, count, _ in moves:
        fits(pool, name, count)
    pool.divide([Tenant(name=name, weight=weight) for name, weight in zip("abc", weights, strict=True)])
    twin = Pool("max_things", limit)
    twin.divide([Tenant(name=name, weight=weight) for name, weight in zip("abc", weights, strict=True)])
    for name in NAMES:
        twin.add(name, pool.used(name))
    for name in NAMES:
        assert fits(pool, name, 7) == fits(twin, name, 7)
