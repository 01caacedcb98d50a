"""A step's work on a device, in seconds: one operation after another, each at the share of its limit it reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cierzo.engine.cost.device import Device, Number
from cierzo.engine.cost.operations import Work


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step. memory_s: of operations that wait for memory, arithmetic_s: of the others. num_bytes,
    operations: on all cards together. limit_s: the least that any kernels could take, for all bytes or all
    operations at the device's rates."""

    memory_s: Number
    arithmetic_s: Number
    exchange_s: Number
    overhead_s: Number
    limit_s: Number
    num_bytes: Number
    operations: Number

    @property
    def total_s(self) -> Number:
        """Seconds of the whole step."""
        return self.memory_s + self.arithmetic_s + self.exchange_s + self.overhead_s


def step_time(device: Device, works: Sequence[Work], *, rows: Number, exchanged_bytes: Number = 0.0) -> StepTime:
    """Price a step. rows: its sequences. exchanged_bytes: what one of several cards sends (`exchanged`)."""
    memory_s: Number = 0.0
    arithmetic_s: Number = 0.0
    num_bytes: Number = 0.0
    operations: Number = 0.0
    all_bytes_s: Number = 0.0
    all_operations_s: Number = 0.0
    for work in works:
        shared = work.num_bytes - work.replicated_bytes
        bytes_s = (shared / device.cards + work.replicated_bytes) / device.bytes_per_s
        operations_s = work.operations / device.cards / device.operations_per_s[work.rate]
        num_bytes = num_bytes + shared + work.replicated_bytes * device.cards
        operations = operations + work.operations
        all_bytes_s = all_bytes_s + bytes_s
        all_operations_s = all_operations_s + operations_s
        bound = np.maximum(bytes_s, operations_s)
        share = device.measured_share(work.operation, work.format, bound / work.calls)
        stated = bytes_s / device.stated["memory"], operations_s / device.stated[work.kind]
        took = np.maximum(*stated) if share is None else bound / share
        waits = stated[0] >= stated[1]
        memory_s = memory_s + np.where(waits, took, 0.0)
        arithmetic_s = arithmetic_s + np.where(waits, 0.0, took)
    exchange_s: Number = 0.0 if device.cards == 1 else exchanged_bytes / device.link_bytes_per_s
    return StepTime(
        memory_s=memory_s,
        arithmetic_s=arithmetic_s,
        exchange_s=exchange_s,
        overhead_s=device.step_overhead_s + device.row_overhead_s * rows,
        limit_s=np.maximum(all_bytes_s, all_operations_s),
        num_bytes=num_bytes,
        operations=operations,
    )


def exchanged(hidden_size: int, layers: int, tokens: Number, cards: int) -> Number:
    """Bytes that one card sends in a step: twice a layer the hidden states (bf16) of the other cards' rows."""
    return 2.0 * layers * tokens * hidden_size * 2.0 * (cards - 1) / cards
