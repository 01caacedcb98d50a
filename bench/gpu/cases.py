"""Small 4 and Small 3 at full size, and the calls of bench/kernel_cases.py on a device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cierzo.bench import attention_cases  # noqa: F401 (registers its cases)
from cierzo.bench.kernel_cases import CASES, Call, Maker, Model, Size
from cierzo.kernels.formats.activations import takes_fp8
from cierzo.kernels.formats.device import E4M3, GROUP, DeviceMatrix, dequantise, in_fp8, quantise
from cierzo.kernels.formats.packed import Matrix

SMALL4 = Model(
    name="small4",
    hidden=4096,
    heads=32,
    vocab=131_072,
    mlp_width=2048,
    query_rank=1024,
    rank=256,
    rope=64,
    nope=64,
    value_dim=128,
    experts=128,
    top_k=4,
    expert_width=2048,
)
SMALL3 = Model(name="small3", hidden=5120, heads=32, vocab=131_072, mlp_width=32_768, kv_heads=8, head_dim=128)
MODELS = {model.name: model for model in (SMALL4, SMALL3)}
# Sizes of `linear` alone: MLA's latents are few outputs, whose products are cut over k (triton/linear.py)
LATENTS = dataclasses.replace(SMALL4, name="small4 latents", hidden=1344, heads=1, value_dim=4096)
# The two kinds of layer that gpt-oss has in turn: no model of ours has a window or sinks, the doors of GQA do. Then
# windows that are hostile: a row sees itself alone; no multiple of a tile; more than there is.
GPT_OSS = Model(
    name="gpt-oss", hidden=2880, heads=64, vocab=201_088, mlp_width=0, kv_heads=8, head_dim=64, sinks=True
)
GPT_OSS_WINDOW = dataclasses.replace(GPT_OSS, name="gpt-oss, window 128", window=128)
HOSTILE_WINDOWS = tuple(
    dataclasses.replace(GPT_OSS, name=f"gpt-oss, window {window}", window=window) for window in (1, 77, 1 << 20)
)
WINDOWED = ("gqa_decode", "gqa_prefill")

WEIGHTS = ("bf16", "fp8", "nvfp4")
BY_FP8 = {"fp8 x fp8": None, "static fp8 x fp8": 0.0625}  # activations in FP8: by row, or by this scale
KV = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}

# Operations that multiply by weights of a number format; those that read pages; those that are compositions.
WEIGHTED = ("linear", "lm_head", "gated_mlp", "expert_mlp")
PAGED = (
    *("write_latents", "write_normed_latents", "write_keys_values", "rotate_and_write_keys_values"),
    *("mla_decode", "mla_prefill", "gqa_decode", "gqa_prefill"),
)
COMPOSED = ("mla_block", "gqa_block", "mlp_block", "moe_block", "decoder")


def models_of(operation: str, hostile: bool = False) -> tuple[Model, ...]:
    """Whose sizes an operation is run with; `hostile`: those too that no model has."""
    models: tuple[Model, ...] = tuple(MODELS.values())
    if operation == "linear":
        models += (LATENTS,)
    if operation in WINDOWED:
        models += (GPT_OSS, GPT_OSS_WINDOW, *(HOSTILE_WINDOWS if hostile else ()))
    return models


@dataclass(frozen=True, slots=True)
class DeviceMaker(Maker):
    """Weights as GPU kernels read them."""

    def matrix(self, *shape: int, paired: bool = False, format: str | None = None) -> Matrix:
        """Weights [n,k] or [experts,n,k] of standard deviation 0.02."""
        wanted = format or self.format
        if self.device == "meta" and wanted != "bf16":
            stored = without_memory("fp8" if wanted in BY_FP8 else wanted, shape)
        elif wanted == "bf16":
            return self.noise(*shape) * 0.02
        else:
            stored = quantise(self.noise(*shape) * 0.02, "fp8" if wanted in BY_FP8 else wanted)
        if wanted not in BY_FP8:
            return stored
        static, experts = BY_FP8[wanted], shape[0] if len(shape) == 3 else 1
        return in_fp8(stored, None if static is None else torch.full((experts,), static, device=self.device))


def without_memory(format: str, shape: tuple[int, ...]) -> DeviceMatrix:
    """What `quantise` makes of such weights, on torch's "meta" device: sizes alone."""
    *_, n, k = (1, *shape)
    experts = shape[0] if len(shape) == 3 else 1

    def empty(*sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(experts, n, *sizes, dtype=dtype, device="meta")

    if format == "fp8":
        codes, scales = empty(k, dtype=E4M3), empty(1, dtype=torch.float32)
        return DeviceMatrix(format, shape, torch.bfloat16, codes, scales, None, (1, k))
    group = GROUP[format]
    codes, scales = (
        empty(k // 2, dtype=torch.uint8),
        empty(k // group, dtype=E4M3 if format == "nvfp4" else torch.uint8),
    )
    row_scales = empty(dtype=torch.float32) if format == "nvfp4" else None
    return DeviceMatrix(format, shape, torch.bfloat16, codes, scales, row_scales, (1, group))


SINGLE = tuple(name for name in CASES if name not in COMPOSED)


def formats_of(operation: str) -> tuple[str, ...]:
    """The number formats that an operation is run with, of weights or of pages."""
    if operation in WEIGHTED:  # no published checkpoint quantises the head
        return WEIGHTS if operation == "lm_head" else (*WEIGHTS, *BY_FP8)
    return tuple(KV) if operation in PAGED else ("bf16",)


def make_call(
    operation: str,
    model: Model,
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
