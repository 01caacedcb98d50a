"""Time of the steps of an engine's configuration on a device, and sums over many steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from cierzo.engine.cost.device import Device, Number
from cierzo.engine.cost.operations import Work
from cierzo.engine.cost.step_time import StepTime, exchanged, step_time
from cierzo.engine.cost.weights import NumberFormats, weight_bytes
from cierzo.engine.cost.work import Distinct, StepShape, step_work, uniform_distinct

if TYPE_CHECKING:
    from cierzo.engine.config import EngineConfig  # which finds the device of a plan here, at import

FloatArray = NDArray[np.float64]


class StepModel:
    """Prices the steps of a configuration on a device."""

    def __init__(self, config: EngineConfig, device: Device, distinct: Distinct | None = None) -> None:
        """distinct: of a model with experts, as measured; by default as if tokens chose at random."""
        plain = "bf16" if config.dtype == "bfloat16" else config.dtype
        on_gpu, activations = device.kind == "cuda", config.activations
        self.formats = NumberFormats(weights=config.weights, plain=plain, activations=activations, on_gpu=on_gpu)
        self.device = device
        self.distinct = distinct
        if distinct is None and config.model.moe is not None:
            self.distinct = uniform_distinct(config.model.moe)
        self._model, self._layout = config.model, config.layout

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's weights on the device."""
        return weight_bytes(self._model, self.formats)

    def work(self, step: StepShape) -> list[Work]:
        """List the operations of a step."""
        return step_work(self._model, self._layout, self.formats, step, self.distinct)

    def time(self, step: StepShape, rows: Number) -> StepTime:
        """Price a step of so many sequences; arrays stand for several steps."""
        work = self.work(step)
        model, cards = self._model, self.device.cards
        sent = exchanged(model.hidden_size, model.num_layers, step.tokens, cards) if cards > 1 else 0.0
        return step_time(self.device, work, rows=rows, exchanged_bytes=sent)

    def add(self, totals: StepTotals, step: StepShape, rows: Number) -> FloatArray:
        """Price a step, or several, and add them to `totals`; the seconds of each."""
        time = self.time(step, rows)
        seconds = np.atleast_1d(time.total_s)
        totals.steps += len(seconds)
        for name in ("num_bytes", "operations", "memory_s", "arithmetic_s", "exchange_s", "overhead_s", "limit_s"):
            setattr(totals, name, getattr(totals, name) + float(np.sum(getattr(time, name))))
        totals.rows += float(np.sum(rows))
        totals.tokens += float(np.sum(step.tokens))
        totals.total_s += float(seconds.sum())
        if self.distinct is not None:
            totals.distinct_experts += float(np.sum(self.distinct(step.tokens)))
        return seconds


def decode_steps(sequences: int, context_tokens: int, steps: int) -> tuple[StepShape, FloatArray]:
    """Shape `steps` decode steps in a row; and the sequences of each. The first has `context_tokens` in all."""
    context = context_tokens + float(sequences) * np.arange(steps, dtype=np.float64)
    count = np.full(steps, float(sequences))
    return StepShape(absorbed_tokens=count, absorbed_pairs=context, absorbed_context=context, sampled=count), count


class StepTotals(msgspec.Struct, kw_only=True):
    """Sums over a run's steps: seconds; bytes and operations; experts that had tokens, in a layer on average."""

    steps: int = 0
    rows: float = 0.0
    tokens: float = 0.0
    distinct_experts: float = 0.0
    num_bytes: float = 0.0
    operations: float = 0.0
    memory_s: float = 0.0
    arithmetic_s: float = 0.0
    exchange_s: float = 0.0
    overhead_s: float = 0.0
    limit_s: float = 0.0
    total_s: float = 0.0
