"""FP8 pages: cached latents, keys and values as e4m3, as wide as the values themselves, with the scale 1.

    float8_e4m3fn [..., R+P] or [..., d]

Normed latents, keys and values of the models served stay far below 448, the format's largest number: what is larger
is clamped to it, infinity too, as the GPU's own conversion does. NaN stays NaN. To nearest, ties to even, 3 bits
after the leading one: the error is at most 6.25 % of a value above 2^-6, and 2^-10 below.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAGES_DTYPE = torch.float8_e4m3fn
LARGEST = 448.0


def quantise(x: Tensor) -> Tensor:
    """float32 or bfloat16 -> e4m3 of the same shape."""
    return x.float().clamp(-LARGEST, LARGEST).to(PAGES_DTYPE)
