"""Calls of bench/kernel_cases.py on a device: models, number formats, and weights as GPU kernels read them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cierzo.bench import attention_cases  # noqa: F401 (registers its cases)
from cierzo.bench.kernel_cases import CASES, SMALL3, SMALL4, Call, Maker, Size
from cierzo.engine.cost.sizes import ModelSizes
from cierzo.kernels.formats.activations import takes_fp8
from cierzo.kernels.formats.device import DeviceMatrix, dequantise, in_fp8, quantise
from cierzo.kernels.formats.number_formats import formats_on
from cierzo.kernels.formats.packed import Matrix

MODELS = {model.name: model for model in (SMALL4, SMALL3)}
# Sizes of `linear` alone: MLA's latents are few outputs, whose products are cut over k (triton/linear.py)
LATENTS = dataclasses.replace(SMALL4, name="small4 latents", hidden=1344, heads=1, value_dim=4096)
# The two kinds of layer that gpt-oss has in turn: no model of ours has a window or sinks, the doors of GQA do. Then
# windows that are hostile: a row sees itself alone; no multiple of a tile; more than there is.
GPT_OSS = ModelSizes(name="gpt-oss", hidden=2880, heads=64, vocab=201_088, kv_heads=8, head_dim=64, sinks=True)
GPT_OSS_WINDOW = dataclasses.replace(GPT_OSS, name="gpt-oss, window 128", window=128)
HOSTILE_WINDOWS = tuple(
    dataclasses.replace(GPT_OSS, name=f"gpt-oss, window {window}", window=window) for window in (1, 77, 1 << 20)
)
WINDOWED = ("gqa_decode", "gqa_prefill")

WEIGHTS = formats_on("cuda")
BY_FP8 = {"fp8 x fp8": None, "static fp8 x fp8": 0.0625}  # activations in FP8: by row, or by this scale
KV = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}

# Operations that multiply by weights of a number format; those that read pages; those that are compositions.
WEIGHTED = ("linear", "lm_head", "gated_mlp", "expert_mlp")
PAGED = (
    *("write_latents", "write_normed_latents", "write_keys_values", "rotate_and_write_keys_values"),
    *("mla_decode", "mla_prefill", "gqa_decode", "gqa_prefill"),
)
COMPOSED = ("mla_block", "gqa_block", "mlp_block", "moe_block", "decoder")


def models_of(operation: str, hostile: bool = False) -> tuple[ModelSizes, ...]:
    """Models whose sizes an operation is run with; `hostile`: sizes too that no model has."""
    models = tuple(MODELS.values())
    if operation == "linear":
        models += (LATENTS,)
    if operation in WINDOWED:
        models += (GPT_OSS, GPT_OSS_WINDOW, *(HOSTILE_WINDOWS if hostile else ()))
    return models


@dataclass(frozen=True, slots=True)
class DeviceMaker(Maker):
    """Weights as GPU kernels read them."""

    @property
    def weights(self) -> str:
        """See Maker."""
        return "fp8" if self.format in BY_FP8 else self.format

    def matrix(self, *shape: int, paired: bool = False, format: str | None = None) -> Matrix:
        """Weights [n,k] or [experts,n,k] of standard deviation 0.02."""
        plain, wanted = self.noise(*shape) * 0.02, format or self.format
        if wanted == "bf16":
            return plain
        if wanted not in BY_FP8:
            return quantise(plain, wanted)
        static, experts = BY_FP8[wanted], shape[0] if len(shape) == 3 else 1
        scales = None if static is None else torch.full((experts,), static, device=self.device)
        return in_fp8(quantise(plain, "fp8"), scales)


SINGLE = tuple(name for name in CASES if name not in COMPOSED)


def formats_of(operation: str) -> tuple[str, ...]:
    """The number formats that an operation is run with, of weights or of pages."""
    if operation in WEIGHTED:  # no published checkpoint quantises the head
        return WEIGHTS if operation == "lm_head" else (*WEIGHTS, *BY_FP8)
    return tuple(KV) if operation in PAGED else ("bf16",)


def make_call(
    operation: str,
    model: ModelSizes,
    size: Size,
    format: str,
    device: torch.device,
    *,
    seed: int = 0,
    cold_bytes: int | None = None,
) -> Call | None:
    """The case on the device; None where the model has no such operation."""
    kv_dtype = KV.get(format, torch.bfloat16) if operation in PAGED else torch.bfloat16
    weights = format if operation in WEIGHTED else "bf16"
    maker = DeviceMaker(False, weights, str(device), seed, kv_dtype, cold_bytes)
    call = CASES[operation](model, size, maker)
    if call is None:
        return None
    return dataclasses.replace(call, arguments=[moved(arguments, device) for arguments in call.arguments])


def moved(value: Any, device: torch.device) -> Any:
    """Tensors, and what holds tensors, on the device."""
    return mapped(value, lambda tensor: tensor.to(device))


def widened(value: Any) -> Any:
    """Floats as fp32 copies, weights dequantised: what the reference computes with to be the better one. Matrices
    whose activations are in FP8 stay so: those codes are part of the result."""
    return mapped(
        value,
        lambda tensor: tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor,
        lambda matrix: (
            dataclasses.replace(matrix, dtype=torch.float32) if takes_fp8(matrix) else dequantise(matrix).float()
        ),
    )


def mapped(value: Any, change: Any, change_matrix: Any = None) -> Any:
    """A copy of nested tuples, lists and dataclasses with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, DeviceMatrix) and change_matrix is not None:
        return change_matrix(value)
    if isinstance(value, tuple | list):
        return type(value)(mapped(part, change, change_matrix) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {
            field.name: mapped(getattr(value, field.name), change, change_matrix)
            for field in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **parts)
    return value
