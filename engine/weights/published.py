"""Random checkpoints in the formats that Mistral publishes: which tensors they have, and their values.

    hf, native      Hugging Face's layout or Mistral's own, not quantised
    hf-fp8          every linear layer but the router and the output head in FP8
    native-fp8      the same, each expert's matrices apart
    native-nvfp4    Small 4's routed and shared experts in 4 bits, all else in bfloat16

A quantised matrix has normal weights (FP8) or uniform codes (NVFP4) of standard deviation 0.02, near enough, and
scales that differ from one matrix to the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cierzo.engine.checkpoint_format import PUBLISHED_FORMATS, CheckpointFormat
from cierzo.engine.errors import refusal
from cierzo.engine.weights.companions import PACKED, companion
from cierzo.engine.weights.names import native_name
from cierzo.engine.weights.shapes import Shape, Small4Shape
from cierzo.engine.weights.vision_shapes import VisionShape
from cierzo.engine.weights.writer import TensorPlan
from cierzo.kernels.formats.nvfp4 import GROUP as SCALE_GROUP
from cierzo.kernels.formats.nvfp4 import LARGEST_SCALE_CODE

WEIGHT_STD = 0.02  # initializer_range of both models
PIECE_ELEMENTS = 1 << 22
_LARGEST_FP8 = 448.0
_FP8_STEP = 6 * WEIGHT_STD / _LARGEST_FP8  # six standard deviations are held, the rest is cut
_SMALLEST_CODE = 0x60  # of NVFP4 scales: 32 .. 448
_E2M1_STD, _SCALE_RMS = 2.93, 202  # of uniform codes and scales
_DIVISOR = _E2M1_STD * _SCALE_RMS / WEIGHT_STD
_ACTIVATION_SCALE = 0.03125


def check_format(name: str, shape: Shape, dtype: str) -> CheckpointFormat:
    """Raises ConfigError for an unknown format, and for one that the shape or the dtype is not published in."""
    if name not in PUBLISHED_FORMATS:
        raise refusal("checkpoint_format", f"one of {', '.join(PUBLISHED_FORMATS)}", name)
    format = PUBLISHED_FORMATS[name]
    if format.scheme == "nvfp4" and not isinstance(shape, Small4Shape):
        raise refusal("like", "small4", "small3", f"it is experts that are NVFP4 in checkpoint_format {name}")
    if format.scheme != "plain" and dtype != "bfloat16":
        raise refusal("dtype", "bfloat16", dtype, f"checkpoint_format {name} is published with no other")
    return format


def tensor_plans(
    shape: Shape, format: CheckpointFormat, stored: str, vision: VisionShape | None = None
) -> list[TensorPlan]:
    """Every tensor of the checkpoint; `stored`: the safetensors dtype of those that are not quantised, which all of
    the vision tower's are."""
    parts = (part for name, sizes in shape.tensors() for part in apart(name, sizes, format))
    plans = [plan for name, sizes in parts for plan in _plans(name, sizes, format, stored)]
    if vision is None:
        return plans
    tower = vision.tensors(shape.hidden_size)
    if format.layout == "native":
        return plans + [TensorPlan(native_name(name), sizes, stored) for name, sizes in tower]
    plans = [replace(plan, name=f"language_model.{plan.name}") for plan in plans]
    return plans + [TensorPlan(name, sizes, stored) for name, sizes in tower]


def config_file(
    shape: Shape, format: CheckpointFormat, dtype: str, vision: VisionShape | None = None
) -> dict[str, Any]:
    """config.json or params.json."""
    config = shape.config(dtype)
    if format.layout == "native":
        seen = {} if vision is None else {"vision_encoder": vision.encoder()}
        return native_params(config) | seen | _native_quantisation(format)
    config = config if vision is None else vision.around(config)
    if format.scheme == "fp8":
        config["quantization_config"] = {
            "activation_scheme": "static",
            "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
            "quant_method": "fp8",
            "weight_block_size": None,
        }
    return config


def random_pieces(plan: TensorPlan, seed: int) -> Iterator[np.ndarray]:
    """A tensor's values in pieces of at most 4 Mi elements; they depend on the seed and the tensor's name alone."""
    generator = torch.Generator().manual_seed(_digest(seed, plan.name))
    experts = plan.shape[0] if len(plan.shape) == 3 and plan.dtype == "F8_E4M3" else 1
    for expert in range(experts):
        left = plan.num_elements // experts
        while left:
            size = min(PIECE_ELEMENTS, left)
            yield _bits(_values(plan, size, expert, seed, generator))
            left -= size


def apart(name: str, sizes: tuple[int, ...], format: CheckpointFormat) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A parameter under its name in the layout; a native stack of experts is one tensor for each matrix."""
    if format.layout == "hf":
        yield name, sizes
    elif len(sizes) == 2 or len(sizes) == 1:
        yield native_name(name), sizes
    else:
        stem, _, fused = name.rpartition(".")
        parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
        for expert in range(sizes[0]):
            for part in parts:
                yield native_name(f"{stem}.{expert}.{part}.weight"), (sizes[1] // len(parts), sizes[2])


def _plans(name: str, sizes: tuple[int, ...], format: CheckpointFormat, stored: str) -> Iterator[TensorPlan]:
    """A tensor and the companions that quantisation gives it."""
    if format.scheme == "fp8" and _is_linear(name, sizes):
        each = (sizes[0], 1, 1) if len(sizes) == 3 else ()
        yield TensorPlan(name, sizes, "F8_E4M3")
        yield TensorPlan(companion(name, "scale", format), each, "BF16")
        yield TensorPlan(companion(name, "activation scale", format), each[:1], "BF16")
    elif format.scheme == "nvfp4" and "experts." in name:
        name = name.removesuffix(".weight") + PACKED
        n, k = sizes
        yield TensorPlan(name, (n, k // 2), "U8")
        yield TensorPlan(companion(name, "scale", format), (n, k // SCALE_GROUP), "F8_E4M3")
        yield TensorPlan(companion(name, "global scale", format), (1,), "F32")
        dtype = "BF16" if "shared" in name else "F32"
        yield TensorPlan(companion(name, "activation scale", format), (1,), dtype)
    else:
        yield TensorPlan(name, sizes, stored)


def _is_linear(name: str, sizes: tuple[int, ...]) -> bool:
    """Not norms, embedding, head or router."""
    kept = ("embed", "lm_head", "output.")
    return len(sizes) > 1 and not any(part in name for part in kept) and not name.endswith(".gate.weight")


def _values(plan: TensorPlan, size: int, expert: int, seed: int, generator: torch.Generator) -> Tensor:
    name = plan.name
    if plan.dtype == "U8":
        return torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    if plan.dtype == "F8_E4M3" and name.endswith(".weight_scale"):
        return torch.randint(
            _SMALLEST_CODE, LARGEST_SCALE_CODE + 1, (size,), generator=generator, dtype=torch.uint8
        )
    if name.endswith(("act", "activation_scale", "input_global_scale")):
        values = torch.full((size,), _ACTIVATION_SCALE)
    elif name.endswith(".weight_global_scale"):
        values = torch.tensor([_DIVISOR * _varied(seed, name, 0)])
    elif name.endswith(_SCALE_ENDINGS):
        owner = _owner(name)
        values = torch.tensor([_step(seed, owner, number) for number in range(size)])
    elif name.endswith(("norm.weight", "ln_pre.weight")):  # layernorm.weight too
        values = torch.ones(size)
    else:
        values = torch.empty(size).normal_(0.0, WEIGHT_STD, generator=generator)
    if plan.dtype == "F8_E4M3":
        codes = (values / _step(seed, name, expert)).clamp_(-_LARGEST_FP8, _LARGEST_FP8)
        return codes.to(torch.float8_e4m3fn).view(torch.uint8)
    return values.to(torch.bfloat16) if plan.dtype == "BF16" else values


_SCALE_ENDINGS = ("_scale_inv", ".qscale_weight")


def _owner(scale_name: str) -> str:
    """The matrix that a scale belongs to."""
    for ending in (".weight_scale_inv", ".qscale_weight"):
        if scale_name.endswith(ending):
            return scale_name.removesuffix(ending) + ".weight"
    return scale_name.removesuffix("_scale_inv")


def _step(seed: int, name: str, number: int) -> float:
    """An FP8 matrix' scale, as bfloat16 has it."""
    return float(torch.tensor(_FP8_STEP * _varied(seed, name, number)).bfloat16())


def _varied(seed: int, name: str, number: int) -> float:
    """0.75 .. 1.25."""
    return 0.75 + 0.5 * (_digest(seed, f"{name}:{number}") & 0xFFFF) / 0xFFFF


def _digest(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def _bits(values: Tensor) -> np.ndarray:
    return values.view(torch.int16).numpy() if values.dtype == torch.bfloat16 else values.numpy()  # numpy has none


def native_params(config: dict[str, Any]) -> dict[str, Any]:
    """params.json of a config.json's architecture, with the fields that Mistral's own have."""
    rope = config["rope_parameters"]
    params = {
        "dim": config["hidden_size"],
        "head_dim": config["head_dim"],
        "hidden_dim": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "n_layers": config["num_hidden_layers"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": rope["rope_theta"],
        "tied_embeddings": config["tie_word_embeddings"],
        "vocab_size": config["vocab_size"],
    }
    if config["model_type"] != "mistral4":
        return params
    original = rope["original_max_position_embeddings"]
    params |= {
        name: config[name]
        for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    }
    params["llama_4_scaling"] = {"beta": rope["llama_4_scaling_beta"], "original_max_position_embeddings": original}
    params["yarn"] = {
        "alpha": rope["beta_slow"],
        "apply_scale": False,
        "beta": rope["beta_fast"],
        "factor": rope["factor"],
        "original_max_position_embeddings": original,
    }
    params["moe"] = {
        "expert_hidden_dim": config["moe_intermediate_size"],
        "first_k_dense_replace": config["first_k_dense_replace"],
        "num_expert_groups": config["n_group"],
        "num_expert_groups_per_tok": config["topk_group"],
        "num_experts": config["n_routed_experts"],
        "num_experts_per_tok": config["num_experts_per_tok"],
        "num_shared_experts": config["n_shared_experts"],
        "routed_scale": config["routed_scaling_factor"],
        "route_every_n": 1,
    }
    return params


def _native_quantisation(format: CheckpointFormat) -> dict[str, Any]:
    if format.scheme == "plain":
        return {}
    if format.scheme == "fp8":
        return {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}}
    four_bits = {"group_size": 16, "num_bits": 4, "strategy": "tensor_group", "symmetric": True, "type": "float"}
    group = {
        "input_activations": {**four_bits, "dynamic": "local"},
        "targets": ["Linear"],
        "weights": {**four_bits, "dynamic": False},
    }
    return {
        "quantization": {
            "config_groups": {"group_0": group},
            "format": "nvfp4-pack-quantized",
            "ignore": ["lm_head", "re:.*attention.*", "re:.*gate$", "re:.*vision.*"],
            "quant_method": "compressed-tensors",
        }
    }
