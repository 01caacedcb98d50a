"""A published checkpoint with anything wrong is refused by name: its tensors, scales, codes, declared scheme."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import load, logits
from native_only import needs_native
from published import SMALL4, Published
from torch import Tensor

from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.errors import CheckpointError
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.weights.info import describe
from cierzo.engine.weights.quantised import StoredParameter
from cierzo.engine.worker.runner import load_model


def refused(folder: Path) -> CheckpointError:
    """What loading the whole model, values included, ends with."""
    with pytest.raises(CheckpointError) as caught:
        logits(folder, dtype="float32")
    return caught.value


FP8_HF, FP8_NATIVE = "language_model.model.layers.1.", "layers.1."
EXPERTS = f"{FP8_HF}mlp.experts.gate_up_proj"
NAN, BLOCKS = torch.tensor(float("nan")).bfloat16(), torch.ones(2, 2).bfloat16()
Changes = dict[str, Tensor | None]
WRONG: dict[str, tuple[str, Changes, str, str]] = {
    "scale missing": (
        "hf-fp8",
        {f"{FP8_HF}self_attn.o_proj.weight_scale_inv": None},
        f"{FP8_HF}self_attn.o_proj.weight_scale_inv",
        "o_proj.weight is F8_E4M3, and its scale .*o_proj.weight_scale_inv is missing",
    ),
    "experts' scale missing": ("hf-fp8", {f"{EXPERTS}_scale_inv": None}, f"{EXPERTS}_scale_inv", "is missing"),
    "native scale missing": (
        "native-fp8",
        {f"{FP8_NATIVE}experts.4.w3.qscale_weight": None},
        f"{FP8_NATIVE}experts.4.w3.qscale_weight",
        "is missing",
    ),
    "matrix missing": (
        "hf-fp8",
        {f"{FP8_HF}self_attn.o_proj.weight": None},
        "model.layers.1.self_attn.o_proj.weight",
        "is missing",
    ),
    "scales in blocks": (
        "hf-fp8",
        {f"{FP8_HF}self_attn.o_proj.weight_scale_inv": BLOCKS},
        f"{FP8_HF}self_attn.o_proj.weight_scale_inv",
        r"shape \[2, 2\], expected \[\] or \[1\]",
    ),
    "a scale for each row": (
        "native-fp8",
        {f"{FP8_NATIVE}attention.wo.qscale_weight": torch.ones(64, 1)},
        f"{FP8_NATIVE}attention.wo.qscale_weight",
        r"shape \[64, 1\], expected \[\] or \[1\]",
    ),
    "one scale for all experts": (
        "hf-fp8",
        {f"{EXPERTS}_scale_inv": torch.ones(1)},
        f"{EXPERTS}_scale_inv",
        r"shape \[1\], expected \[5, 1, 1\]",
    ),
    "integers as scale": (
        "hf-fp8",
        {f"{FP8_HF}self_attn.o_proj.weight_scale_inv": torch.tensor(1)},
        f"{FP8_HF}self_attn.o_proj.weight_scale_inv",
        "dtype I64",
    ),
    "NaN scale": (
        "hf-fp8",
        {f"{FP8_HF}self_attn.o_proj.weight_scale_inv": NAN},
        f"{FP8_HF}self_attn.o_proj.weight_scale_inv",
        "is nan, must be in 2",
    ),
    "negative scale": (
        "native-fp8",
        {f"{FP8_NATIVE}experts.2.w1.qscale_weight": torch.tensor(-0.5)},
        f"{FP8_NATIVE}experts.2.w1.qscale_weight",
        "is -0.5, must be in",
    ),
    "zero scale of an expert": (
        "hf-fp8",
        {f"{EXPERTS}_scale_inv": torch.tensor([1.0, 1, 1, 0, 1]).view(5, 1, 1)},
        f"{EXPERTS}_scale_inv[3]",
        "is 0.0, must be in",
    ),
    "scale of a plain matrix": (
        "hf-fp8",
        {f"{FP8_HF}mlp.gate.weight_scale_inv": torch.tensor(1.0)},
        f"{FP8_HF}mlp.gate.weight_scale_inv",
        "has no place in this model",
    ),
    "scale of nothing": (
        "native-fp8",
        {"layers.1.attention.wx.qscale_weight": torch.tensor(1.0)},
        "layers.1.attention.wx.qscale_weight",
        "has no place in this model",
    ),
    "another name": (
        "native-fp8",
        {"layers.1.attention.sinks.weight": torch.ones(2)},
        "layers.1.attention.sinks.weight",
        "has no place in this model",
    ),
    "a norm in FP8": (
        "native-fp8",
        {"layers.1.ffn_norm.weight": torch.ones(64).to(torch.float8_e4m3fn)},
        "layers.1.ffn_norm.weight",
        "dtype F8_E4M3, expected one of F64",
    ),
    "another FP8": (
        "native-fp8",
        {"layers.1.attention.wo.weight": torch.ones(64, 64).to(torch.float8_e5m2)},
        "layers.1.attention.wo.weight",
        "dtype F8_E5M2",
    ),
    "FP8 among NVFP4": (
        "native-nvfp4",
        {"layers.1.attention.wo.weight": torch.ones(64, 64).to(torch.float8_e4m3fn)},
        "layers.1.attention.wo.weight",
        "dtype F8_E4M3, expected one of U8, F64",
    ),
    "NVFP4 scales missing": (
        "native-nvfp4",
        {"layers.0.experts.1.w2.weight_scale": None},
        "layers.0.experts.1.w2.weight_scale",
        "is missing",
    ),
    "global scale missing": (
        "native-nvfp4",
        {"layers.0.shared_experts.w1.weight_global_scale": None},
        "layers.0.shared_experts.w1.weight_global_scale",
        "its global scale .* is missing",
    ),
    "codes of another shape": (
        "native-nvfp4",
        {"layers.0.experts.1.w2.weight_packed": torch.zeros(64, 48, dtype=torch.uint8)},
        "layers.0.experts.1.w2.weight_packed",
        r"shape \[64, 48\], expected \[64, 24\]",
    ),
    "negative NVFP4 scale": (
        "native-nvfp4",
        {"layers.0.experts.1.w2.weight_scale": torch.full((64, 3), -1.0).to(torch.float8_e4m3fn)},
        "layers.0.experts.1.w2",
        "a scale is NaN or negative",
    ),
    "zero global scale": (
        "native-nvfp4",
        {"layers.0.experts.1.w2.weight_global_scale": torch.zeros(1)},
        "layers.0.experts.1.w2",
        "global scale 0.0, must be in",
    ),
    "twice": (
        "native-nvfp4",
        {"layers.0.experts.1.w2.weight": torch.zeros(64, 48)},
        "",
        "are the same parameter",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_tensor_is_refused_by_name(tmp_path: Path, case: str) -> None:
    name, changes, field, message = WRONG[case]
    model = Published(SMALL4, name)
    changed = model.stored | changes
    model.stored = {key: tensor for key, tensor in changed.items() if tensor is not None}
    error = refused(model.write(tmp_path))
    assert error.field is not None
    assert error.field.endswith(field)
    assert re.search(message, error.message), error.message


@needs_native
def test_nan_codes_are_refused_where_packing_refuses_nan(tmp_path: Path) -> None:
    model = Published(SMALL4, "native-fp8")
    model.stored["layers.1.experts.4.w3.weight"].view(torch.uint8)[5, 6] = 0x7F
    folder = model.write(tmp_path)
    for weights in ("int8", "int4", "nvfp4"):
        with pytest.raises(
            CheckpointError, match=r"layers\.1\.experts\.4\.w1.*w3\.weight.*cannot hold.*nan"
        ) as caught:
            logits(folder, weights=weights)
        assert caught.value.field == "model.layers.1.mlp.experts.gate_up_proj"
    resolved = resolve(EngineOptions(model=str(folder), kv_cache_gib=0.01))
    load_model(resolved)  # bf16 holds a NaN, which shows in what it belongs to


def test_an_nvfp4_matrix_is_not_cut_inside_a_group(tmp_path: Path) -> None:
    parameter = load(Published(SMALL4, "native-nvfp4").write(tmp_path))["model.layers.0.mlp.experts.down_proj"]
    assert isinstance(parameter, StoredParameter)
    with pytest.raises(CheckpointError, match=r"columns 0 to 24 .* must be multiples of 16"):
        parameter.cut(2, [(0, 24)])


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("hf-fp8", {"quant_method": "bitsandbytes"}, "quantization_config.quant_method"),
        ("hf-fp8", {"quant_method": "compressed-tensors"}, "quantization_config.format"),
        ("hf-fp8", {"activation_scheme": "none"}, "quantization_config.activation_scheme"),
        ("hf-fp8", {"weight_block_size": [128]}, "quantization_config.weight_block_size"),
        ("native-fp8", {"qformat_weight": "fp8_e5m2"}, "quantization.qformat_weight"),
        ("native-fp8", {"qscheme_act": "NO_SCALES"}, "quantization.qscheme_act"),
        ("native-fp8", {"qformat_weight": None}, "quantization.quant_method"),
        ("native-nvfp4", {"quant_method": "modelopt"}, "quantization.quant_method"),
        ("native-nvfp4", {"format": "mxfp6-pack-quantized"}, "quantization.format"),
        ("native-nvfp4", {"config_groups": {}}, "quantization.config_groups"),
        ("native-nvfp4", {"kv_cache_scheme": 8}, "quantization.kv_cache_scheme"),
        (
            "native-nvfp4",
            {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 16}}}},
            "quantization.config_groups.group_0.weights.type",
        ),
        (
            "native-nvfp4",
            {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 32}}}},
            "quantization.config_groups.group_0.weights.group_size",
        ),
    ],
)
def test_another_quantisation_is_refused_by_name(
    tmp_path: Path, name: str, changes: dict[str, Any], field: str
) -> None:
    model = Published(SMALL4, name)
    key = "quantization" if model.native else "quantization_config"
    model.config[key] = model.config[key] | changes
    folder = model.write(tmp_path)
    for read in (read_model_config, describe):
        with pytest.raises(CheckpointError) as caught:
            read(folder)
        assert caught.value.field == field
        assert caught.value.limit is not None or "missing" in caught.value.message


def test_quantization_under_its_other_name(tmp_path: Path) -> None:
    model = Published(SMALL4, "native-nvfp4")
    model.config["quantization_config"] = model.config.pop("quantization")
    assert describe(model.write(tmp_path)).format == "Mistral-native, NVFP4 (compressed-tensors), experts only"
    model.config["quantization"] = {"qformat_weight": "fp8_e4m3"}
    with pytest.raises(CheckpointError, match="the same as quantization"):
        describe(model.write(tmp_path))
