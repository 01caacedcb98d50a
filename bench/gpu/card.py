"""The card that figures belong to, without msgspec, which may be missing on its machine."""

from __future__ import annotations

from typing import Any

import torch

from cierzo.bench.revision import installed_versions, output


def describe(device: torch.device) -> dict[str, Any]:
    """The card, its driver and the versions of packages, as JSON."""
    found: dict[str, Any] = {"device": str(device), "versions": installed_versions()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": driver.partition("\n")[0],
        }
    return found
