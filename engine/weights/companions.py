"""Companions of a quantised matrix: the tensors beside it that say what its codes stand for.

hf, fp8          X.weight + X.weight_scale_inv, X.activation_scale; a fused stack of experts, which has no
                 ".weight", Y + Y_scale_inv, Y_activation_scale
hf, mxfp4        Y_blocks + Y_scales, of fused stacks of experts
native, fp8      X.weight + X.qscale_weight, X.qscale_act
compressed       X.weight or X.weight_packed + X.weight_scale, X.weight_zero_point, X.weight_global_scale,
                 X.weight_shape; of activations X.input_scale, X.input_zero_point, X.input_global_scale
native, nvfp4    the same
"""

from __future__ import annotations

from collections.abc import Container
from typing import Literal

from cierzo.engine.checkpoint_format import CheckpointFormat
from cierzo.engine.errors import CheckpointError
from cierzo.engine.weights.headers import DTYPE_BITS, TensorInfo

# What a companion is to its matrix. Scales of activations are used where a GPU takes these in FP8 (matrices.py).
Role = Literal["scale", "global scale", "zero point", "shape", "activation scale", "activation zero point"]

PACKED = ".weight_packed"
_PLAIN = ".weight"
_BLOCKS = "_blocks"
# (layout, scheme) -> (what the companion's name ends with, what its matrix' name ends with instead, role)
_COMPANIONS: dict[tuple[str, str], tuple[tuple[str, str, Role], ...]] = {
    ("hf", "fp8"): (
        (".weight_scale_inv", _PLAIN, "scale"),
        (".activation_scale", _PLAIN, "activation scale"),
        (".experts.gate_up_proj_scale_inv", ".experts.gate_up_proj", "scale"),
        (".experts.down_proj_scale_inv", ".experts.down_proj", "scale"),
        (".experts.gate_up_proj_activation_scale", ".experts.gate_up_proj", "activation scale"),
        (".experts.down_proj_activation_scale", ".experts.down_proj", "activation scale"),
    ),
    ("hf", "mxfp4"): (
        (".experts.gate_up_proj_scales", ".experts.gate_up_proj_blocks", "scale"),
        (".experts.down_proj_scales", ".experts.down_proj_blocks", "scale"),
    ),
    ("native", "fp8"): (
        (".qscale_weight", _PLAIN, "scale"),
        (".qscale_act", _PLAIN, "activation scale"),
    ),
}
# Endings of compressed-tensors' companions, whose matrix ends with PACKED if there is one of that name.
_COMPRESSED: dict[str, Role] = {
    ".weight_scale": "scale",
    ".weight_global_scale": "global scale",
    ".weight_zero_point": "zero point",
    ".weight_shape": "shape",
    ".input_scale": "activation scale",
    ".input_global_scale": "activation scale",
    ".input_zero_point": "activation zero point",
}
_OF_CACHE = tuple(f"{each}_{what}" for each in (".q", ".k", ".v") for what in ("scale", "zero_point"))
_REFUSED = {
    ".weight_g_idx": "columns in the order of their activations (actorder group) are not supported",
    ".weight_scale_2": "this is ModelOpt's spelling of a multiplier, where compressed-tensors has the divisor "
    "weight_global_scale: convert the checkpoint (compressed_tensors.entrypoints.convert)",
}


def owner_of(name: str, format: CheckpointFormat, present: Container[str]) -> tuple[str, Role] | None:
    """The matrix that a tensor is a companion of, and as what; None for no companion. present: all tensors' names.

    Raises CheckpointError for a companion that changes what the codes mean in a way that is not supported.
    """
    if not _is_compressed(format):
        for suffix, owner, role in _COMPANIONS.get((format.layout, format.scheme), ()):
            if name.endswith(suffix):
                return name.removesuffix(suffix) + owner, role
        return None
    stem, dot, last = name.rpartition(".")
    if dot + last in _REFUSED:
        raise CheckpointError(f"tensor {name}: {_REFUSED[dot + last]}", field=name)
    if dot + last not in _COMPRESSED:
        return None
    return stem + (PACKED if stem + PACKED in present else _PLAIN), _COMPRESSED[dot + last]


def companion(name: str, role: Role, format: CheckpointFormat) -> str:
    """Name the companion of the tensor `name` in this format; `name` itself where there is none."""
    if _is_compressed(format):
        stem = without_ending(name, format)
        if role == "activation scale" and name.endswith(PACKED):
            return f"{stem}.input_global_scale"
        return next(stem + suffix for suffix, found in _COMPRESSED.items() if found == role)
    for suffix, owner, found in _COMPANIONS.get((format.layout, format.scheme), ()):
        if found == role and name.endswith(owner):
            return name.removesuffix(owner) + suffix
    return name


def without_ending(name: str, format: CheckpointFormat) -> str:
    """The module whose matrix a tensor is: its name without ".weight", or what this format has instead."""
    if _is_compressed(format) and name.endswith(PACKED):
        return name.removesuffix(PACKED)
    if format.scheme == "mxfp4" and name.endswith(_BLOCKS):
        return name.removesuffix(_BLOCKS)
    return name.removesuffix(_PLAIN)


def num_weights(info: TensorInfo, format: CheckpointFormat) -> int:
    """Weights in a stored tensor, which may have several in an element; the last word of a row counts as full."""
    module = without_ending(info.name, format)
    if module == info.name or info.dtype not in ("I32", "U8"):
        return info.num_elements
    group = format.quantisation.group_of(module)
    return info.num_elements * DTYPE_BITS[info.dtype] // (DTYPE_BITS[info.dtype] if group is None else group.bits)


def is_of_cache(name: str, format: CheckpointFormat) -> bool:
    """Whether a tensor is a scale of keys, values or queries, which the engine stores as its settings say."""
    return format.quantisation.kv_cache != "" and name.endswith(_OF_CACHE)


def _is_compressed(format: CheckpointFormat) -> bool:
    return format.scheme in ("compressed", "nvfp4")
