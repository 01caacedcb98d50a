"""Memory of a GPU: what is left of it for the KV cache beside the weights and workspaces. No torch."""

from __future__ import annotations

import subprocess

from cierzo.engine.cost.weights import NumberFormats, weight_bytes
from cierzo.engine.errors import ConfigError, amount
from cierzo.engine.model.config import ModelConfig

GIB = 1 << 30
USABLE_SHARE = 0.95  # of the free memory: the allocator's rounding, and CUDA's own needs
WORKSPACE_BYTES = 4 * GIB  # activations of a step, attention's partials and workspaces, CUDA graphs


def free_bytes() -> int | None:
    """Free memory of the first GPU that the driver lists; None without driver or card."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return int(done.stdout.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def kv_room_bytes(model: ModelConfig, weights: str, free: int, cards: int = 1) -> int:
    """Bytes that are left for the KV cache of `free` bytes on each of `cards` GPUs, between which the weights are
    divided. Raises ConfigError, with the numbers, if nothing is left."""
    plain = "float32" if weights == "float32" else "bf16"
    needed, workspaces = weight_bytes(model, NumberFormats(weights=weights, plain=plain)), cards * WORKSPACE_BYTES
    usable = int(cards * free * USABLE_SHARE)
    if usable <= needed + workspaces:
        each = f"each of {cards} GPUs" if cards > 1 else "the GPU"
        taken = f"weights in {weights} take {amount(needed, GIB, up=True)} GiB, workspaces {workspaces // GIB}"
        raise ConfigError(
            f"{each} has {amount(free, GIB)} GiB free; {taken}: nothing is left for the KV cache",
            field="weights",
            limit=f"{amount(usable, GIB)} GiB",
            value=f"{amount(needed + workspaces, GIB, up=True)} GiB",
        )
    return usable - needed - workspaces
