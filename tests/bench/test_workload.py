"""Workloads: their spelling on the command line, files, what is refused; arrivals and prompts by their seed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cierzo.bench.workload import Workload, parse_workload, poisson_arrivals, random_prompt
from cierzo.engine.errors import ConfigError

GOOD = b'{"arrival_s": 0.5, "input_tokens": 10, "output_tokens": 3}\n'


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("2048/256@64", {"input_tokens": 2048, "output_tokens": 256, "concurrency": 64}),
        ("1024/256@3.5/s", {"input_tokens": 1024, "output_tokens": 256, "rate": 3.5}),
        ("1/1@7/s", {"input_tokens": 1, "output_tokens": 1, "rate": 7.0}),
        ("1152:1024/64@16", {"input_tokens": 1152, "shared_tokens": 1024, "output_tokens": 64, "concurrency": 16}),
    ],
)
def test_spelling(text: str, fields: dict[str, Any]) -> None:
    assert parse_workload(text) == Workload(**fields)
    assert parse_workload(str(parse_workload(text))) == Workload(**fields)


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("2048/256", "workload", "IN/OUT@CLIENTS"),
        ("2048/256@64/m", "workload", "must be"),
        ("-1/256@64", "workload", "must be"),
        ("no/such/file.jsonl", "workload", "must be"),
        ("0/256@64", "input_tokens", "at least 1, got 0"),
        ("10/0@64", "output_tokens", "at least 1, got 0"),
        ("10/1@0", "concurrency", "at least 1, got 0"),
        ("10/1@0/s", "rate", "from 1e-06 to 1000000000.0, got 0"),
        ("10/1@0.0000001/s", "rate", "got 1e-07"),
        ("10/1@1" + "0" * 400 + "/s", "rate", "got inf"),
        ("10:10/1@2", "shared_tokens", "0 to 9, got 10"),
    ],
)
def test_a_bad_spelling_is_refused_by_name(text: str, field: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_workload(text)
    assert caught.value.field == field


@pytest.mark.parametrize("fields", [{}, {"concurrency": 1, "rate": 1.0}])
def test_a_workload_is_one_thing(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="one of concurrency, rate and trace"):
        Workload(**fields)


def test_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "a.jsonl"
    trace.write_bytes(GOOD + b"\n" + GOOD.replace(b"3}", b'7, "shared_tokens": 9}'))
    workload = parse_workload(str(trace))
    assert [(one.output_tokens, one.shared_tokens) for one in workload.trace] == [(3, 0), (7, 9)]
    assert workload.longest_tokens == 17


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"arrival_s": 1, "input_tokens": 10}',
        b'{"arrival_s": 1, "input_tokens": 10, "output_tokens": 0}',
        b'{"arrival_s": 1, "input_tokens": 10.5, "output_tokens": 1}',
        b'{"arrival_s": NaN, "input_tokens": 10, "output_tokens": 1}',
        b'{"arrival_s": 1e17, "input_tokens": 10, "output_tokens": 1}',
        b'{"arrival_s": 1e999, "input_tokens": 10, "output_tokens": 1}',
        b'{"arrival_s": 1, "input_tokens": 10, "output_tokens": 1, "shared_tokens": 10}',
        b'{"arrival_s": 1, "input_tokens": 10, "output_tokens": 1, "shared_tokens": 4, "image_tokens": [4, 3]}',
        b'{"arrival_s": 1, "input_tokens": 10, "output_tokens": 1, "image_tokens": [0]}',
        b'{"arrival_s": 0.4, "input_tokens": 10, "output_tokens": 1}',
        b'{"arrival_s": 1, "input_tokens": 10, "output_tokens": 1, "priority": 2}',
    ],
)
def test_a_bad_line_of_a_trace_is_refused_with_its_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(GOOD + GOOD + line + b"\n" + GOOD)
    with pytest.raises(ConfigError, match="line 3") as caught:
        parse_workload(str(path))
    assert (caught.value.field, caught.value.value) == ("workload", f"{path}, line 3")


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"\n\n")
    with pytest.raises(ConfigError, match=r"trace\.jsonl has no lines"):
        parse_workload(str(path))


def test_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    times = poisson_arrivals(20_000, rate=50.0, seed=3)
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert min(gaps) >= 0
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert deviation == pytest.approx(mean, rel=0.05)  # of an exponential; 0 for evenly spaced arrivals


def test_seeds_repeat_and_differ() -> None:
    assert poisson_arrivals(5, 1.0, 7) == poisson_arrivals(5, 1.0, 7)
    assert poisson_arrivals(5, 1.0, 7) != poisson_arrivals(5, 1.0, 8)
    prompts = {tuple(random_prompt(index, 8, 1000, seed)) for index in range(20) for seed in range(2)}
    assert len(prompts) == 40
    assert random_prompt(3, 8, 1000, 0) == random_prompt(3, 8, 1000, 0)


def test_prompts_lie_in_the_vocabulary() -> None:
    ids = random_prompt(0, 500, 16, seed=0)
    assert len(ids) == 500
    assert set(ids) == set(range(16))
