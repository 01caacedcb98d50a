"""`cierzo bench step --profile CHECKPOINT`: where a step's time goes, operation by operation.

A step is computed twice. The engine computes it as in use, the whole model in one native call: the time in native
calls against that of the whole step, scheduler and sampler included, says what Python and torch add. Then the model
is taken apart into its operations, which gives the table: calls, time, bytes, GB/s, GFLOP/s, and the share of the
limit, where the limit of an operation is the larger of bytes / read bandwidth and operations / GEMM rate of this
machine, measured at start.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from cierzo.bench.machine import Ceilings, measure_ceilings
from cierzo.bench.sequences import Sequences
from cierzo.bench.stats import median
from cierzo.bench.work import work
from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.messages import Submit
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.runner import ModelRunner
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cpu import native
from cierzo.kernels.registry import bind
from cierzo.scheduler.params import SamplingParams

BLOCKS = ("decoder", "mla_block", "gqa_block", "mlp_block", "moe_block")
REPEATS = 7
ENGINE_STEPS = 32  # of each batch that decodes
CONTEXT = 160  # tokens before a generated one: the middle of a 128 + 64 request


class OperationRow(msgspec.Struct, frozen=True, kw_only=True):
    """One operation in one step, the median over repeats; `share` of its limit."""

    operation: str
    calls: int
    ms: float
    megabytes: float
    gb_per_s: float
    gflop_per_s: float
    share: float


class StepProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of step. `overhead` is the share of `step_ms` that is not spent in native calls."""

    step: str
    step_ms: float
    native_ms: float
    overhead: float
    operations: list[OperationRow]


@dataclass(slots=True)
class _Total:
    calls: int = 0
    seconds: float = 0.0
    operations: float = 0.0
    num_bytes: float = 0.0


@contextmanager
def _watching() -> Iterator[dict[str, _Total]]:
    totals: dict[str, _Total] = defaultdict(_Total)

    def note(operation: str, args: Any, seconds: float) -> None:
        total = totals[operation]
        operations, num_bytes = work(operation, args)
        total.calls += 1
        total.seconds += seconds
        total.operations += operations
        total.num_bytes += num_bytes

    native.observe(note)
    try:
        yield totals
    finally:
        native.observe(None)


def profile(
    checkpoint: str, batches: list[int], prompts: list[int], **options: Any
) -> tuple[Ceilings, list[StepProfile]]:
    """Generated tokens of `batches` sequences, and prompts of so many tokens."""
    longest = max([CONTEXT, *prompts]) + 2 * ENGINE_STEPS
    base = EngineOptions(model=checkpoint, prefix_caching=False, **options)
    layout = resolve(base).layout
    count = max([1, *batches])
    blocks = count * (-(-longest // layout.block_tokens) + 1)
    gib = (blocks + 1) * layout.bytes_per_block / 2**30
    config = resolve(
        msgspec.structs.replace(base, max_model_len=longest, kv_cache_gib=gib, budget_tokens=max(longest, count))
    )
    sequences = Sequences(config, count, longest)
    core = EngineCore(config, ModelRunner(sequences.model, sequences.pool, config.scheduler.max_running))
    ceilings = measure_ceilings()
    found = []
    for batch in batches:
        engine = _engine(core, config.model.vocab_size, [CONTEXT - ENGINE_STEPS // 2] * batch, ENGINE_STEPS)
        pieces = [(CONTEXT - 1, 1)] * batch
        found.append(_profile(sequences, ceilings, f"decode {batch}", engine, pieces, generated=True))
    for tokens in prompts:
        engine = [run for _ in range(REPEATS) for run in _engine(core, config.model.vocab_size, [tokens], 0)]
        found.append(_profile(sequences, ceilings, f"prefill {tokens}", engine, [(0, tokens)], generated=False))
    return ceilings, found


def _engine(core: EngineCore, vocab_size: int, prompts: list[int], new_tokens: int) -> list[tuple[float, float]]:
    """(seconds of a step, seconds of it in native calls) of each step in which all decode; without new tokens, of
    the one step that computes the prompts."""
    bind(KernelsConfig(), "cpu")
    core.reset()
    for number, tokens in enumerate(prompts):
        prompt = [(position * 31 + number * 1017) % vocab_size for position in range(tokens)]
        sampling = SamplingParams(max_tokens=new_tokens + 1, temperature=0.0, seed=0, ignore_eos=True)
        core.submit(Submit(request_id=number, prompt_token_ids=prompt, sampling=sampling))
    runs = []
    while core.has_work():
        with _watching() as totals:
            begin = time.perf_counter()
            deltas = core.step_plain()
            seconds = time.perf_counter() - begin
        if new_tokens == 0 or sum(len(delta.token_ids) for delta in deltas) == len(prompts):
            runs.append((seconds, sum(total.seconds for total in totals.values())))
    return runs[1:] if new_tokens else runs  # the first has still computed a prompt


def _profile(
    sequences: Sequences,
    ceilings: Ceilings,
    name: str,
    engine: list[tuple[float, float]],
    pieces: list[tuple[int, int]],
    *,
    generated: bool,
) -> StepProfile:
    bind(KernelsConfig(implementations=dict.fromkeys(BLOCKS, "torch")), "cpu")
    sequences.step(pieces, generated)
    runs = []
    for _ in range(REPEATS):
        with _watching() as totals:
            sequences.step(pieces, generated)
        runs.append(totals)
    bind(KernelsConfig(), "cpu")
    return StepProfile(
        step=name,
        step_ms=median([whole for whole, _ in engine]) * 1e3,
        native_ms=median([native for _, native in engine]) * 1e3,
        overhead=median([1 - native / whole for whole, native in engine]),
        operations=[_row(operation, [run[operation] for run in runs], ceilings) for operation in runs[-1]],
    )


def _row(operation: str, totals: list[_Total], ceilings: Ceilings) -> OperationRow:
    seconds = median([total.seconds for total in totals])
    one = totals[-1]
    limit = max(one.num_bytes / ceilings.read.rate, one.operations / ceilings.bf16.rate) / 1e9
    return OperationRow(
        operation=operation,
        calls=one.calls,
        ms=seconds * 1e3,
        megabytes=one.num_bytes / 1e6,
        gb_per_s=one.num_bytes / seconds / 1e9,
        gflop_per_s=one.operations / seconds / 1e9,
        share=limit / seconds,
    )


def table(ceilings: Ceilings, profiles: list[StepProfile]) -> str:
    """As text."""
    lines = [f"limits: {ceilings.read.rate:.1f} GB/s read, {ceilings.bf16.rate:.0f} GFLOP/s bf16"]
    for step in profiles:
        lines.append(
            f"\n{step.step}: {step.step_ms:.2f} ms a step, {step.native_ms:.2f} ms in native calls, "
            f"{step.overhead:.1%} around them"
        )
        lines.append(
            f"  {'operation':22}{'calls':>6}{'ms':>9}{'MB':>9}{'GB/s':>8}{'GFLOP/s':>9}"
            f"{'of limit':>10}{'of step':>9}"
        )
        whole = sum(row.ms for row in step.operations)
        for row in sorted(step.operations, key=lambda row: -row.ms):
            lines.append(
                f"  {row.operation:22}{row.calls:6}{row.ms:9.3f}{row.megabytes:9.1f}{row.gb_per_s:8.1f}"
                f"{row.gflop_per_s:9.1f}{row.share:10.0%}{row.ms / whole:9.1%}"
            )
    return "\n".join(lines)
