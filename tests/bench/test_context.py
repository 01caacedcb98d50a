"""The benchmark of long contexts: its figures, from steps of known length; and a whole run, at short contexts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cierzo.bench import context
from cierzo.bench.machine import Ceiling, Ceilings
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.weights.make import make_checkpoint


def ceilings(read: float, bf16: float) -> Ceilings:
    """A machine that reads so many GB/s and computes so many GFLOP/s in bf16."""
    memory, product, other = (Ceiling(rate=rate, reached_by="") for rate in (read, bf16, 1e9))
    return Ceilings(threads=1, read_one_thread=other, read=memory, bf16=product, float32=other, int8=None)


def config_of(model: str, kv_dtype: Any = "bf16") -> EngineConfig:
    return resolve(EngineOptions(model=model, device="simulated:h200", weights="fp8", kv_dtype=kv_dtype))


class Scripted:
    """Stands for a model: steps take the seconds that were prepared for their context, in turn."""

    def __init__(self, seconds: dict[int, list[float]]) -> None:
        self.seconds = {length: iter(each) for length, each in seconds.items()}
        self.asked: list[tuple[int, int, bool]] = []
        self.filled = 0

    def fill(self) -> None:
        self.filled += 1

    def step(self, pieces: Sequence[tuple[int, int]], generated: bool) -> float:
        ((start, count),) = pieces
        self.asked.append((start, count, generated))
        return next(self.seconds[start + count])


def test_attention_is_counted_as_by_hand() -> None:
    """Small 4 reads a latent of 256 and 64 rotated values a token; each of 32 heads multiplies 320 for a score, 256
    for a sum. Small 3 reads a key and a value of 128 for 8 heads; each of 32 multiplies both."""
    operations, values = 36 * 1000 * 32 * 2 * (320 + 256), 36 * 1000 * 320
    assert context.attention_work(config_of("small4"), 1000) == (operations, 2 * values)
    assert context.attention_work(config_of("small4", "fp8"), 1000) == (operations, values)
    operations, values = 40 * 1000 * 32 * 2 * (128 + 128), 40 * 1000 * 8 * (128 + 128)
    assert context.attention_work(config_of("small3"), 1000) == (operations, 2 * values)
    assert context.attention_work(config_of("small3", "fp8"), 1000) == (operations, values)


def test_attention_is_what_a_step_takes_beyond_one_with_hardly_any_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians, without the first of each, which warms up. Limits are those measured beside a context."""
    found = iter([ceilings(100.0, 1000.0), ceilings(10.0, 1000.0)])
    monkeypatch.setattr(context, "measure_ceilings", lambda: next(found))
    short = [9.0, 0.3, 0.1, 0.2]
    steps = Scripted({32: short + short, 100_000: [9.0, 0.5, 0.7, 0.6], 50_000: [9.0, 0.4, 0.5, 0.6]})
    sequence: Any = steps
    computes, waits = context.measure_decode(sequence, config_of("small4"), [100_000, 50_000], repeats=3)
    assert steps.filled == 1
    assert steps.asked == [(31, 1, True), (99_999, 1, True)] * 4 + [(31, 1, True), (49_999, 1, True)] * 4
    operations, num_bytes = 36 * 100_000 * 32 * 2 * 576, 36 * 100_000 * 640
    assert msgspec.structs.asdict(computes) == pytest.approx(
        {
            "context": 100_000,
            "step_ms": 600.0,
            "attention_ms": 400.0,
            "gflop_per_s": operations / 0.4 / 1e9,
            "gb_per_s": num_bytes / 0.4 / 1e9,
            "limit_ms": operations / 1000e9 * 1e3,  # 133 ms; its bytes take 23
            "share": operations / 1000e9 / 0.4,
        }
    )
    assert (waits.step_ms, waits.attention_ms) == pytest.approx((500.0, 300.0))
    assert waits.limit_ms == pytest.approx(num_bytes / 2 / 10e9 * 1e3)  # 115 ms; its operations take 66
    assert waits.share == pytest.approx(waits.limit_ms / 300.0)


def test_a_prompt_is_computed_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = iter([1.0, 1.5, 1.25])
    monkeypatch.setattr(context, "resident_gb", lambda: next(resident))
    steps = Scripted({40: [0.5], 80: [0.75], 96: [0.25]})
    sequence: Any = steps
    rows = context.measure_prefill(sequence, tokens=96, chunk_tokens=40)
    assert steps.asked == [(0, 40, False), (40, 40, False), (80, 16, False)]
    assert [(row.start, row.tokens, row.ms, row.resident_gb) for row in rows] == [
        (0, 40, 500.0, 1.0),
        (40, 40, 750.0, 1.5),
        (80, 16, 250.0, 1.25),
    ]


def test_resident_memory_is_what_the_system_says() -> None:
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (kib,) = (line.split()[1] for line in status if line.startswith("VmRSS:"))
    assert context.resident_gb() == pytest.approx(int(kib) * 1024 / 1e9, rel=0.05)


def test_it_prints_and_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "measure_ceilings", lambda: ceilings(10.0, 100.0))
    checkpoint = make_checkpoint(tmp_path / "model", like="small4", scale="tiny")
    arguments = ["--decode", "64", "128", "--repeats", "1", "--prefill", "96", "--chunk-tokens", "40"]
    assert context.main([str(checkpoint), *arguments, "--json", str(tmp_path / "report.json")]) == 0
    results = msgspec.json.decode((tmp_path / "report.json").read_bytes())["results"]
    decode = msgspec.convert(results["decode"], list[context.DecodeRow])
    prefill = msgspec.convert(results["prefill"], list[context.ChunkRow])
    assert [row.context for row in decode] == [64, 128]
    assert decode[1].limit_ms == pytest.approx(2 * decode[0].limit_ms)
    assert all(row.share == pytest.approx(row.limit_ms / row.attention_ms) for row in decode)
    assert [(row.start, row.tokens) for row in prefill] == [(0, 40), (40, 40), (80, 16)]
    assert capsys.readouterr().out == context._table(decode, prefill) + "\n"


def test_the_table() -> None:
    decode = context.DecodeRow(
        context=131_072,
        step_ms=61.26,
        attention_ms=40.04,
        gflop_per_s=211.6,
        gb_per_s=7.34,
        limit_ms=20.0,
        share=0.5,
    )
    chunk = context.ChunkRow(start=1024, tokens=512, ms=75.25, resident_gb=1.5)
    assert context._table([decode], [chunk]).splitlines() == [
        "  context   step ms  attention ms  GFLOP/s   GB/s  limit ms  of limit",
        "  131,072      61.3          40.0      212    7.3      20.0       50%",
        "    start  tokens  chunk ms  resident GB",
        "    1,024     512      75.2        1.500",
    ]
