"""Programmatic dependent launch: a kernel of a chain is set up while the one before it still runs.

    @chained
    def _scale(x_ptr, ...):
        after_others()                 # the first statement

`after_others` waits until all kernels before have ended and what they wrote can be seen; nothing that they write is
read, and nothing is written, before it. Then it lets the next kernel be set up: as that waits in the same way for
the end of this one, and so of all before, order is kept. A kernel that is not chained begins when the one before it
has ended, as ever. The interpreter runs one program after another, and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl  # noqa: F401 (the interpreter looks for it in a kernel's module)
from triton.language.extra import cuda

from cierzo.kernels.triton.launch import CHAINED, kernel


def chained(function: Callable[..., None]) -> Any:
    """Apply `kernel` to a function that calls `after_others` before all else."""
    CHAINED.add(function)
    return kernel(function)


@kernel
def after_others():
    """Wait for the kernels before, then let the next one be set up."""
    cuda.gdc_wait()
    cuda.gdc_launch_dependents()
