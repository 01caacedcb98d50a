"""`cierzo bench step --profile CHECKPOINT`: the time of a step, operation by operation.

A step is computed twice: by the engine as in use, where the time beside the one native call is what Python and
torch add, then taken apart into its operations. The limit of an operation is the larger of bytes / read bandwidth
and operations / GEMM rate of this machine, by engine/cost, with the experts that the step chose.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from statistics import fmean, median
from typing import Any

import msgspec
import numpy as np
import torch

from cierzo.bench.campaign.table import grid_of, text
from cierzo.bench.machine import Ceilings, limit_device, measure_ceilings
from cierzo.cache.pool import MlaPages
from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.cost.operations import Work
from cierzo.engine.cost.step_model import StepModel
from cierzo.engine.cost.work import StepShape
from cierzo.engine.errors import ConfigError
from cierzo.engine.messages import Submit
from cierzo.engine.worker.core import EngineCore
from cierzo.engine.worker.runner import ModelRunner, load_model
from cierzo.kernels.config import KernelsConfig
from cierzo.kernels.cpu import native
from cierzo.kernels.ops.attention import PagedQueries
from cierzo.kernels.ops.block import StepRows
from cierzo.kernels.registry import bind, has_native
from cierzo.scheduler.params import SamplingParams

BLOCKS = ("decoder", "mla_block", "gqa_block", "mlp_block", "moe_block")
REPEATS = 7
ENGINE_STEPS = 32  # of each batch that decodes
CONTEXT = 160  # tokens before a generated one: the middle of a 128 + 64 request
FILLED = 1 << 20  # values that are drawn; pages repeat them
Pieces = list[tuple[int, int]]  # of each sequence: the first position that a step computes, and how many


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
    """A loaded model, and `count` sequences of up to `longest` tokens, their blocks scattered over its pages."""

    def __init__(self, options: EngineOptions, count: int, longest: int, repeats: int = REPEATS) -> None:
        base = msgspec.structs.replace(options, prefix_caching=False)
        layout = resolve(base).layout
        width = -(-longest // layout.block_tokens)
        self.config = config = resolve(
            msgspec.structs.replace(
                base,
                max_model_len=longest,
                kv_cache_gib=(count * (width + 1) + 1) * layout.bytes_per_block / 2**30,
                max_running=count,
                budget_tokens=max(longest, count),
                max_chunk_tokens=None,
            )
        )
        self._repeats, self._block_tokens = repeats, layout.block_tokens
        self._model, self._pool, _ = load_model(config)
        generator = torch.Generator().manual_seed(0)  # a step chooses the same experts whenever it is measured
        order = torch.randperm(self._pool.num_blocks, generator=generator).int()
        self._tables = order[: count * width].view(count, width)
        self._fill(generator)

    def decode(self, batch: int, ceilings: Ceilings) -> StepProfile:
        """A step in which `batch` sequences generate."""
        engine = self._engine([CONTEXT - ENGINE_STEPS // 2] * batch, ENGINE_STEPS)
        return self._profile(f"decode {batch}", engine, [(CONTEXT - 1, 1)] * batch, ceilings, generated=True)

    def prefill(self, tokens: int, ceilings: Ceilings) -> StepProfile:
        """A step that computes a prompt."""
        engine = [run for _ in range(self._repeats) for run in self._engine([tokens], 0)]
        return self._profile(f"prefill {tokens}", engine, [(0, tokens)], ceilings, generated=False)

    def _profile(
        self, name: str, engine: list[tuple[float, float]], pieces: Pieces, ceilings: Ceilings, *, generated: bool
    ) -> StepProfile:
        whole_s, native_s = np.array(engine).T
        return StepProfile(
            step=name,
            step_ms=float(np.median(whole_s)) * 1e3,
            native_ms=float(np.median(native_s)) * 1e3,
            overhead=float(np.median(1 - native_s / whole_s)),
            operations=self.operations(pieces, ceilings, generated=generated),
        )

    # --- steps by hand -------------------------------------------------------------------------------------

    def step(self, pieces: Pieces, *, generated: bool) -> float:
        """Seconds of a step of the model as in use, the logits of each sequence's last row included."""
        return self._seconds(self._rows(pieces, generated=generated), pieces)

    def operations(self, pieces: Pieces, ceilings: Ceilings, *, generated: bool) -> list[OperationRow]:
        """A step taken apart. Raises ConfigError without native kernels, whose calls are what is timed."""
        if not has_native():
            raise ConfigError("operations are native calls, and no native kernels are installed", field="device")
        rows = self._rows(pieces, generated=generated)
        bind(KernelsConfig(implementations=dict.fromkeys(BLOCKS, "composed")), "cpu")
        distinct = self._distinct(rows, pieces)
        runs = []
        for _ in range(self._repeats):
            with _watching() as calls:
                self._seconds(rows, pieces)
            runs.append(calls | {"lm_head": [calls["linear"].pop()]})  # a step's last product is the output head's
        bind(KernelsConfig(), "cpu")
        model = StepModel(self.config, limit_device(ceilings), lambda _: distinct)
        counted = {work.operation: work for work in model.work(StepShape.of(pieces, generated=generated))}
        return [_row(counted.get(name, Work(name, 0)), [run[name] for run in runs], ceilings) for name in runs[-1]]

    def _fill(self, generator: torch.Generator) -> None:
        """Synthetic entries in every page, of the size that a norm leaves; zeros in INT8, whose bytes hold scales.
        Tokens that see what is not finite all choose the same experts."""
        for pages in self._pool.layers:
            for tensor in (pages.latents,) if isinstance(pages, MlaPages) else (pages.keys, pages.values):
                first, *others = tensor.view(-1).split(FILLED)
                coded = tensor.dtype == torch.uint8
                first.copy_(torch.zeros(first.shape) if coded else torch.randn(first.shape, generator=generator))
                for part in others:
                    part.copy_(first[: len(part)])

    def _distinct(self, rows: StepRows, pieces: Pieces) -> float:
        """Experts that the step's tokens choose, in a layer on average; 0 of a model without experts."""
        moe, layers = self.config.model.moe, self.config.model.num_layers
        if moe is None:
            self._seconds(rows, pieces)  # warms up, as the other does
            return 0.0
        shape = (layers - moe.first_dense_layers, len(rows.token_ids), moe.experts_per_token)
        expert_ids = torch.empty(shape, dtype=torch.int64)
        self._seconds(replace(rows, expert_ids=expert_ids), pieces)
        return fmean(len(layer.unique()) for layer in expert_ids)

    def _seconds(self, rows: StepRows, pieces: Pieces) -> float:
        last = torch.tensor([count for _, count in pieces]).cumsum(0) - 1
        begin = time.perf_counter()
        self._model.logits(rows, self._pool, last)
        return time.perf_counter() - begin

    def _rows(self, pieces: Pieces, *, generated: bool) -> StepRows:
        lengths, contexts = [count for _, count in pieces], [start + count for start, count in pieces]
        positions = torch.cat([torch.arange(start, start + count) for start, count in pieces])
        owners = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor(lengths))
        blocks = self._tables[owners, positions // self._block_tokens].long()
        segments = PagedQueries.of(lengths, contexts, list(range(len(pieces))), self._tables)
        groups = (segments, PagedQueries.of([], [], [], self._tables))
        return StepRows(
            (positions * 31 + owners * 17) % self.config.model.vocab_size,
            positions,
            blocks * self._block_tokens + positions % self._block_tokens,
            0 if generated else len(positions),
            *(groups[::-1] if generated else groups),
        )

    # --- steps of the engine -------------------------------------------------------------------------------

    @cached_property
    def _core(self) -> EngineCore:
        return EngineCore(self.config, ModelRunner(self._model, self._pool, self.config.scheduler.max_running))

    def _engine(self, prompts: list[int], new_tokens: int) -> list[tuple[float, float]]:
        """(seconds of a step, seconds of it in native calls) of each step in which all decode; without new tokens,
        of the one step that computes the prompts."""
        core, vocab_size = self._core, self.config.model.vocab_size
        core.reset()
        for number, tokens in enumerate(prompts):
            prompt = [(position * 31 + number * 1017) % vocab_size for position in range(tokens)]
            sampling = SamplingParams(max_tokens=new_tokens + 1, temperature=0.0, seed=0, ignore_eos=True)
            core.submit(Submit(request_id=number, prompt_token_ids=prompt, sampling=sampling))
        runs = []
        while core.has_work():
            with _watching() as calls:
                begin = time.perf_counter()
                deltas = core.step_plain()
                seconds = time.perf_counter() - begin
            if new_tokens == 0 or sum(len(delta.token_ids) for delta in deltas) == len(prompts):
                runs.append((seconds, sum(sum(times) for times in calls.values())))
        return runs[1:] if new_tokens else runs  # the first has still computed a prompt


@contextmanager
def _watching() -> Iterator[dict[str, list[float]]]:
    """Seconds of native calls by operation."""
    calls: dict[str, list[float]] = {}

    def note(operation: str, _: Any, seconds: float) -> None:
        calls.setdefault(operation, []).append(seconds)

    native.observe(note)
    try:
        yield calls
    finally:
        native.observe(None)


def _row(work: Work, runs: list[list[float]], ceilings: Ceilings) -> OperationRow:
    """runs: of each repeat, the seconds of each call."""
    seconds = median(sum(calls) for calls in runs)
    num_bytes, operations = float(work.num_bytes), float(work.operations)
    limit_s = max(num_bytes / ceilings.read.rate, operations / ceilings.bf16.rate) / 1e9
    return OperationRow(
        operation=work.operation,
        calls=len(runs[-1]),
        ms=seconds * 1e3,
        megabytes=num_bytes / 1e6,
        gb_per_s=num_bytes / seconds / 1e9,
        gflop_per_s=operations / seconds / 1e9,
        share=limit_s / seconds,
    )


def columns(row: OperationRow) -> dict[str, str]:
    """An operation's figures as text, by heading."""
    return {
        "operation": row.operation,
        "calls": str(row.calls),
        "ms": f"{row.ms:.3f}",
        "MB": f"{row.megabytes:.1f}",
        "GB/s": f"{row.gb_per_s:.1f}",
        "GFLOP/s": f"{row.gflop_per_s:.1f}",
        "of limit": f"{row.share:.0%}",
    }


def table(ceilings: Ceilings, profiles: list[StepProfile]) -> str:
    """Format profiles as text."""
    parts = [f"limits: {ceilings.read.rate:.1f} GB/s read, {ceilings.bf16.rate:.0f} GFLOP/s bf16"]
    for step in profiles:
        around = f"{step.native_ms:.2f} ms in native calls, {step.overhead:.1%} around them"
        whole = sum(row.ms for row in step.operations)
        ordered = sorted(step.operations, key=lambda row: -row.ms)
        rows = [columns(row) | {"of step": f"{row.ms / whole:.1%}"} for row in ordered]
        parts.append(text(grid_of(f"{step.step}: {step.step_ms:.2f} ms a step, {around}", rows)))
    return "\n\n".join(parts)
