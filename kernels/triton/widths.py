"""Whether a tile's width keeps the bits of a product, which the interpreter cannot say: a card computes one in
each.

Tiles for few tokens and for many (heuristics.SIZED) add the same products in the same order; that the matrix
instructions of all widths round alike, no manual promises. An engine on a card calls `settle` when it starts,
before it lists what it will launch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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

TOKENS, ROWS, COLUMNS = 128, 256, 1024  # rows of weights: half of them are the gate where it is paired with up
BLOCK = (128, 128)  # of an FP8 scale, as in published checkpoints


def tiles(x: Tensor, matrix: Matrix, paired: bool = False) -> list[Tile]:
    """Tiles that a product of 16-bit rows with a matrix may have, whatever their number."""
    weights, activations = Weights.of("widths", matrix), POINTER[E4M3 if takes_fp8(matrix) else x.dtype]
    sizes = heuristics.sizes(weights, activations, paired)
    few = [heuristics.spread(one, weights, matrix.shape[-2], 0, 1) for one in sizes]  # as if programs were few
    many = heuristics.APART_TOKENS + 1  # parts of k in one program, whose tile has registers for two sums
    parts = [] if paired else [heuristics.narrow(weights, one, many)[0] for one in sizes[-1:]]
    return list(dict.fromkeys([*sizes, *few, *parts]))


def multiply(x: Tensor, matrix: Matrix, chosen: Tile, paired: bool = False) -> Tensor:
    """x @ matrix^T, or the product of gate and up, in a tile: fp32, so that no rounding hides a bit."""
    outputs = matrix.shape[-2] // (2 if paired else 1)
    with heuristics.forced(chosen):
        out = x.new_empty(len(x), outputs, dtype=torch.float32)
        found: Tensor = linear.multiply("widths", x, matrix, out, paired)
    return found


def compare(x: Tensor, matrix: Matrix, paired: bool = False) -> dict[str, bool]:
    """For each of these tiles, whether all bits of the product are those that the first one gives."""
    found: dict[str, bool] = {}
    first = None
    for one in tiles(x, matrix, paired):
        bits = multiply(x, matrix, one, paired).view(torch.int32)
        first = bits if first is None else first
        size = f"{one.block_t} tokens, {one.block_n} outputs, steps of {one.block_k}, {one.num_warps} warps"
        found[size] = torch.equal(bits, first)
    return found


def settle(formats: Iterable[tuple[str, str]], device: torch.device) -> None:
    """Set heuristics.WIDTH_KEEPS_BITS by products on a card, with these formats of weights and of the activations
    that they meet.

    Raises DeviceFault.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, COLUMNS, generator=random).bfloat16().to(device)
    weights = torch.randn(ROWS, COLUMNS, generator=random).bfloat16().to(device)
    heuristics.WIDTH_KEEPS_BITS = all(
        all(compare(x, matrix, paired).values())
        for format, activations in dict.fromkeys(formats)
        for matrix in matrices(weights, format, activations)
        for paired in (False, True)
    )


def matrices(weights: Tensor, format: str, activations: str) -> Iterator[Matrix]:
    """Weights in a format, as a model's are; of FP8 with a scale for each row, and with one for each block."""
    if format not in DEVICE_FORMATS:
        yield weights
        return
    by_row = quantise(weights, format)
    for matrix in (by_row, quantise(weights, format, block=BLOCK)) if by_row.codes.dtype == E4M3 else (by_row,):
        yield in_fp8(matrix) if activations in NUMBER_FORMATS[format].activations else fp8.weave(matrix)
