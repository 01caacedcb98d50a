"""`cierzo bench step --profile CHECKPOINT`: the time of a step, operation by operation.

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

from cierzo.bench.ceilings import measure_ceilings
from cierzo.bench.machine import Ceilings
from cierzo.bench.sequences import Sequences
from cierzo.bench.stats import median
from cierzo.bench.work import matrix_rows, work
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
    """An operation in a step, the median over repeats; `share` of its limit."""

    operation: str
    calls: int
    ms: float
    megabytes: float
    gb_per_s: float
    gflop_per_s: float
    share: float


class StepProfile(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of step. `overhead` is the share of `step_ms` that is not spent in native calls."""

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
def _watching(vocab_size: int) -> Iterator[dict[str, _Total]]:
    """The product with a matrix of `vocab_size` rows is told apart from the others: it is the output head's."""
    totals: dict[str, _Total] = defaultdict(_Total)

    def note(operation: str, args: Any, seconds: float) -> None:
        is_head = operation == "linear" and matrix_rows(args.weight) == vocab_size
        total = totals["lm_head" if is_head else operation]
        found = work(operation, args)
        total.calls += 1
        total.seconds += seconds
        total.operations += float(found.operations)
        total.num_bytes += float(found.num_bytes)

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
    profiler = Profiler(EngineOptions(model=checkpoint, **options), max([1, *batches]), longest)
    ceilings = measure_ceilings()
    steps = [profiler.decode(batch, ceilings) for batch in batches]
    return ceilings, steps + [profiler.prefill(tokens, ceilings) for tokens in prompts]


class Profiler:
    """A loaded model, and pages for `count` sequences of up to `longest` tokens."""

    def __init__(self, options: EngineOptions, count: int, longest: int, repeats: int = REPEATS) -> None:
        base = msgspec.structs.replace(options, prefix_caching=False)
        layout = resolve(base).layout
        blocks = count * (-(-longest // layout.block_tokens) + 1)
        self.config = config = resolve(
            msgspec.structs.replace(
                base,
                max_model_len=longest,
                kv_cache_gib=(blocks + 1) * layout.bytes_per_block / 2**30,
                max_running=count,
                budget_tokens=max(longest, count),
                max_chunk_tokens=None,
            )
        )
        self._repeats, self._vocab_size = repeats, config.model.vocab_size
        self.sequences = Sequences(config, count, longest)
        runner = ModelRunner(self.sequences.model, self.sequences.pool, config.scheduler.max_running)
        self._core = EngineCore(config, runner)

    def decode(self, batch: int, ceilings: Ceilings) -> StepProfile:
        """A step in which `batch` sequences generate."""
        engine = self._engine([CONTEXT - ENGINE_STEPS // 2] * batch, ENGINE_STEPS)
        rows = self.operations([(CONTEXT - 1, 1)] * batch, ceilings, generated=True)
        return _profile(f"decode {batch}", engine, rows)

    def prefill(self, tokens: int, ceilings: Ceilings) -> StepProfile:
        """A step that computes a prompt."""
        engine = [run for _ in range(self._repeats) for run in self._engine([tokens], 0)]
        rows = self.operations([(0, tokens)], ceilings, generated=False)
        return _profile(f"prefill {tokens}", engine, rows)

    def operations(
        self, pieces: list[tuple[int, int]], ceilings: Ceilings, *, generated: bool
    ) -> list[OperationRow]:
        """The step that computes `count` tokens from `start` of each sequence, for (start, count), taken apart."""
        bind(KernelsConfig(implementations=dict.fromkeys(BLOCKS, "composed")), "cpu")
        self.sequences.step(pieces, generated)
        runs = []
        for _ in range(self._repeats):
            with _watching(self._vocab_size) as totals:
                self.sequences.step(pieces, generated)
            runs.append(totals)
        bind(KernelsConfig(), "cpu")
        return [_row(operation, [run[operation] for run in runs], ceilings) for operation in runs[-1]]

    def _engine(self, prompts: list[int], new_tokens: int) -> list[tuple[float, float]]:
        """(seconds of a step, seconds of it in native calls) of each step in which all decode; without new tokens,
        of the one step that computes the prompts."""
        bind(KernelsConfig(), "cpu")
        core = self._core
        core.reset()
        for number, tokens in enumerate(prompts):
            prompt = [(position * 31 + number * 1017) % self._vocab_size for position in range(tokens)]
            sampling = SamplingParams(max_tokens=new_tokens + 1, temperature=0.0, seed=0, ignore_eos=True)
            core.submit(Submit(request_id=number, prompt_token_ids=prompt, sampling=sampling))
        runs = []
        while core.has_work():
            with _watching(self._vocab_size) as totals:
                begin = time.perf_counter()
                deltas = core.step_plain()
                seconds = time.perf_counter() - begin
            if new_tokens == 0 or sum(len(delta.token_ids) for delta in deltas) == len(prompts):
                runs.append((seconds, sum(total.seconds for total in totals.values())))
        return runs[1:] if new_tokens else runs  # the first has still computed a prompt


def _profile(name: str, engine: list[tuple[float, float]], rows: list[OperationRow]) -> StepProfile:
    return StepProfile(
        step=name,
        step_ms=median([whole for whole, _ in engine]) * 1e3,
        native_ms=median([native for _, native in engine]) * 1e3,
        overhead=median([1 - native / whole for whole, native in engine]),
        operations=rows,
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
    """Format profiles as text."""
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
