"""schemathesis drives every endpoint by /openapi.json: no answer is a 500, and none contradicts the document."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

# That what the document allows is taken is not asked for: some rules are between fields ("stream_options: with
# stream true alone") or are the model's ("a role follows another"), and a schema does not say them.
OPTIONS = (
    *("--checks=all", "--exclude-checks=positive_data_acceptance", "--max-examples=10", "--workers=1"),
    *("--seed=1", "--generation-database=none", "--no-color", "--output-sanitize=false", "--request-timeout=60"),
)


def test_answers_are_as_the_document_says(either, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{either('Hello').url}/openapi.json", *OPTIONS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "17 selected / 17 total" in done.stdout, done.stdout
    found = re.search(r"(\d+) generated, \1 passed\n", done.stdout)
    assert found, done.stdout
    assert int(found[1]) > 1000
