"""The time that matchers take of others: for an output that was brought, for a step's tokens, for who has ended."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest
from grammar_twin import FREE, VOCABULARY
from sampling_twin import request_of

from cierzo.engine.worker import grammars
from cierzo.engine.worker.grammars import Constraint, Makers, follow_all


class Slow:
    """A matcher whose tokens take their time, and how many it got at once."""

    def __init__(self, token_s: float) -> None:
        self.token_s = token_s
        self.times: list[int] = []

    def consume_tokens(self, token_ids: list[int]) -> bool:
        until_s = time.thread_time() + self.token_s * len(token_ids)
        while time.thread_time() < until_s:
            pass
        self.times.append(len(token_ids))
        return True

    def is_error(self) -> bool:
        return False

    is_stopped = is_accepting = is_error


def constraint_of(matcher: Slow) -> Constraint:
    one = Constraint(Makers())
    one._matcher = cast(Any, matcher)
    return one


def test_an_output_that_was_brought_holds_the_interpreter_for_a_moment_at_a_time() -> None:
    slow, quick = Slow(0.0004), Slow(0.0)
    for matcher in (slow, quick):
        one = constraint_of(matcher)
        one._consume([5] * 200)
        assert (one.num_followed, sum(matcher.times), one.error) == (200, 200, "")
    assert max(slow.times) <= 4 < max(quick.times) == grammars.CONSUMED_AT_ONCE
    hostile = constraint_of(Slow(0.03))
    hostile._consume([5] * 200)
    assert "to follow, more than 20 (token 2 of the answer)" in hostile.error


def test_nobody_is_told_late_for_long_behind_tokens_that_take_a_steps_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the order of admission, in which the first ones would take all of each step."""
    monkeypatch.setattr(Makers, "mask", lambda *_: None)
    monkeypatch.setattr(grammars, "FOLLOWED_WITHIN_S", 1.0)
    several = [constraint_of(Slow(0.004)) for _ in range(6)] + [constraint_of(Slow(0.0))]
    for _ in range(12):
        assert len(follow_all([(one, 5) for one in several])) >= 3
    assert several[-1].num_followed >= 6
    assert min(one.num_followed for one in several) >= 2


def test_nothing_is_made_for_who_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else who cancels what takes long to make would have all others wait for it."""
    made: list[str] = []
    make_matcher = Makers._matcher

    def noted(one: Makers, grammar: str) -> Any:
        made.append(grammar)
        return make_matcher(one, grammar)

    monkeypatch.setattr(Makers, "_matcher", noted)
    makers = Makers()
    makers.use(VOCABULARY)
    for number, num_dropped in enumerate((0, 1, 2)):
        asked = request_of(number, [1], {"grammar": f'{FREE}start: "{number}"', "n": 2})
        making = makers.open(asked)
        for constraint in making.constraints[:num_dropped]:
            constraint.drop()
        makers.num_at_work += 1
        makers._make(making, makers._made)
        assert makers.take_made() == [making]
        assert [one._matcher is None for one in making.constraints].count(True) == num_dropped
    assert made == [f'{FREE}start: "{number}"' for number in (0, 1)]
