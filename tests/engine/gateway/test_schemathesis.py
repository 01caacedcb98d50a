"""schemathesis drives every endpoint by /openapi.json: no answer is a 500, and none contradicts the document."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

# That what the document allows is taken is not asked for: some rules are between fields ("stream_options: with
# stream true alone") or are the model's ("a role follows another"), and a schema does not say them.
OPTIONS = (
    *("--checks=all", "--exclude-checks=positive_data_acceptance", "--max-examples=6", "--workers=1", "--seed=1"),
    *("--generation-database=none", "--request-timeout=60", "--no-color", "--output-sanitize=false"),
)


@pytest.mark.parametrize(
    ("remote", "phases", "least"),
    [(False, "examples,coverage,fuzzing,stateful", 1000), (True, "examples,fuzzing", 50)],
    ids=["embedded", "gateway"],
)
def test_answers_are_as_the_document_says(opening, tmp_path: Path, remote, phases, least) -> None:
    house = opening("Hello", remote=remote)
    count = sum(map(len, house.get("/openapi.json").json()["paths"].values()))
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{house.url}/openapi.json", f"--phases={phases}"]
    done = subprocess.run([*command, *OPTIONS], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} selected / {count} total" in done.stdout, done.stdout
    found = re.search(r"(\d+) generated, \1 passed\n", done.stdout)
    assert found, done.stdout
    assert int(found[1]) > least
