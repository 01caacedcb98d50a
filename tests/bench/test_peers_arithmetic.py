"""From raw times to the table: rates, medians, ratios, limits, transformers."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cierzo.bench.campaign.store import Sample, Store
from cierzo.bench.machine import Ceiling, Ceilings, limit_device
from cierzo.bench.peers import transformers
from cierzo.bench.peers.campaign import Peers
from cierzo.bench.peers.engine import LOAD, MEMORY, Cell, Engine, Subject, cells
from cierzo.bench.peers.process import decode_rate
from cierzo.bench.peers.results import limit, outcome_of, ratios, text, values
from cierzo.bench.revision import ROOT
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.weights.shapes import shape_of

DECODE = Cell(name="decode-8", kind="decode", unit="tok/s", batch=8, prompt_tokens=128, new_tokens=64)
SERVED = Cell(name="served", kind="served", unit="req/s", batch=32, requests=96, prompt_tokens=512, new_tokens=64)
IDENTITY = {"commit": "abc", "device": "a CPU"}
CHECKPOINT = Path("small4")


def rate(rate: float) -> Ceiling:
    return Ceiling(rate=rate, reached_by="test")


FOUND = Ceilings(
    threads=2,
    read=rate(50.0),
    bf16=rate(440.0),
    float32=rate(220.0),
    int8=rate(900.0),
)


def engine(name: str, peer: str = "vllm", number_format: str = "bf16") -> Engine:
    return Engine(name=name, peer=peer, number_format=number_format)


ENGINES = [
    engine("cierzo-bf16", "cierzo"),
    engine("cierzo-int8", "cierzo", "int8"),
    engine("fast"),
    engine("slow"),
    engine("llama-q8", "llamacpp", "q8_0"),
]


def add(store: Store, name: str, value: float | None, number: int = 0, cell: Cell = DECODE, **more: str) -> None:
    """A sample, or a failure."""
    subject = Subject(more.get("checkpoint", "small4"), name)
    result = None if value is None else {"value": value, "raw": None, "command": f"{ROOT}/run"}
    where = {"cell": str(cell), "subject": str(subject), "round": number}
    store.add(Sample(**where, started="", took_s=1.0, result=result, error=more.get("error", "")))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "samples.jsonl", IDENTITY)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "small4"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape_of("small4", "mini").config("bfloat16")))
    return folder


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


def test_other_sizes_are_another_cell() -> None:
    for full, quick in zip(cells(quick=False), cells(quick=True), strict=True):
        assert (str(full) == str(quick)) == (full == quick)
    assert str(DECODE) == "decode-8 (batch 8, prompt 128, new 64)"
    assert str(LOAD) == "load"


def test_the_last_value_counts_but_the_most_memory(store: Store) -> None:
    for value in (3.0, 2.0):
        add(store, "fast", value)
        add(store, "fast", value, cell=MEMORY)
    assert values(store, DECODE, Subject("small4", "fast")) == {0: 2.0}
    assert values(store, MEMORY, Subject("small4", "fast")) == {0: 3.0}


def test_rows_have_values_and_share_of_the_limit(store: Store, checkpoint: Path) -> None:
    for number, value in enumerate((90.0, 100.0, 110.0)):
        add(store, "fast", value, number)
    add(store, "slow", None, error="no memory")
    ceilings = {name: msgspec.to_builtins(getattr(FOUND, name)) for name in FOUND.__struct_fields__}
    for read in (40.0, 60.0, 50.0):
        result = {**ceilings, "read": {"rate": read, "reached_by": "test"}}
        store.add(Sample(cell="ceilings", subject="small4", round=0, started="", took_s=1.0, result=result))
    found = outcome_of([checkpoint], ENGINES, [DECODE], store)
    fast, slow = found.rows
    assert (fast.values, fast.rounds) == ([90.0, 100.0, 110.0], [0, 1, 2])
    assert fast.limit == pytest.approx(306.1, rel=0.03), "at the median of the ceilings"
    assert (slow.values, slow.error) == ([], "no memory")
    told = text(found, "make peers")
    assert f"100 ±10% ({100 / fast.limit:.0%})" in told
    assert "decode-8, small4 slow: NOT MEASURED: no memory" in told
    assert "50.0 GB/s read, 440 GFLOP/s in bf16" in told
    assert "cierzo-bf16" not in told
    assert next(sample["result"] for sample in found.samples) == {"value": 90.0, "raw": None, "command": "run"}


def test_ratios_are_against_the_best_peer(store: Store) -> None:
    """Rounds differ by a factor of ten, the ratio within them does not."""
    for number, speed in enumerate((1.0, 10.0, 100.0)):
        add(store, "cierzo-bf16", 3 * speed, number)
        add(store, "cierzo-int8", 6 * speed, number)
        add(store, "fast", 2 * speed, number)
        add(store, "slow", speed, number)
        add(store, "llama-q8", 4 * speed, number)
        add(store, "cierzo-bf16", 2.0, number, cell=LOAD)
        add(store, "fast", 8.0, number, cell=LOAD)
        add(store, "slow", 4.0, number, cell=LOAD)
    add(store, "fast", 1e6, 3)  # we did not run in this round
    found = ratios(store, [CHECKPOINT], ENGINES, [DECODE, LOAD])
    assert {(one.cell.name, one.ours.engine, one.against.engine): one.ratio for one in found} == {
        ("decode-8", "cierzo-bf16", "fast"): 1.5,
        ("decode-8", "cierzo-int8", "cierzo-bf16"): 2.0,
        ("decode-8", "cierzo-int8", "llama-q8"): 1.5,
        ("load", "cierzo-bf16", "slow"): 2.0,  # seconds: the best peer has the fewest
    }


def test_close_ratios_name_both_sides(store: Store) -> None:
    for name, value in (("cierzo-bf16", 11.0), ("fast", 10.0), ("cierzo-int8", 11.5), ("llama-q8", 5.0)):
        add(store, name, value)
    plan = Peers(checkpoints=[CHECKPOINT], engines=ENGINES, cells=[DECODE], rounds=1, folder=Path())
    wanted = plan.wanted(1, store)
    assert [one.name for one in ENGINES if wanted(DECODE, Subject("small4", one.name))] == [
        "cierzo-bf16",
        "fast",
    ], "int8 is close to our own bf16, which is no peer, and far from Q8_0"


def test_small4_over_small3(store: Store) -> None:
    add(store, "cierzo-bf16", 4.0, cell=SERVED)
    add(store, "cierzo-bf16", 2.0, cell=SERVED, checkpoint="small3")
    add(store, "fast", 4.0, cell=SERVED)
    *_, one = ratios(store, [CHECKPOINT], ENGINES, [SERVED, DECODE])
    assert (one.ours, one.against, one.ratio) == (
        Subject("small4", "cierzo-bf16"),
        Subject("small3", "cierzo-bf16"),
        2.0,
    )


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
def test_limits_are_those_worked_out_by_hand(tmp_path: Path, like: str, name: str, tokens_per_s: float) -> None:
    """At 50 GB/s and 440 GFLOP/s, from the weights and the pairs of attention alone: the cache costs up to 7 %."""
    (cell,) = (cell for cell in cells(quick=False) if cell.name == name)
    found = limit(cell, _model(tmp_path, like), "bf16", limit_device(FOUND))
    assert found is not None
    assert 0.93 * tokens_per_s < found < 1.005 * tokens_per_s


def test_limits_of_int8_halve_bytes_and_use_their_own_rate(tmp_path: Path) -> None:
    model, device = _model(tmp_path, "small4"), limit_device(FOUND)
    decode, prefill = (cell for cell in cells(quick=False) if cell.name in ("decode-1", "prefill-2048"))
    for cell, least, most in ((decode, 1.8, 2.0), (prefill, 1.5, 900 / 440)):  # attention stays in bf16
        bf16, int8, q8 = (limit(cell, model, name, device) for name in ("bf16", "int8", "q8_0"))
        assert bf16 is not None
        assert int8 is not None
        assert int8 == q8
        assert least < int8 / bf16 < most
    assert limit(SERVED, model, "bf16", device) is None


def _model(folder: Path, like: str) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(shape_of(like, "mini").config("bfloat16")))
    return read_model_config(folder)


def test_agreement_tells_ties_from_errors() -> None:
    """Four positions over three tokens: equal, a tie of 0.05 nats, wrong by 2 nats, equal."""
    table = np.log(np.array([[[0.8, 0.1, 0.1], [0.4, 0.42, 0.18], [0.07, 0.51, 0.42], [0.1, 0.2, 0.7]]]))
    best = [0, 0, 0, 2]
    found = [[[(token, float(table[0, i, token]) + 0.25)] for i, token in enumerate(best)]]
    raw = transformers.compare(found, table.astype(np.float32)).raw
    assert (raw["top1_percent"], raw["near_percent"], raw["positions"]) == (50.0, 75.0, 4)
    assert raw["rms_logprob"] == pytest.approx(0.25, abs=1e-5)
    with pytest.raises(ValueError, match="positions"):
        transformers.compare([found[0][:3]], table.astype(np.float32))
