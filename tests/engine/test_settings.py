"""Settings' limits in words, and values that are taken and refused: as a keyword and as a word of a command line.

And what such a refusal says (engine/errors.py): in numbers that are true.
"""

from __future__ import annotations

import random
from argparse import ArgumentTypeError
from fractions import Fraction
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pytest
from msgspec import Meta

from cierzo.engine.config import EngineOptions
from cierzo.engine.errors import ConfigError, amount, refusal
from cierzo.engine.frontend.config import FrontendConfig
from cierzo.engine.llm import LLM
from cierzo.engine.settings import limit_of, require, settings_of, word_reader

Few = Annotated[int, Meta(ge=1, le=9)]
Share = Annotated[float, Meta(gt=0)]
LARGEST = 2**63 - 1
NUMBER = "a finite number above 0"
GIB, GB = 1 << 30, 10**9


class Inner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A section."""

    size: Annotated[int, Meta(ge=1)] = 1


class Outer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A struct with a field of each kind."""

    few: Annotated[Few | None, Meta(description="how many")] = None
    share: Share = 0.5
    kind: Literal["a", "b"] = "a"
    on: bool = False
    name: str = "x"
    inner: Inner = Inner()
    others: dict[str, str] = {}


@pytest.mark.parametrize(
    ("annotation", "limit"),
    [
        (int, "an integer"),
        (Annotated[int, Meta(ge=0)], "an integer of at least 0"),
        (Annotated[Few | None, Meta(description="x")], "an integer from 1 to 9"),
        (float, "a finite number"),
        (Share | None, "a finite number above 0"),
        (Literal["auto", "on"], "one of auto, on"),
        (bool, "True or False"),
        (str, "text in UTF-8"),
        (tuple[int, ...], "an integer"),
        (Inner, "a Inner, or a mapping with its fields"),
        (dict[str, str], "a dict"),
    ],
)
def test_limits_in_words(annotation: Any, limit: str) -> None:
    assert limit_of(annotation) == limit


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        *(
            ("few", value, "an integer from 1 to 9")
            for value in (0, 10, 2**70, -(2**70), "3", True, 3.0, np.bool_(1))
        ),
        *(
            ("share", value, "a finite number above 0")
            for value in (0, -1, "1", None, True, float("nan"), 10**400, Fraction(10**400))
        ),
        *(("kind", value, "one of a, b") for value in ("c", "", 1, None, b"a")),
        *(("on", value, "True or False") for value in (1, "yes", None)),
        *(("name", value, "text in UTF-8") for value in (1, None, b"x")),
        ("inner", 3, "a Inner, or a mapping with its fields"),
        ("others", {"a": 1}, "a dict"),
    ],
)
def test_what_is_refused(field: str, value: Any, limit: str) -> None:
    for refused in (lambda: settings_of(Outer, {field: value}), lambda: require(Outer(**{field: value}))):
        with pytest.raises(ConfigError) as caught:
            refused()
        error = caught.value
        assert (error.field, error.limit) == (field, limit)
        assert error.message.startswith(f"{field} must be {limit}, got ")
        assert error.value == (None if value is None else str(value)[:200])


@pytest.mark.parametrize(
    ("given", "field", "limit"),
    [
        ({"inner": {"size": 0}}, "inner.size", "an integer of at least 1"),
        ({"inner": Inner(size=0)}, "inner.size", "an integer of at least 1"),
        ({"inner": Inner(size=2**70)}, "inner.size", f"an integer of at most {LARGEST}"),
        ({"inner": {"sise": 1}}, "inner.sise", "one of size"),
        ({"fwe": 1}, "fwe", "one of few"),
        ({"zzz": 1}, "zzz", "one of few, share, kind, on, name, inner, others"),
    ],
)
def test_sections_and_names(given: dict[str, Any], field: str, limit: str) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        settings_of(Outer, given)
    assert (caught.value.field, caught.value.limit) == (field, limit)


def test_what_is_taken() -> None:
    assert settings_of(Outer, {"share": 2**70}).share == 2.0**70
    given = {"few": np.int32(3), "share": 2, "inner": {"size": 7}, "others": {"a": "b"}}
    found = settings_of(Outer, given)
    assert found == Outer(few=3, share=2.0, inner=Inner(size=7), others={"a": "b"})
    assert (type(found.few), type(found.share)) == (int, float)
    assert require(Outer()) == Outer()
    assert require(EngineOptions(model="x")) == EngineOptions(model="x")


@pytest.mark.parametrize(
    ("annotation", "word", "value"),
    [
        (Few, "3", 3),
        (Few | None, "9", 9),
        (float, "1e3", 1000.0),
        (Annotated[float, Meta(gt=0)], "2", 2.0),
        (str, "é", "é"),
    ],
)
def test_words_that_are_read(annotation: Any, word: str, value: Any) -> None:
    found = word_reader(annotation)(word)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("annotation", "word", "limit"),
    [
        *((Few, word, "an integer from 1 to 9") for word in ("0", "10", "x", "", "1.0", "9" * 5000)),
        (int, str(2**63), f"an integer of at most {LARGEST}"),
        *(
            (Annotated[float, Meta(gt=0)], word, "a finite number above 0")
            for word in ("0", "nan", "inf", "1e999", "x")
        ),
        (str, "caf\udce9", "text in UTF-8"),
    ],
)
def test_words_that_are_refused(annotation: Any, word: str, limit: str) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        word_reader(annotation)(word)
    assert str(caught.value) == f"must be {limit}, got {word!r}"


@pytest.mark.parametrize(
    ("settings", "field", "limit", "value"),
    [
        ({"threads": 0}, "threads", "an integer from 1 to 1024", "0"),
        ({"threads": "4"}, "threads", "an integer from 1 to 1024", "4"),
        ({"threads": 100_000}, "threads", "an integer from 1 to 1024", "100000"),
        ({"dtype": "float16"}, "dtype", "one of auto, bfloat16, float32", "float16"),
        ({"kv_cache_gib": "1"}, "kv_cache_gib", "a finite number above 0", "1"),
        ({"thread": 2}, "thread", "one of threads, head, pin_threads", "2"),
        ({"frontend": FrontendConfig(max_samples=0)}, "frontend.max_samples", "an integer of at least 1", "0"),
        ({"frontend": {"max_samples": 0}}, "frontend.max_samples", "an integer of at least 1", "0"),
        ({"kernels": {"instruction_set": "sse"}}, "kernels.instruction_set", None, "sse"),
    ],
)
def test_keywords_of_the_engine_are_refused_before_anything_is_loaded(
    settings: dict[str, Any], field: str, limit: str | None, value: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM("no/such/folder", **settings)
    error = caught.value
    assert (error.field, error.value) == (field, value)
    assert error.limit == limit or limit is None
    assert f"{field}" in error.message
    assert "$" not in error.message


# --- what a refusal says ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_bytes", "unit", "down", "up"),
    [
        (0, GIB, "0.00", "0.00"),
        (1, GIB, "0.000000000931", "0.000000000932"),
        (98_304, GIB, "0.0000915", "0.0000916"),
        (40_000_000, GIB, "0.0372", "0.0373"),
        (GIB, GIB, "1.00", "1.00"),
        (GIB + 1, GIB, "1.00", "1.01"),
        (12_345_678_901, GB, "12.3", "12.4"),
        (237_930_000_000, GB, "237.9", "238.0"),
        (10**24, GB, "1000000000000000.0", "1000000000000000.0"),
    ],
)
def test_an_amount_has_digits_enough(num_bytes: int, unit: int, down: str, up: str) -> None:
    assert (amount(num_bytes, unit), amount(num_bytes, unit, up=True)) == (down, up)


def test_what_is_needed_never_reads_as_what_there_is() -> None:
    draw = random.Random(7)
    for _ in range(2000):
        room = int(10 ** draw.uniform(0, 15))
        need = room + int(10 ** draw.uniform(0, 6))
        there, needed = amount(room, GIB), amount(need, GIB, up=True)
        assert float(there) <= room / GIB
        assert float(needed) >= need / GIB
        assert float(there) < float(needed)


def test_a_refusal_names_field_limit_value_and_reason() -> None:
    error = refusal("threads", "an integer from 1 to 8", "4 ", "CPUs here")
    assert isinstance(error, ConfigError)
    assert str(error) == "threads must be an integer from 1 to 8 (CPUs here), got '4 '"
    assert (error.field, error.limit, error.value) == ("threads", "an integer from 1 to 8", "4 ")
    assert str(refusal("threads", 1, 2)) == "threads must be 1, got 2"
    assert len(str(refusal("name", "short", "x" * 10_000))) < 300
