"""Shares that the GPU bench has measured of a card, in place of the stated ones.

`make gpu` leaves samples in bench/results, `gpu-<card>-<commit>.jsonl` (bench/campaign/store.py): behind the line
that identifies them, a kernel in each, its bytes and operations and the time it took. The newest file of a card
counts. Without one, or in an installation without the folder, a device keeps its stated shares.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec

from cierzo.engine.cost.device import Device, MeasuredShare
from cierzo.engine.errors import ConfigError

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def with_measured(device: Device, card: str, folder: Path = RESULTS) -> Device:
    """Give `device` the shares found on a card of this name ("h200"), if there are any. Raises ConfigError for a
    file that is not what the GPU bench writes."""
    files = [path for path in folder.glob("gpu-*.jsonl") if card in path.stem.split("-")]
    if not files:
        return device
    newest = max(files, key=lambda path: path.stat().st_mtime)
    shares: dict[str, dict[float, float]] = defaultdict(dict)
    for number, line in enumerate(newest.read_text(encoding="utf-8").splitlines()[1:], 2):
        try:
            sample = json.loads(line)
            ours = sample["subject"] == "kernels" and ", small" in sample["cell"]  # not gpt-oss's layers
            if ours and sample["result"]:
                operation, limit_s, seconds = _measurement(device, sample)
                shares[operation][limit_s] = limit_s / seconds
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{newest.name}, line {number}: {error}", field="device", value=newest.name
            ) from error
    measured = {
        operation: [MeasuredShare(limit_s, found[limit_s]) for limit_s in sorted(found)]
        for operation, found in shares.items()
    }
    source = f"{device.source}; kernels as in bench/results/{newest.name}" if measured else device.source
    return msgspec.structs.replace(device, measured=measured, source=source)


def _measurement(device: Device, sample: dict[str, Any]) -> tuple[str, float, float]:
    """(operation and number format, seconds at the data sheet's limits, seconds that it took). Products
    are computed in bf16, but for those that the bench says to have FP8 activations."""
    operation, *_, format = str(sample["cell"]).split(", ")
    found = sample["result"]
    rate = device.operations_per_s["fp8" if format.endswith("x fp8") else "bf16"]
    limit_s = max(found["bytes"] / device.bytes_per_s, found["flops"] / rate)
    return f"{operation} {format}", limit_s, found["us"] / 1e6
