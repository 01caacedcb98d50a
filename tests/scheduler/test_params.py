"""SamplingParams as a caller writes them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cierzo.scheduler.params import SamplingParams


@pytest.mark.parametrize(
    ("name", "given", "held"),
    [
        ("stop", "abc", ("abc",)),
        ("stop", "", ("",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", {"a"}, ("a",)),
        ("stop", ("a", "b"), ("a", "b")),
        ("stop_token_ids", 3, (3,)),
        ("stop_token_ids", [3, 4], (3, 4)),
        ("stop_token_ids", frozenset([3]), (3,)),
    ],
)
def test_one_stop_may_be_given_without_its_tuple(name: str, given: Any, held: tuple[object, ...]) -> None:
    params = SamplingParams(**{name: given})
    assert getattr(params, name) == held
    assert msgspec.structs.replace(SamplingParams(), **{name: given}) == params
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
