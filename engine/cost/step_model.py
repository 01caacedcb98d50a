"""Seconds of steps on a device: one operation after another, each at the share of its limit that it reaches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cierzo.engine.cost.device import Device, Number
from cierzo.engine.cost.operations import Work, random_distinct
from cierzo.engine.cost.weights import NumberFormats
from cierzo.engine.cost.work import Distinct, StepShape, step_work

if TYPE_CHECKING:
    from cierzo.engine.config import EngineConfig  # which finds the device of a plan here, at import

FloatArray = NDArray[np.float64]


class StepTotals(msgspec.Struct, kw_only=True):
    """Totals over the operations of a step, of several steps as arrays [S], or of a run as sums over its steps.

    rows: sequences. distinct_experts: those that had tokens, in a layer on average. num_bytes, operations: on all
    cards together. memory_s: of operations that wait for memory, arithmetic_s: of the others. limit_s: the least
    that any kernels could take, for all bytes or all operations at the device's rates.
    """

    steps: Any = 0
    rows: Any = 0.0
    tokens: Any = 0.0
    distinct_experts: Any = 0.0
    num_bytes: Any = 0.0
    operations: Any = 0.0
    memory_s: Any = 0.0
    arithmetic_s: Any = 0.0
    exchange_s: Any = 0.0
    overhead_s: Any = 0.0
    limit_s: Any = 0.0

    @property
    def total_s(self) -> Any:
        """Seconds of whole steps."""
        return self.memory_s + self.arithmetic_s + self.exchange_s + self.overhead_s

    def add(self, found: StepTotals, chosen: Any = True) -> StepTotals:
        """Add the sums over steps, or over the `chosen` of them, bool [S]; return this."""
        for name in self.__struct_fields__:
            each = np.broadcast_to(getattr(found, name), np.shape(found.rows))
            setattr(self, name, getattr(self, name) + (each * chosen).sum().item())
        return self


def price(device: Device, work: Work) -> tuple[Number, Number, Number, Any]:
    """Price an operation: seconds for its bytes and for its arithmetic at the device's rates, seconds that it
    takes, and whether it waits for memory."""
    mine = (work.num_bytes - work.replicated_bytes) / device.cards + work.replicated_bytes  # of one card
    bytes_s = mine / device.bytes_per_s
    operations_s = work.operations / device.cards / device.operations_per_s[work.rate]
    limit_s = np.maximum(bytes_s, operations_s)
    share = device.measured_share(work.operation, work.format, limit_s / work.calls)
    stated = bytes_s / device.stated["memory"], operations_s / device.stated[work.kind]
    took_s = np.maximum(*stated) if share is None else limit_s / share
    return bytes_s, operations_s, took_s, stated[0] >= stated[1]


def step_time(device: Device, works: Sequence[Work], *, rows: Number, exchanged_bytes: Number = 0.0) -> StepTotals:
    """Price a step. rows: its sequences. exchanged_bytes: what one of several cards sends."""
    bytes_s, operations_s, took_s, waits = zip(*(price(device, work) for work in works), strict=True)
    memory_s = sum(np.where(*one, 0.0) for one in zip(waits, took_s, strict=True))
    return StepTotals(
        steps=np.ones_like(rows, dtype=np.int64),
        rows=rows,
        num_bytes=sum(work.num_bytes + (device.cards - 1) * work.replicated_bytes for work in works),
        operations=sum(work.operations for work in works),
        memory_s=memory_s,
        arithmetic_s=sum(took_s) - memory_s,
        exchange_s=exchanged_bytes / device.link_bytes_per_s if device.cards > 1 else 0.0,
        overhead_s=device.step_overhead_s + device.row_overhead_s * rows,
        limit_s=np.maximum(sum(bytes_s), sum(operations_s)),
    )


class StepModel:
    """Prices the steps of a configuration on a device."""

    def __init__(self, config: EngineConfig, device: Device, distinct: Distinct | None = None) -> None:
        """distinct: of a model with experts, as measured; by default as if tokens chose at random."""
        plain = "bf16" if config.dtype == "bfloat16" else config.dtype
        on_gpu, activations = device.kind == "cuda", config.activations
        self.formats = NumberFormats(weights=config.weights, plain=plain, activations=activations, on_gpu=on_gpu)
        self.device = device
        self._distinct = distinct
        if distinct is None and (moe := config.model.moe) is not None:
            self._distinct = partial(random_distinct, moe.num_experts, moe.experts_per_token)
        self._model, self._layout = config.model, config.layout

    def work(self, step: StepShape) -> list[Work]:
        """List the operations of a step."""
        return step_work(self._model, self._layout, self.formats, step, self._distinct)

    def time(self, step: StepShape, rows: Number) -> StepTotals:
        """Price a step of so many sequences; arrays stand for several steps. Twice a layer each card sends the
        hidden states (bf16) of the other cards' rows."""
        hidden_bytes, cards = 2 * self._model.hidden_size, self.device.cards
        sent = 2 * self._model.num_layers * step.tokens * hidden_bytes * (cards - 1) / cards
        found = step_time(self.device, self.work(step), rows=rows, exchanged_bytes=sent)
        found.tokens = step.tokens
        found.distinct_experts = self._distinct(step.tokens) if self._distinct else 0.0
        return found
