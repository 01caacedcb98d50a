"""`python -m cierzo.bench.context CHECKPOINT`: the cost of a long context, for one request alone.

decode   one generated token after a context of synthetic cache entries, context by context: a step as in use, and
         attention in a step taken apart (bench/profile.py). Its limit is the larger of bytes / read bandwidth and
         operations / GEMM rate, both measured just before: a shared machine's rates change within minutes.
prefill  one prompt computed in chunks: each chunk's time, and the process's memory. Both forms of a layer's cost
         grow linearly with the context; memory must not grow.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec

from cierzo.bench.campaign.table import grid_of, text
from cierzo.bench.machine import measure_ceilings
from cierzo.bench.profile import OperationRow, Profiler, columns
from cierzo.bench.report import Recording, progress, run_benchmark
from cierzo.engine.checkpoint import checkpoint_folder
from cierzo.engine.config import EngineOptions
from cierzo.engine.errors import ConfigError
from cierzo.engine.options import add_checkpoint, count, positive

PROGRAM = "cierzo.bench.context"
ATTENTION = ("mla_decode", "gqa_decode")


class DecodeRow(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of one step at one context, and attention in it."""

    context: int
    step_ms: float
    attention: OperationRow


class ChunkRow(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk of a prompt: where it starts, its time, and the process's resident memory after it."""

    start: int
    tokens: int
    ms: float
    resident_gb: float


def measure_decode(profiler: Profiler, context: int, repeats: int) -> DecodeRow:
    """Measure the median of `repeats` steps at one context. Raises ConfigError without native kernels."""
    ceilings, pieces = measure_ceilings(), [(context - 1, 1)]
    seconds = [profiler.step(pieces, generated=True) for _ in range(repeats + 1)]  # the first warms up
    rows = profiler.operations(pieces, ceilings, generated=True)
    attention = next(row for row in rows if row.operation in ATTENTION)
    return DecodeRow(context=context, step_ms=median(seconds[1:]) * 1e3, attention=attention)


def measure_prefill(profiler: Profiler, tokens: int, chunk_tokens: int) -> list[ChunkRow]:
    """Measure a row per chunk of one prompt."""
    rows = []
    for start in progress(range(0, tokens, chunk_tokens), desc="prefill"):
        count = min(chunk_tokens, tokens - start)
        seconds = profiler.step([(start, count)], generated=False)
        rows.append(ChunkRow(start=start, tokens=count, ms=seconds * 1e3, resident_gb=resident_gb()))
    return rows


def resident_gb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write JSON if asked; exit status 2 for what cannot be measured."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.splitlines()[0], allow_abbrev=False)
    add_checkpoint(parser)
    parser.add_argument("--decode", type=count, nargs="*", default=[], metavar="TOKENS", help="contexts of a step")
    parser.add_argument("--prefill", type=count, default=0, metavar="TOKENS", help="length of the prompt")
    parser.add_argument("--chunk-tokens", type=count, default=1024, metavar="N", help="prompt tokens of one step")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="steps of each context")
    return run_benchmark(parser, _run, argv)


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.decode and not arguments.prefill:
        raise ConfigError("needs --decode or --prefill, else there is nothing to measure", field="decode")
    report = Recording("context", arguments.json, ["python", "-m", PROGRAM, *sys.argv[1:]])
    longest = max(*arguments.decode, arguments.prefill, 1)
    profiler = Profiler(EngineOptions(model=checkpoint_folder(arguments.checkpoint)), 1, longest, arguments.repeats)
    contexts = progress(arguments.decode, desc="decode")
    decode = [measure_decode(profiler, context, arguments.repeats) for context in contexts]
    prefill = measure_prefill(profiler, arguments.prefill, arguments.chunk_tokens)
    print(table(decode, prefill))
    report.write(vars(arguments) | {"json": None}, {"decode": decode, "prefill": prefill})
    return 0


def table(decode: Sequence[DecodeRow], prefill: Sequence[ChunkRow]) -> str:
    """The rows as text; of a prompt about 16 chunks, the last included."""
    contexts = [
        {"context": f"{row.context:,}", "step ms": f"{row.step_ms:.1f}"} | columns(row.attention) for row in decode
    ]
    chunks = [
        {
            "start": f"{chunk.start:,}",
            "tokens": f"{chunk.tokens:,}",
            "chunk ms": f"{chunk.ms:.1f}",
            "resident GB": f"{chunk.resident_gb:.3f}",
        }
        for chunk in [*prefill[: -1 : max(1, len(prefill) // 16)], *prefill[-1:]]
    ]
    return "\n\n".join(text(grid_of("", rows)) for rows in (contexts, chunks) if rows)


if __name__ == "__main__":
    raise SystemExit(main())
