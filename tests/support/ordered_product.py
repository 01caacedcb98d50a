"""A matrix product whose every element adds its K products in order, whatever stands beside it.

np.matmul cannot be taken where bits count: OpenBLAS adds in an order that depends on the numbers of rows and
columns, and on the kernel that it picks for the processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def ordered_product(a: Any, b: Any, start: Any = None) -> Any:
    """a [M,K] by b [K,N] -> [M,N]; added to `start`, which is kept."""
    total = np.zeros((a.shape[0], b.shape[1]), np.result_type(a, b)) if start is None else start.copy()
    with np.errstate(all="ignore"):  # infinity by 0 is NaN, and no warning, on a GPU
        for column, row in zip(a.T[:, :, None], b, strict=True):
            total += column * row
    return total
