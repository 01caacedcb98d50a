"""Two kernels in one launch: programs of a second stage wait for all programs of the first.

    after_others()
    place = next_place(tickets_ptr)        # 0, 1, ...: in the order in which programs begin
    if place < firsts:
        ...                                # the first stage
        end_of_first(tickets_ptr)
    else:
        wait_for_firsts(tickets_ptr, firsts)
        ...                                # the second, which reads what the first wrote
        end_of_second(tickets_ptr, seconds)

A program takes its place when it begins, so that those before it have begun: waiting ends, on however few
multiprocessors a launch runs, and in the interpreter, which runs one program after another. The last program puts
the tickets back to zero for the next launch, which waits for the end of this one.
"""

from __future__ import annotations

from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from cierzo.kernels.triton.launch import kernel


@cache
def tickets(device: torch.device) -> Tensor:
    """Counters of a device, int32: places taken, programs of the first and of the second stage that have ended.
    Zeros between launches, which follow one another on one stream."""
    return torch.zeros(3, dtype=torch.int32, device=device)


@kernel
def next_place(tickets_ptr):
    """This program's place among those of the launch."""
    return tl.atomic_add(tickets_ptr, 1, sem="relaxed")


@kernel
def end_of_first(tickets_ptr):
    """Let programs of the second stage see what all threads of this one have written."""
    tl.debug_barrier()
    tl.atomic_add(tickets_ptr + 1, 1, sem="release")


@kernel
def wait_for_firsts(tickets_ptr, firsts):
    """Wait until all programs of the first stage have ended."""
    while tl.atomic_add(tickets_ptr + 1, 0, sem="acquire") < firsts:
        pass
    tl.debug_barrier()


@kernel
def end_of_second(tickets_ptr, seconds):
    """Count this program; the last one puts the counters back."""
    if tl.atomic_add(tickets_ptr + 2, 1, sem="relaxed") == seconds - 1:
        for counter in tl.static_range(3):
            tl.store(tickets_ptr + counter, 0)
