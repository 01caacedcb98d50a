"""The experiment that decides heuristics.WIDTH_KEEPS_BITS: one product in tiles of several widths, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from cierzo.bench.gpu.calls import make_call
from cierzo.bench.gpu.cases import Size
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels import registry
from cierzo.kernels.fault import DeviceFault, is_device_error
from cierzo.kernels.triton import heuristics

FORMATS = ("nvfp4", "fp8", "bf16", "fp8 x fp8")
WIDTHS = (16, 64, 128, 256)  # tokens of a tile: the width of an MMA, or with tokens on M its height
WIDE, WIDE_WARPS = 128, 8  # from so many tokens on a tile needs so many warps
TOKENS = Size(name="widths", sequences=max(WIDTHS), rows_each=1, context=32)


def compare(format: str, model: ModelSizes, device: torch.device) -> dict[str, Any]:
    """For each way to compute the product behind attention, whether all bits are those of the usual tile, or why it
    does not run."""
    (arguments, *_), _ = make_call("linear", model, TOKENS, format, device, cold_bytes=0)
    function = registry.implementations("linear", "cuda")[0].load()
    usual, found = function(*arguments).view(torch.int16), {}
    for way in product((False, True), WIDTHS):
        with tiles(*way):
            try:
                equal: bool | str = torch.equal(function(*arguments).view(torch.int16), usual)
            except Exception as error:  # a tile may need more registers or memory than there are
                if isinstance(error, DeviceFault) or is_device_error(error):
                    raise
                equal = f"{type(error).__name__}: {error}"[:200]
        on_m, tokens = ("tokens" if way[0] else "weights"), way[1]
        found[f"{tokens} tokens, {on_m} on M"] = equal
    narrow = found[f"{heuristics.NARROW} tokens, weights on M"]
    return {
        "WIDTH_KEEPS_BITS may be": narrow is True,
        "all": all(one is True for one in found.values()),
        "ways": found,
    }


@contextmanager
def tiles(tokens_on_m: bool, width: int) -> Iterator[None]:
    """Every tile has this width and this form within."""
    before, more = heuristics.TILES, {"num_warps": WIDE_WARPS} if width >= WIDE else {}
    changes: dict[str, Any] = {"block_t": width, "tokens_on_m": tokens_on_m, **more}
    heuristics.TILES = {kind: replace(tile, **changes) for kind, tile in before.items()}
    try:
        yield
    finally:
        heuristics.TILES = before
