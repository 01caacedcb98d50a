"""int4: a half-precision scale and minimum for each 32 weights of a row; weight = code * scale + minimum.

Codes are 0 .. 15. The grid is chosen for the least sum of squared errors among: any on which all 32 weights lie
exactly, if there is one; nine, whose ends stand 0, 1/2 or 1 steps inside the smallest and the largest weight (what
is outside is clipped); and two that follow from the best of these by least squares. Against the plain grid from the
smallest to the largest this takes the error of normally distributed weights from 7.8 % to 7.0 %.

A scale is at least 2^-24, unless all weights are equal: weights too small for a half become multiples of that.
"""

from __future__ import annotations

from functools import reduce
from itertools import product

import torch
from torch import Tensor

from cierzo.kernels.formats.int8 import inverse

GROUP = 32
STEPS = 15
LARGEST = 65504.0  # a minimum beyond is beyond half precision
SMALLEST_SCALE = 2.0**-24
INSETS = (0.0, 0.5, 1.0)
REFINEMENTS = 2
NO_ERROR = 2.0**-126
NEARLY_WHOLE = 1 / 64


def encode(rows: Tensor) -> Tensor:
    """rows [P,32,k], k a multiple of 32, |.| <= LARGEST, -> uint8 [P, bytes of a panel]."""
    groups = rows.float().unflatten(2, (-1, GROUP))  # [P,32,G,32]
    scale, minimum = choose_grid(groups)
    codes = join(nearest(groups, scale, minimum).to(torch.uint8))
    ends = torch.stack([scale, minimum]).half().permute(1, 3, 0, 2).flatten(2)  # [P, G, 2 x 32]
    return torch.cat([codes, ends.contiguous().view(torch.uint8)], -1).flatten(1)


def decode(panels: Tensor) -> Tensor:
    """The reverse -> float32 [P,32,k]."""
    groups = panels.unflatten(1, (-1, GROUP * 16 + 128))
    ends = groups[..., GROUP * 16 :].contiguous().view(torch.float16).float().unflatten(2, (2, 32))
    scale, minimum = ends.permute(2, 0, 3, 1)[..., None]
    return (split(groups[..., : GROUP * 16]) * scale + minimum).flatten(2)


def choose_grid(groups: Tensor) -> tuple[Tensor, Tensor]:
    """groups float32 [...,32] -> scale, minimum [...]: float32 that are halves."""
    lowest, highest = groups.amin(-1), groups.amax(-1)
    spread = highest - lowest
    error = torch.full_like(lowest, torch.inf)
    scale, minimum = torch.zeros_like(lowest), torch.zeros_like(lowest)

    def consider(step: Tensor, start: Tensor, limit: Tensor | None = None) -> None:
        """Take this grid where its error is less than the limit, or than that of the grid so far."""
        nonlocal error, scale, minimum
        step = torch.where(spread > 0, step.half().float().clamp_min(SMALLEST_SCALE), 0.0)
        start = start.half().float() + 0.0  # no -0, whose place among 0s is left open by min
        off = nearest(groups, step, start) * step[..., None] + start[..., None] - groups
        total = ordered_sum(off * off)
        better = total < (error if limit is None else limit)
        error = torch.where(better, total, error)
        scale, minimum = torch.where(better, step, scale), torch.where(better, start, minimum)

    for steps in range(STEPS, 0, -1):  # an exact grid, on which the smallest weight has code `below`
        step = (spread / steps).half().float()
        places = (groups - lowest[..., None]) * inverse(step)[..., None]
        whole = ((places - places.round()).abs() <= NEARLY_WHOLE).all(-1)
        limit = torch.where(whole, NO_ERROR, 0.0)
        for below in range(STEPS + 1 - steps):
            consider(step, lowest - below * step, torch.minimum(error, limit))
    for low, high in product(INSETS, INSETS):
        step = spread / (STEPS + low + high)
        consider(step, lowest + low * step)
    for _ in range(REFINEMENTS):
        consider(*fit(groups, nearest(groups, scale, minimum)))
    return scale, minimum


def nearest(groups: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The codes of groups [...,32] on the grids of scale and minimum [...], as float32."""
    return ((groups - minimum[..., None]) * inverse(scale)[..., None]).round().clamp_(0, STEPS)


def fit(groups: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of the least sum of squared errors for given codes."""
    code_sum, square_sum = ordered_sum(codes), ordered_sum(codes * codes)
    weight_sum, product_sum = ordered_sum(groups), ordered_sum(groups * codes)
    determinant = GROUP * square_sum - code_sum * code_sum
    scale = (GROUP * product_sum - code_sum * weight_sum) / determinant.clamp_min(1)  # 0 / 1 where codes are equal
    return scale, (weight_sum - scale * code_sum) * (1 / GROUP)


def ordered_sum(values: Tensor) -> Tensor:
    """Over the last axis, one after the other: the C++ packer adds in this order."""
    return reduce(torch.add, values.unbind(-1))


def join(codes: Tensor) -> Tensor:
    """Codes below 16, uint8 [P,32,G,32] -> bytes [P, G, 4 x 32 x 4], in the layout that packed.py draws."""
    low, high = codes.unflatten(3, (-1, 2, 4)).unbind(4)  # of each octet
    return (low | high << 4).permute(0, 2, 3, 1, 4).flatten(2)


def split(octets: Tensor) -> Tensor:
    """The reverse -> uint8 [P,32,G,32]."""
    octets = octets.unflatten(2, (-1, 32, 4)).permute(0, 3, 1, 2, 4)
    return torch.stack([octets & 15, octets >> 4], 4).flatten(3)
