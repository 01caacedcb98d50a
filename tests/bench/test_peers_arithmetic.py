"""From raw times to the table: rates, samples on disk, medians, ratios, roofs, agreement."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cierzo.bench.peers import agreement
from cierzo.bench.peers.ceilings import Limits, limits
from cierzo.bench.peers.cells import LOAD, MEMORY, Cell, cells, decode_rate
from cierzo.bench.peers.engine import Checkpoint, Engine
from cierzo.bench.peers.results import close_pairs, ratios, rows, small4_over_small3
from cierzo.bench.peers.roof import roof
from cierzo.bench.peers.samples import Sample, Samples
from cierzo.bench.peers.table import table
from cierzo.engine.errors import ConfigError
from cierzo.engine.weights.shapes import shape_of

DECODE = Cell(name="decode-8", kind="decode", unit="tok/s", batch=8, prompt_tokens=128, new_tokens=64)
SERVED = Cell(name="served", kind="served", unit="req/s", batch=32, requests=96, prompt_tokens=512, new_tokens=64)
COMMIT = "abc"
LIMITS = Limits(50.0, 440.0, 900.0)


def engine(name: str, peer: str = "vllm", number_format: str = "bf16") -> Engine:
    return Engine(name=name, peer=peer, number_format=number_format, weight_bits=16, setting="")


ENGINES = [
    engine("cierzo-bf16", "cierzo"),
    engine("cierzo-int8", "cierzo", "int8"),
    engine("fast"),
    engine("slow"),
    engine("llama-q8", "llamacpp", "q8_0"),
]


def sample(name: str, value: float | None, number: int = 0, cell: Cell = DECODE, **more: str) -> Sample:
    settings = {"checkpoint": "small4", "commit": COMMIT, "started": "2026-01-01T00:00:00+00:00", **more}
    return Sample(cell=cell, engine=name, round=number, value=value, **settings)


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    return Samples(tmp_path / "samples.jsonl", COMMIT)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    folder = tmp_path / "small4"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape_of("small4", "mini").config("bfloat16")))
    return Checkpoint("small4", folder)


def test_decode_rate_counts_only_what_all_requests_decode() -> None:
    """The second request begins 2 s later, so that until then it is prefill, and the first ends 2 s before it."""
    first, second = [1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 4.0, 5.0, 6.0, 7.0]
    assert decode_rate([first, second]) == pytest.approx(4 / 2)
    assert decode_rate([first]) == pytest.approx(4 / 4)
    with pytest.raises(ValueError, match="no step"):
        decode_rate([[1.0, 2.0], [5.0, 6.0]])


def test_quick_measures_the_same_cells() -> None:
    full, quick = cells(quick=False), cells(quick=True)
    assert [cell.name for cell in full] == [cell.name for cell in quick]
    assert {(c.batch, c.new_tokens) for c in full if c.kind == "decode"} == {(1, 64), (8, 64), (32, 64)}
    assert [cell.prompt_tokens for cell in full if cell.kind == "prefill"] == [512, 2048, 8192]


def test_samples_survive_on_disk(samples: Samples, tmp_path: Path) -> None:
    samples.add(sample("fast", 3.0))
    samples.add(sample("slow", None, error="no memory"))
    again = Samples(tmp_path / "samples.jsonl", COMMIT)
    assert again.has("small4", DECODE, "fast", 0)
    assert not again.has("small4", DECODE, "fast", 1)
    assert not again.has("small3", DECODE, "fast", 0)
    assert not again.has("small4", DECODE, "slow", 0), "a failure is tried again"
    assert again.error("small4", DECODE, "slow") == "no memory"
    longer = Cell(name=DECODE.name, kind="decode", unit="tok/s", batch=8, prompt_tokens=128, new_tokens=32)
    assert not again.has("small4", longer, "fast", 0), "other sizes are another measurement"
    assert not Samples(tmp_path / "samples.jsonl", "def").has("small4", DECODE, "fast", 0), "so is another commit"


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"checkpoint": "small4"\n')
    with pytest.raises(ConfigError, match=r"samples\.jsonl, line 1"):
        Samples(tmp_path / "samples.jsonl", COMMIT)


def test_the_last_value_counts_but_the_most_memory(samples: Samples) -> None:
    for value in (3.0, 2.0):
        samples.add(sample("fast", value))
        samples.add(sample("fast", value, cell=MEMORY))
    assert samples.values("small4", DECODE, "fast") == {0: 2.0}
    assert samples.values("small4", MEMORY, "fast") == {0: 3.0}


def test_rows_have_median_spread_and_share_of_the_roof(samples: Samples, checkpoint: Checkpoint) -> None:
    for number, value in enumerate((90.0, 100.0, 110.0)):
        samples.add(sample("fast", value, number))
    samples.add(sample("slow", None, error="no memory"))
    fast, slow = rows(samples, [checkpoint], ENGINES, [DECODE], LIMITS)
    assert (fast.median, fast.spread, fast.rounds) == (100.0, pytest.approx(0.2), [0, 1, 2])
    assert fast.roof == pytest.approx(306.1, abs=0.1)
    assert (slow.median, slow.error) == (None, "no memory")
    text = table([fast, slow], [], [DECODE], ENGINES)
    assert "100 ±10% (33%)" in text
    assert "small4 slow decode-8: no memory" in text
    assert "cierzo-bf16" not in text


def test_ratios_are_paired_and_against_the_best(samples: Samples, checkpoint: Checkpoint) -> None:
    """Rounds differ by a factor of ten, the ratio within them does not."""
    for number, speed in enumerate((1.0, 10.0, 100.0)):
        samples.add(sample("cierzo-bf16", 3 * speed, number))
        samples.add(sample("cierzo-int8", 6 * speed, number))
        samples.add(sample("fast", 2 * speed, number))
        samples.add(sample("slow", speed, number))
        samples.add(sample("llama-q8", 4 * speed, number))
        samples.add(sample("cierzo-bf16", 2.0, number, cell=LOAD))
        samples.add(sample("fast", 8.0, number, cell=LOAD))
        samples.add(sample("slow", 4.0, number, cell=LOAD))
    samples.add(sample("fast", 1e6, 3))  # we did not run in this round
    found = {(r.cell, r.ours, r.against): r.ratio for r in ratios(samples, [checkpoint], ENGINES, [DECODE, LOAD])}
    assert found == {
        ("decode-8", "cierzo-bf16", "fast"): 1.5,
        ("decode-8", "cierzo-int8", "cierzo-bf16"): 2.0,
        ("decode-8", "cierzo-int8", "llama-q8"): 1.5,
        ("load", "cierzo-bf16", "slow"): 2.0,  # seconds: the best peer has the fewest
    }


def test_close_ratios_name_both_sides(samples: Samples, checkpoint: Checkpoint) -> None:
    for name, value in (("cierzo-bf16", 11.0), ("fast", 10.0), ("cierzo-int8", 11.5), ("llama-q8", 5.0)):
        samples.add(sample(name, value))
    found = ratios(samples, [checkpoint], ENGINES, [DECODE])
    assert close_pairs(found, ENGINES, 1.2) == {
        ("small4", "decode-8", "cierzo-bf16"),
        ("small4", "decode-8", "fast"),
    }, "int8 is close to our own bf16, which is no peer, and far from Q8_0"


def test_small4_over_small3(samples: Samples) -> None:
    samples.add(sample("cierzo-bf16", 4.0, cell=SERVED))
    samples.add(sample("cierzo-bf16", 2.0, cell=SERVED, checkpoint="small3"))
    samples.add(sample("fast", 4.0, cell=SERVED))
    (one,) = small4_over_small3(samples, SERVED, ENGINES)
    assert (one.ours, one.ratio) == ("cierzo-bf16", 2.0)
    assert small4_over_small3(samples, DECODE, ENGINES) == []


@pytest.mark.parametrize(
    ("like", "name", "tokens_per_s"),
    [
        ("small4", "decode-1", 134),
        ("small4", "prefill-2048", 1080),
        ("small3", "decode-1", 41),
        ("small3", "decode-8", 330),
        ("small3", "decode-32", 363),
        ("small3", "prefill-2048", 353),
    ],
)
def test_roofs_are_those_worked_out_by_hand(like: str, name: str, tokens_per_s: float) -> None:
    """At 50 GB/s and 440 GFLOP/s."""
    (cell,) = (cell for cell in cells(quick=False) if cell.name == name)
    config = shape_of(like, "mini").config("bfloat16")
    assert roof(cell, config, 16, LIMITS) == pytest.approx(tokens_per_s, abs=0.5)


def test_roof_of_int8_halves_bytes_and_uses_its_own_rate() -> None:
    config = shape_of("small4", "mini").config("bfloat16")
    decode, prefill = (cell for cell in cells(quick=False) if cell.name in ("decode-1", "prefill-2048"))
    assert roof(decode, config, 8, LIMITS) == pytest.approx(2 * (roof(decode, config, 16, LIMITS) or 0))
    assert roof(prefill, config, 8, LIMITS) == pytest.approx(900 / 440 * (roof(prefill, config, 16, LIMITS) or 0))
    assert roof(SERVED, config, 16, LIMITS) is None


def test_limits_are_medians_over_the_rounds() -> None:
    def measured(read: float) -> dict[str, object]:
        rate = {"rate": read, "reached_by": "x"}
        return {"threads": 2, "read_one_thread": rate, "read": rate, "bf16": rate, "float32": rate, "int8": None}

    assert limits([measured(40.0), measured(60.0), measured(50.0)]) == Limits(50.0, 50.0, 50.0)
    assert limits([]) is None


def test_agreement_tells_ties_from_errors() -> None:
    """Four positions over three tokens: equal, a tie of 0.05 nats, wrong by 2 nats, equal."""
    table = np.log(np.array([[[0.8, 0.1, 0.1], [0.4, 0.42, 0.18], [0.07, 0.51, 0.42], [0.1, 0.2, 0.7]]]))
    best = [0, 0, 0, 2]
    found = [[[(token, float(table[0, i, token]) + 0.25)] for i, token in enumerate(best)]]
    raw = agreement.compare(found, table.astype(np.float32)).raw
    assert (raw.top1_percent, raw.near_percent, raw.positions) == (50.0, 75.0, 4)
    assert raw.rms_logprob == pytest.approx(0.25, abs=1e-5)
    with pytest.raises(ValueError, match="positions"):
        agreement.compare([found[0][:3]], table.astype(np.float32))
