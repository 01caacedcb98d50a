"""Whether a tile's width keeps the bits of a product, which the interpreter cannot say: a card computes one in
each.

Tiles for few tokens and for many (heuristics.SIZED) add the same products in the same order; that the matrix
instructions of all widths round alike, no manual promises. An engine on a card calls `settle` when it starts,
before it lists what it will launch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cierzo.kernels.formats import fp8
from cierzo.kernels.formats.activations import takes_fp8
from cierzo.kernels.formats.device import E4M3, in_fp8, quantise
from cierzo.kernels.formats.number_formats import DEVICE_FORMATS, NUMBER_FORMATS
from cierzo.kernels.formats.packed import Matrix
from cierzo.kernels.triton import heuristics, linear
from cierzo.kernels.triton.heuristics import Tile
from cierzo.kernels.triton.launch import POINTER
from cierzo.kernels.triton.product import Weights

TOKENS, OUTPUTS, COLUMNS = 128, 128, 1024


def tiles(x: Tensor, matrix: Matrix) -> list[Tile]:
    """Tiles that a product of 16-bit rows with a matrix may have, whatever their number."""
    weights, activations = Weights.of("widths", matrix), POINTER[E4M3 if takes_fp8(matrix) else x.dtype]
    sizes = heuristics.sizes(weights, activations, paired=False)
    few = (heuristics.spread(one, weights, matrix.shape[-2], 0, 1) for one in sizes)  # as if programs were few
    return list(dict.fromkeys([*sizes, *few]))


def compare(x: Tensor, matrix: Matrix) -> dict[str, bool]:
    """For each of these tiles, whether all bits of x @ matrix^T, fp32, are those that the first one gives."""
    found: dict[str, bool] = {}
    first = None
    for one in tiles(x, matrix):
        with heuristics.forced(one):
            bits = linear.lm_head(x, matrix).view(torch.int32)
        first = bits if first is None else first
        found[f"{one.block_t} tokens, steps of {one.block_k}"] = torch.equal(bits, first)
    return found


def settle(formats: Iterable[str], activations: str, device: torch.device) -> None:
    """Set heuristics.WIDTH_KEEPS_BITS by products on a card, with weights in these formats and activations in
    theirs.

    Raises DeviceFault.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, COLUMNS, generator=random).bfloat16().to(device)
    weights = torch.randn(OUTPUTS, COLUMNS, generator=random).bfloat16().to(device)
    heuristics.WIDTH_KEEPS_BITS = all(
        all(compare(x, _matrix(weights, format, activations)).values()) for format in dict.fromkeys(formats)
    )


def _matrix(weights: Tensor, format: str, activations: str) -> Matrix:
    """Weights in a format, as a model's are."""
    if format not in DEVICE_FORMATS:
        return weights
    matrix = quantise(weights, format)
    return in_fp8(matrix) if activations in NUMBER_FORMATS[format].activations else fp8.weave(matrix)
