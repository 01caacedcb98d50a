"""What a GPU's memory has to hold: the weights in their formats, workspaces, then the KV cache. No torch."""

from __future__ import annotations

import subprocess

from cierzo.engine.errors import ConfigError, amount
from cierzo.engine.model.config import MlaConfig, ModelConfig

GIB = 1 << 30
USABLE_SHARE = 0.95  # of the free memory: the allocator's rounding, and CUDA's own needs
WORKSPACE_BYTES = 4 * GIB  # activations of a step, attention's partials and workspaces, CUDA graphs
# Bytes of a weight, its scales included: one fp32 a row of FP8 and int8; an e4m3 for 16 NVFP4 codes, two halves for
# 32 of int4.
BYTES = {"bf16": 2.0, "float32": 4.0, "fp8": 1.0, "int8": 1.0, "nvfp4": 0.5625, "int4": 0.625}


def weight_bytes(model: ModelConfig, weights: str) -> int:
    """Of the model on one GPU: what engine/weights/matrices.py device_formats() gives each kind of matrix."""
    plain = "float32" if weights == "float32" else "bf16"
    hidden, heads, attention, moe = model.hidden_size, model.num_heads, model.attention, model.moe
    if isinstance(attention, MlaConfig):
        nope, rope, rank = attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.kv_lora_rank
        query = attention.q_lora_rank or heads * (nope + rope)
        linear = hidden * (query + rank + rope) + hidden * heads * attention.v_head_dim
        linear += heads * (nope + rope) * query if attention.q_lora_rank else 0
        latent = heads * rank * (2 * nope + attention.v_head_dim)  # W_UK lies there in both orders
    else:
        width = attention.head_dim
        linear, latent = hidden * width * (2 * heads + 2 * attention.num_kv_heads), 0
    dense_layers, sparse_layers = model.num_layers, 0
    experts = router = 0
    if moe is not None:
        dense_layers, sparse_layers = moe.first_dense_layers, model.num_layers - moe.first_dense_layers
        experts = 3 * hidden * moe.expert_width * (moe.num_experts + moe.num_shared_experts)
        router = moe.num_experts * hidden
    others = "fp8" if weights == "nvfp4" else weights
    total = BYTES[others] * (model.num_layers * linear + dense_layers * 3 * hidden * model.mlp_width)
    total += BYTES[weights] * sparse_layers * experts
    total += BYTES[plain] * (model.num_layers * latent + sparse_layers * router)
    total += BYTES[plain] * 2 * model.vocab_size * hidden  # embedding and head, which lie apart even if tied
    return int(total)


def free_bytes() -> int | None:
    """Of the first GPU that the driver lists; None without driver or card."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return int(done.stdout.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def kv_room_bytes(model: ModelConfig, weights: str, free: int, cards: int = 1) -> int:
    """What is left for the KV cache of `free` bytes on each of `cards` GPUs, between which the weights are divided.
    Raises ConfigError, with the numbers, if that is nothing."""
    needed = weight_bytes(model, weights)
    room = int(cards * free * USABLE_SHARE) - needed - cards * WORKSPACE_BYTES
    if room <= 0:
        each = f"each of {cards} GPUs" if cards > 1 else "the GPU"
        workspaces = cards * WORKSPACE_BYTES
        taken = f"weights in {weights} take {amount(needed, GIB, up=True)} GiB, workspaces {workspaces // GIB}"
        raise ConfigError(
            f"{each} has {amount(free, GIB)} GiB free; {taken}: nothing is left for the KV cache",
            field="weights",
            limit=f"{amount(int(cards * free * USABLE_SHARE), GIB)} GiB",
            value=f"{amount(needed + workspaces, GIB, up=True)} GiB",
        )
    return room
