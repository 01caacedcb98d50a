"""The benchmark of long contexts: its figures, from steps of known length; and a whole run, at short contexts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from native_only import needs_native

from cierzo.bench import context
from cierzo.bench.machine import Ceiling, Ceilings
from cierzo.bench.profile import OperationRow
from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.weights.make import make_checkpoint

MEMORY, PRODUCT = Ceiling(rate=10.0, reached_by=""), Ceiling(rate=1e6, reached_by="")
CEILINGS = Ceilings(threads=1, read=MEMORY, bf16=PRODUCT, float32=PRODUCT, int8=None)


class Scripted:
    """Stands for a profiler: steps take the seconds that were prepared for their context, in turn."""

    def __init__(self, seconds: dict[int, list[float]], rows: Sequence[OperationRow] = ()) -> None:
        self.seconds = {length: iter(each) for length, each in seconds.items()}
        self.rows = list(rows)
        self.asked: list[tuple[int, int, bool]] = []

    def step(self, pieces: Sequence[tuple[int, int]], *, generated: bool) -> float:
        ((start, count),) = pieces
        self.asked.append((start, count, generated))
        return next(self.seconds[start + count])

    def operations(
        self, pieces: Sequence[tuple[int, int]], found: Ceilings, *, generated: bool
    ) -> list[OperationRow]:
        assert (list(pieces), found, generated) == ([(99_999, 1)], CEILINGS, True)
        return self.rows


def row(operation: str, ms: float, share: float) -> OperationRow:
    return OperationRow(
        operation=operation, calls=3, ms=ms, megabytes=5.0, gb_per_s=6.0, gflop_per_s=7.0, share=share
    )


def test_a_context_s_row_has_the_whole_step_and_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians, without the first step, which warms up. Limits are those measured beside the context."""
    monkeypatch.setattr(context, "measure_ceilings", lambda: CEILINGS)
    attention = row("mla_decode", 400.0, 0.25)
    steps = Scripted({100_000: [9.0, 0.5, 0.7, 0.6]}, [row("linear", 90.0, 0.9), attention])
    profiler: Any = steps
    found = context.measure_decode(profiler, 100_000, repeats=3)
    assert found == context.DecodeRow(context=100_000, step_ms=600.0, attention=attention)
    assert steps.asked == [(99_999, 1, True)] * 4


def test_a_prompt_is_computed_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = iter([1.0, 1.5, 1.25])
    monkeypatch.setattr(context, "resident_gb", lambda: next(resident))
    steps = Scripted({40: [0.5], 80: [0.75], 96: [0.25]})
    profiler: Any = steps
    rows = context.measure_prefill(profiler, tokens=96, chunk_tokens=40)
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


@needs_native
def test_it_prints_and_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "measure_ceilings", lambda: CEILINGS)
    checkpoint = make_checkpoint(tmp_path / "model", like="small4", scale="tiny")
    entry_bytes = resolve(EngineOptions(model=str(checkpoint))).layout.bytes_per_token  # of all layers
    arguments = ["--decode", "64", "128", "--repeats", "1", "--prefill", "96", "--chunk-tokens", "40"]
    assert context.main([str(checkpoint), *arguments, "--json", str(tmp_path / "report.json")]) == 0
    results = msgspec.json.decode((tmp_path / "report.json").read_bytes())["results"]
    decode = msgspec.convert(results["decode"], list[context.DecodeRow])
    prefill = msgspec.convert(results["prefill"], list[context.ChunkRow])
    assert [row.context for row in decode] == [64, 128]
    # a token's latents, 2 bytes a value: twice the context, and the query's rows as before
    megabytes = [row.attention.megabytes for row in decode]
    assert megabytes[1] - megabytes[0] == pytest.approx(64 * entry_bytes / 1e6)
    assert [(row.start, row.tokens) for row in prefill] == [(0, 40), (40, 40), (80, 16)]
    assert capsys.readouterr().out == context.table(decode, prefill) + "\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{tmp}/none", "--decode", "5"], "checkpoint must be the folder of a checkpoint, got "),
        (["{tmp}", "--decode", "5"], "is no checkpoint: it has neither config.json nor params.json"),
        (["{tmp}", "--decode", "5", "--json", "{tmp}/none/x"], "none/x cannot be written"),
        (["{tmp}"], "needs --decode or --prefill"),
        (["{tmp}", "--decode", "0"], "--decode: must be an integer from 1 to 1048576, got '0'"),
        (["{tmp}", "--decode", "99999999"], "--decode: must be an integer from 1 to 1048576, got '99999999'"),
        (["{tmp}", "--prefill", "-1"], "--prefill: must be an integer from 1 to 1048576, got '-1'"),
        (
            ["{tmp}", "--prefill", "5", "--chunk-tokens", "0"],
            "--chunk-tokens: must be an integer from 1 to 1048576",
        ),
        (["{tmp}", "--decode", "5", "--repeats", "0"], "--repeats: must be an integer of at least 1, got '0'"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = context.main([word.format(tmp=tmp_path) for word in words])
    except SystemExit as error:  # argparse's
        status = int(str(error))
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("cierzo.bench.context: ")
    assert told in err


def test_the_demo_model_can_be_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(context, "checkpoint_folder", {"demo": "/nowhere"}.__getitem__)
    assert context.main(["demo", "--decode", "5"]) == 2
    assert capsys.readouterr().err.endswith("must be the folder of a checkpoint, got '/nowhere'\n")


def test_the_table() -> None:
    attention = OperationRow(
        operation="mla_decode", calls=36, ms=40.04, megabytes=294.0, gb_per_s=7.34, gflop_per_s=211.6, share=0.5
    )
    decode = context.DecodeRow(context=131_072, step_ms=61.26, attention=attention)
    chunk = context.ChunkRow(start=1024, tokens=512, ms=75.25, resident_gb=1.5)
    assert context.table([decode], [chunk]).splitlines() == [
        "context  step ms   operation  calls      ms     MB  GB/s  GFLOP/s  of limit",
        "131,072     61.3  mla_decode     36  40.040  294.0   7.3    211.6       50%",
        "",
        "start  tokens  chunk ms  resident GB",
        "1,024     512      75.2        1.500",
    ]
