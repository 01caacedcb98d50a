"""docs/models.md tells of every family and number format that the code knows, of no other, and its proofs exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from cierzo.engine.checkpoint_format import Scheme
from cierzo.engine.cost.weights import NumberFormats, weight_bytes
from cierzo.engine.errors import CheckpointError
from cierzo.engine.fields import Fields
from cierzo.engine.model.config_json import parse_config
from cierzo.engine.weights.shapes import named_model_config

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def column(first_head: str) -> list[str]:
    """The names in the first column of the table whose head begins so."""
    (table,) = re.findall(rf"^\| {first_head} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    return [re.findall(r"`?([\w-]+)`?", row.split("|")[1])[0] for row in table.splitlines()]


def test_the_families_are_those_that_the_code_knows() -> None:
    """The code names its families when it refuses another."""
    with pytest.raises(CheckpointError) as caught:
        parse_config(Fields({"model_type": "none of them"}))
    known = set(re.findall(r"\w+", str(caught.value.limit))) - {"or", "around", "one", "of", "them"}
    assert sorted(column("model type")) == sorted(known)


def test_the_number_formats_are_those_that_the_code_knows() -> None:
    assert sorted(column("scheme")) == sorted(get_args(Scheme))


def test_every_proof_is_there() -> None:
    told = set(re.findall(r"tests/[\w/]+\.py", TEXT))
    assert len(told) > 5
    assert [path for path in sorted(told) if not (ROOT / path).is_file()] == []


def test_the_bytes_are_those_of_the_code() -> None:
    model = named_model_config("small4")
    assert model is not None
    for weights in column("weights"):
        size = weight_bytes(model, NumberFormats(weights=weights))
        assert f"| {weights} | {-(-size // 10**8) / 10} GB |" in TEXT


def test_readme_links_it() -> None:
    assert "[docs/models.md](docs/models.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
