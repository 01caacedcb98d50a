"""Values kept as long as their objects live."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace

from cierzo.kernels.derived import derived


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Thing:
    number: int


class Value:
    alive = 0

    def __init__(self) -> None:
        Value.alive += 1

    def __del__(self) -> None:
        Value.alive -= 1


calls: list[tuple[int, int]] = []


@derived
def value_of(thing: Thing, times: int) -> Value | None:
    calls.append((thing.number, times))
    return Value() if times else None


def test_a_value_is_made_once_for_each_object_and_argument() -> None:
    calls.clear()
    one, other = Thing(1), Thing(1)
    assert value_of(one, 2) is value_of(one, 2)
    assert value_of(one, 3) is not value_of(one, 2)
    assert value_of(other, 2) is not value_of(one, 2)
    assert value_of(replace(one), 2) is not value_of(one, 2)
    assert value_of(one, 0) is None
    assert value_of(one, 0) is None
    assert calls == [(1, 2), (1, 3), (1, 2), (1, 2), (1, 0)]


def test_values_die_with_their_object_and_no_later_object_finds_them() -> None:
    gc.collect()
    before = Value.alive
    calls.clear()
    for number in range(100):  # each is likely to lie where the one before lay
        thing = Thing(number)
        assert value_of(thing, 1) is value_of(thing, 1)
        assert Value.alive == before + 1
        del thing
        assert Value.alive == before
    assert [number for number, _ in calls] == list(range(100))
