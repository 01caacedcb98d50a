"""Comparison of a product in tiles of several widths, bit for bit (kernels/triton/widths.py), of a model's size."""

from __future__ import annotations

from typing import Any

import torch

from cierzo.bench.gpu.calls import make_call
from cierzo.bench.gpu.cases import Size
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels.triton import widths
from cierzo.kernels.triton.launch import Configuration, dry_run

FORMATS = ("nvfp4", "fp8", "bf16", "fp8 x fp8")
TOKENS = Size(name="widths", sequences=256, rows_each=1, context=32)


def compare(format: str, model: ModelSizes, device: torch.device) -> dict[str, Any]:
    """For each way to compute the product behind attention, whether all bits are those of the first."""
    (arguments, *_), _ = make_call("linear", model, TOKENS, format, device, cold_bytes=0)
    found = widths.compare(*arguments)
    return {"all": all(found.values()), "ways": found}


def configurations(format: str, model: ModelSizes) -> list[Configuration]:
    """Configurations of the kernels that are compared."""
    (arguments, *_), _ = make_call("linear", model, TOKENS, format, torch.device("meta"), cold_bytes=0)
    found: list[Configuration] = []
    for one in widths.tiles(*arguments):
        found += (launched.kernel for launched in dry_run(widths.multiply, *arguments, one))
    return found
