"""Reduced forms of `make structured` that take seconds, and what its figures are made by."""

from __future__ import annotations

import json

import pytest

from structured import exact, hostile, schemas
from structured.asking import LIKELY, UNLIKELY, bias_of
from structured.judge import CannotJudge, fault


def test_answers_of_random_schemas_validate(capsys):
    assert schemas.run("a few", schemas.random_schemas(40, first_seed=5_000)), capsys.readouterr().out


def test_answers_are_the_same_in_other_ways(capsys):
    assert exact.run(40), capsys.readouterr().out


def test_hostile_grammars_are_answered_and_the_core_lives(capsys):
    """How long the others wait meanwhile is a figure of the long form, on a machine that does nothing else."""
    names = [
        *("depth 10,000", "40,000 alternatives", "9,000 rules", "2,000 definitions", "what comes later"),
        *("x{100000}", "states that double", "nothing at all", "itself", "exponential unions"),
        *("another machine's schema", "a word of the house"),
    ]
    assert hostile.run(rounds=1, names=names, judges_gaps=False), capsys.readouterr().out


def test_the_suite_is_read_from_where_it_lies(tmp_path):
    tests = tmp_path / "jsonschema-4.26.0" / "json" / "tests"
    cases = [{"description": "d", "schema": {"type": "null"}, "tests": []}, {"description": "e", "schema": True}]
    for draft in schemas.DRAFTS:
        (tests / draft).mkdir(parents=True)
    (tests / "draft7" / "type.json").write_text(json.dumps(cases))
    (tests / "draft7" / f"{schemas.ANOTHER_DIALECT}.json").write_text(json.dumps(cases))
    ((place, schema),) = schemas.suite_schemas(tmp_path)
    assert place == "draft7 type: d"
    assert schema == {"$schema": "http://json-schema.org/draft-07/schema#", "type": "null"}


def test_the_judge():
    assert fault({"type": "integer"}, "1") == ""
    assert "is not of type" in fault({"type": "integer"}, '"1"')
    assert "no JSON" in fault({}, "{")
    assert fault({"format": "ipv4"}, '"1.2.3.400"')
    assert not fault({"format": "date"}, '"2021-02-29"')
    assert fault(
        {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 1, "exclusiveMinimum": True}, "1"
    )
    with pytest.raises(CannotJudge):
        fault({"pattern": r"\p{L}"}, '"a"')


def test_bias():
    pieces = [b"", b'"', b" ", b"7", b"a", b"a}", b"\n"]
    assert bias_of(pieces, [0]) == {0: LIKELY, 1: LIKELY, 2: UNLIKELY, 3: UNLIKELY, 5: LIKELY, 6: UNLIKELY}
