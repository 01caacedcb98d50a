"""`python -m cierzo.bench.context CHECKPOINT`: the cost of a long context, for one request alone.

decode   one generated token after a context of synthetic cache entries, context by context. Attention's share is
         what a step takes beyond one with hardly any context; its limit is the larger of bytes / read bandwidth
         and operations / GEMM rate, both measured just before: a shared machine's rates change within minutes.
prefill  one prompt computed in chunks: each chunk's time, and the process's memory. Both forms of a layer's cost
         grow linearly with the context; memory must not grow.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Sequence
from pathlib import Path

import msgspec
from tqdm import tqdm

from cierzo.bench.ceilings import measure_ceilings
from cierzo.bench.report import Recording
from cierzo.bench.sequences import Sequences
from cierzo.bench.stats import median
from cierzo.engine.config import EngineConfig, EngineOptions, resolve
from cierzo.engine.cost.operations import gqa, mla_decode
from cierzo.engine.cost.weights import sizes_of

BASE_CONTEXT = 32  # tokens: what a step costs without attention to speak of
PROGRESS_AFTER_S = 2.0


class DecodeRow(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of one step at one context, and attention's rates and share of its limit.

    limit_ms: what attention would take at the ceilings measured beside it.
    """

    context: int
    step_ms: float
    attention_ms: float
    gflop_per_s: float
    gb_per_s: float
    limit_ms: float
    share: float


class ChunkRow(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk of a prompt: where it starts, its time, and the process's resident memory after it."""

    start: int
    tokens: int
    ms: float
    resident_gb: float


def attention_work(config: EngineConfig, context: int) -> tuple[float, float]:
    """(operations, bytes of cache entries) of one generated token's attention over a context, all layers."""
    sizes, tokens = sizes_of(config.model), context * config.model.num_layers
    entry_bytes = config.layout.bytes_per_token / config.model.num_layers
    if sizes.rank:
        work = mla_decode(sizes, 0, tokens, tokens, entry_bytes)
    else:
        work = gqa(sizes, 0, tokens, tokens, entry_bytes)
    return float(work.operations), float(work.num_bytes)


def measure_decode(
    sequence: Sequences, config: EngineConfig, contexts: Sequence[int], repeats: int
) -> list[DecodeRow]:
    """Measure a row per context, each the median of `repeats` steps."""
    sequence.fill()
    rows = []
    for context in tqdm(contexts, desc="decode", delay=PROGRESS_AFTER_S, leave=False, disable=None):
        ceilings = measure_ceilings()
        steps, bases = [], []
        for _ in range(repeats + 1):  # the first warms up
            bases.append(sequence.step([(BASE_CONTEXT - 1, 1)], generated=True))
            steps.append(sequence.step([(context - 1, 1)], generated=True))
        step_s, attention_s = median(steps[1:]), median(steps[1:]) - median(bases[1:])
        operations, num_bytes = attention_work(config, context)
        limit_s = max(operations / ceilings.bf16.rate, num_bytes / ceilings.read.rate) / 1e9
        rows.append(
            DecodeRow(
                context=context,
                step_ms=step_s * 1e3,
                attention_ms=attention_s * 1e3,
                gflop_per_s=operations / attention_s / 1e9,
                gb_per_s=num_bytes / attention_s / 1e9,
                limit_ms=limit_s * 1e3,
                share=limit_s / attention_s,
            )
        )
    return rows


def measure_prefill(sequence: Sequences, tokens: int, chunk_tokens: int) -> list[ChunkRow]:
    """Measure a row per chunk of one prompt."""
    rows = []
    for start in tqdm(
        range(0, tokens, chunk_tokens), desc="prefill", delay=PROGRESS_AFTER_S, leave=False, disable=None
    ):
        count = min(chunk_tokens, tokens - start)
        seconds = sequence.step([(start, count)], generated=False)
        rows.append(ChunkRow(start=start, tokens=count, ms=seconds * 1e3, resident_gb=resident_gb()))
    return rows


def resident_gb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write JSON if asked."""
    parser = argparse.ArgumentParser(
        prog="cierzo.bench.context", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--decode", type=int, nargs="*", default=[], metavar="TOKENS", help="contexts to decode at")
    parser.add_argument("--prefill", type=int, default=0, metavar="TOKENS", help="length of the prompt")
    parser.add_argument("--chunk-tokens", type=int, default=1024, metavar="N", help="prompt tokens of one step")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="steps of each context")
    parser.add_argument("--kv-dtype", choices=("auto", "int8"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and results here")
    arguments = parser.parse_args(argv)
    report = Recording("context", arguments.json, ("python", "-m", "cierzo.bench.context"))
    longest = max(*arguments.decode, arguments.prefill, BASE_CONTEXT)
    options = EngineOptions(model=arguments.checkpoint, kv_dtype=arguments.kv_dtype)
    layout = resolve(options).layout
    gib = (longest + 2 * layout.block_tokens) * layout.bytes_per_token / 2**30
    config = resolve(msgspec.structs.replace(options, max_model_len=longest, kv_cache_gib=gib))
    sequence = Sequences(config, 1, longest)
    decode = measure_decode(sequence, config, arguments.decode, arguments.repeats)
    prefill = measure_prefill(sequence, arguments.prefill, arguments.chunk_tokens) if arguments.prefill else []
    print(_table(decode, prefill))
    report.write(vars(arguments) | {"json": None}, {"decode": decode, "prefill": prefill})
    return 0


def _table(decode: list[DecodeRow], prefill: list[ChunkRow]) -> str:
    lines = []
    if decode:
        heads = f"{'context':>9}{'step ms':>10}{'attention ms':>14}{'GFLOP/s':>9}{'GB/s':>7}"
        lines.append(f"{heads}{'limit ms':>10}{'of limit':>10}")
    for row in decode:
        lines.append(
            f"{row.context:9,}{row.step_ms:10.1f}{row.attention_ms:14.1f}{row.gflop_per_s:9.0f}{row.gb_per_s:7.1f}"
            f"{row.limit_ms:10.1f}{row.share:10.0%}"
        )
    if prefill:
        lines.append(f"{'start':>9}{'tokens':>8}{'chunk ms':>10}{'resident GB':>13}")
    step = max(1, len(prefill) // 16)
    for chunk in [*prefill[:-1:step], *prefill[-1:]]:
        lines.append(f"{chunk.start:9,}{chunk.tokens:8,}{chunk.ms:10.1f}{chunk.resident_gb:13.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
