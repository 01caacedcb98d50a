"""A checkpoint of compressed-tensors with anything wrong, or in a form that is not loaded, is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed import SMALL3, SMALL4, Compressed
from loading import load, logits
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.fields import Fields
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.quantisation import read_compressed
from cierzo.engine.weights.info import describe

O_PROJ = "model.layers.1.self_attn.o_proj"
W1, W2 = "model.layers.0.mlp.experts.1.gate_proj", "model.layers.0.mlp.experts.1.down_proj"
NAN = float("nan")
E8M0_NAN = torch.tensor([[127, 255]] * 64, dtype=torch.uint8)
Changes = dict[str, Tensor | None]
# Name of a case -> scheme, tensors that are changed or missing (None), the field of the error, its message.
WRONG: dict[str, tuple[str, Changes, str, str]] = {
    "scale missing": (
        "fp8-dynamic",
        {f"{O_PROJ}.weight_scale": None},
        f"{O_PROJ}.weight_scale",
        "o_proj.weight is F8_E4M3, and its scale .*o_proj.weight_scale is missing",
    ),
    "scale of packed integers missing": (
        "w4a16",
        {f"{W2}.weight_scale": None},
        f"{W2}.weight_scale",
        "down_proj.weight_packed is I32, and its scale .* is missing",
    ),
    "shape missing": ("w4a16", {f"{W2}.weight_shape": None}, f"{W2}.weight_shape", "its shape .* is missing"),
    "zero point missing": (
        "w4a16-asymmetric",
        {f"{W2}.weight_zero_point": None},
        f"{W2}.weight_zero_point",
        "its zero point .* is missing",
    ),
    "zero point that no group declares": (
        "w4a16",
        {f"{W2}.weight_zero_point": torch.zeros(8, 2, dtype=torch.int32)},
        f"{W2}.weight_zero_point",
        "has no place in this model",
    ),
    "global scale missing": (
        "nvfp4",
        {f"{W2}.weight_global_scale": None},
        f"{W2}.weight_global_scale",
        "its global scale .* is missing",
    ),
    "matrix missing": ("w4a16", {f"{O_PROJ}.weight_packed": None}, f"{O_PROJ}.weight", "is missing"),
    "one scale a row, of one matrix one": (
        "fp8-dynamic",
        {f"{O_PROJ}.weight_scale": torch.ones(1)},
        f"{O_PROJ}.weight_scale",
        r"shape \[1\], expected \[64, 1\] or \[64\]",
    ),
    "a grid of other blocks": (
        "fp8-block",
        {f"{O_PROJ}.weight_scale": torch.ones(2, 2)},
        f"{O_PROJ}.weight_scale",
        r"shape \[2, 2\], expected \[1, 1\]",
    ),
    "groups of another size": (
        "w4a16",
        {f"{O_PROJ}.weight_scale": torch.ones(64, 4)},
        f"{O_PROJ}.weight_scale",
        r"shape \[64, 4\], expected \[64, 2\]",
    ),
    "words of another width": (
        "w4a16",
        {f"{O_PROJ}.weight_packed": torch.zeros(64, 16, dtype=torch.int32)},
        f"{O_PROJ}.weight_packed",
        r"shape \[64, 16\], expected \[64, 8\]",
    ),
    "pairs of another width": (
        "nvfp4",
        {f"{W2}.weight_packed": torch.zeros(64, 31, dtype=torch.uint8)},
        f"{W2}.weight_packed",
        r"shape \[64, 31\], expected \[64, 32\]",
    ),
    "zero points along k": (
        "w4a16-asymmetric",
        {f"{O_PROJ}.weight_zero_point": torch.zeros(64, 1, dtype=torch.int32)},
        f"{O_PROJ}.weight_zero_point",
        r"shape \[64, 1\], expected \[8, 2\]",
    ),
    "another stated shape": (
        "w4a16",
        {f"{O_PROJ}.weight_shape": torch.tensor([64, 60])},
        f"{O_PROJ}.weight_packed",
        r"weight_shape says \[64, 60\], the model needs \[64, 64\]",
    ),
    "integers where the config says FP8": (
        "fp8-dynamic",
        {f"{O_PROJ}.weight": torch.zeros(64, 64, dtype=torch.int8)},
        f"{O_PROJ}.weight",
        "dtype I8, expected one of F8_E4M3, F64",
    ),
    "FP8 where the config says integers": (
        "w8a8",
        {f"{O_PROJ}.weight": torch.zeros(64, 64).to(torch.float8_e4m3fn)},
        f"{O_PROJ}.weight",
        "dtype F8_E4M3, expected one of I8, F64",
    ),
    "another FP8": (
        "fp8-dynamic",
        {f"{O_PROJ}.weight": torch.zeros(64, 64).to(torch.float8_e5m2)},
        f"{O_PROJ}.weight",
        "dtype F8_E5M2",
    ),
    "integers as scale": (
        "w8a8",
        {f"{O_PROJ}.weight_scale": torch.ones(64, 1, dtype=torch.int32)},
        f"{O_PROJ}.weight_scale",
        "dtype I32, expected one of F64",
    ),
    "a scale of plain weights": (
        "fp8-dynamic",
        {f"{O_PROJ}.weight": torch.zeros(64, 64)},
        f"{O_PROJ}.weight_scale",
        "has no place in this model",
    ),
    "NaN scale": (
        "fp8-dynamic",
        {f"{O_PROJ}.weight_scale": torch.ones(64, 1).index_fill(0, torch.tensor(5), NAN)},
        f"{O_PROJ}.weight_scale",
        r"at \[5, 0\] is nan, must be in 2\^-100 \.\. 2\^100",
    ),
    "negative scale": (
        "w4a16",
        {f"{O_PROJ}.weight_scale": torch.tensor([[1.0, -0.5]] * 64).bfloat16()},
        f"{O_PROJ}.weight_scale",
        r"at \[0, 1\] is -0.5",
    ),
    "infinite scale": (
        "w8a16",
        {f"{O_PROJ}.weight_scale": torch.full((64, 1), float("inf")).half()},
        f"{O_PROJ}.weight_scale",
        r"at \[0, 0\] is inf",
    ),
    "zero scale of a matrix": (
        "fp8-static",
        {f"{O_PROJ}.weight_scale": torch.zeros(1)},
        f"{O_PROJ}.weight_scale",
        "is 0.0, must be in",
    ),
    "no power of two": (
        "mxfp4",
        {f"{O_PROJ}.weight_scale": E8M0_NAN},
        f"{O_PROJ}.weight_scale",
        r"\[0, 1\] is nan",
    ),
    "negative NVFP4 scale": (
        "nvfp4",
        {f"{W2}.weight_scale": torch.full((64, 4), -1.0).to(torch.float8_e4m3fn)},
        W2,
        r"a scale is NaN or negative: -1.0 at \[0, 0\]",
    ),
    "zero global scale": ("nvfp4", {f"{W2}.weight_global_scale": torch.zeros(1)}, W2, "global scale 0.0, must be"),
    "columns in another order": (
        "w4a16",
        {f"{O_PROJ}.weight_g_idx": torch.zeros(64, dtype=torch.int32)},
        f"{O_PROJ}.weight_g_idx",
        "actorder group",
    ),
    "ModelOpt's multiplier": (
        "nvfp4",
        {f"{W2}.weight_scale_2": torch.ones(1)},
        f"{W2}.weight_scale_2",
        "ModelOpt's spelling of a multiplier",
    ),
    "a matrix twice": ("w4a16", {f"{O_PROJ}.weight": torch.ones(64, 64)}, O_PROJ, "are the same parameter"),
    "scales of activations of another shape": (
        "fp8-static",
        {f"{O_PROJ}.input_scale": torch.ones(64)},
        f"{O_PROJ}.input_scale",
        r"shape \[64\], expected \[\] or \[1\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_tensor_is_refused_by_name(tmp_path: Path, case: str) -> None:
    name, changes, field, message = WRONG[case]
    model = Compressed(SMALL4, name)
    stored = model.stored | changes
    model.stored = {key: tensor for key, tensor in stored.items() if tensor is not None}
    with pytest.raises(CheckpointError) as caught:
        logits(model.write(tmp_path), dtype="float32")
    assert caught.value.field is not None
    assert caught.value.field.startswith(field)
    assert re.search(message, caught.value.message), caught.value.message


def test_a_zero_scale_of_a_row_is_a_row_of_zeros(tmp_path: Path) -> None:
    model = Compressed(SMALL3, "fp8-dynamic")
    model.stored[f"{O_PROJ}.weight_scale"][7] = 0
    found = load(model.write(tmp_path))[f"{O_PROJ}.weight"]
    assert not isinstance(found, Tensor)
    assert not found.tensor()[7].any()
    assert found.tensor()[8].any()


@pytest.mark.parametrize(("like", "size"), [("w4a16", 48), ("nvfp4", 16), ("mxfp4", 32)])
def test_columns_that_are_not_whole_groups(tmp_path: Path, like: str, size: int) -> None:
    """The model's sizes decide: 64 columns are no multiple of 48, nor 40 of 16 or of 32."""
    model = Compressed(SMALL4, like)
    if like == "w4a16":
        model.quantisation["config_groups"]["group_0"]["weights"]["group_size"] = size
    else:
        model.config["moe_intermediate_size"] = 40
        halves = [
            name for name in model.stored if re.search(r"experts\..*(gate|up)_proj\.weight_(packed|scale)", name)
        ]
        model.stored |= {name: model.stored[name][:40].contiguous() for name in halves}
    with pytest.raises(CheckpointError, match=rf"k a multiple of {size}, for") as caught:
        load(model.write(tmp_path))
    assert caught.value.limit is not None


def changed(model: Compressed, path: str, value: Any) -> None:
    """Set a field of quantization_config, such as "config_groups.group_0.weights.type"."""
    *outer, last = path.split(".")
    section = model.quantisation
    for name in outer:
        section = section[name]
    section[last] = value


GROUP = "config_groups.group_0"


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("w4a16", "quant_method", "gptq"),
        ("nvfp4", "quant_method", "modelopt"),
        ("w4a16", "format", "marlin-24"),
        ("w4a16", "format", "dense"),
        ("w4a16", "format", "mxfp6-pack-quantized"),
        ("w4a16", f"{GROUP}.format", "mxfp8-quantized"),
        ("w4a16", "quantization_status", "calibration"),
        ("w4a16", "quantization_status", "decompressed"),
        ("w4a16", "sparsity_config", {"format": "sparse-24-bitmask", "targets": ["Linear"]}),
        ("w4a16", "moe_sparsity_config", {"layers": [3]}),
        ("w4a16", "transform_config", {"config_groups": {"R1": {}}}),
        ("w4a16", "config_groups", {}),
        ("w4a16", GROUP, ["Linear"]),
        ("w4a16", f"{GROUP}.weights", None),
        ("w4a16", f"{GROUP}.targets", []),
        ("w4a16", f"{GROUP}.targets", ["re:("]),
        ("w4a16", f"{GROUP}.output_activations", {"num_bits": 8}),
        ("w4a16", f"{GROUP}.weights.num_bits", 3),
        ("w4a16", f"{GROUP}.weights.type", "float"),
        ("w4a16", f"{GROUP}.weights.strategy", "block"),
        ("w4a16", f"{GROUP}.weights.group_size", 0),
        ("w4a16", f"{GROUP}.weights.actorder", "group"),
        ("w4a16", f"{GROUP}.weights.dynamic", True),
        ("fp8-block", f"{GROUP}.weights.block_structure", [128]),
        ("fp8-block", f"{GROUP}.weights.block_structure", [0, 128]),
        ("fp8-dynamic", f"{GROUP}.weights.symmetric", False),
        ("nvfp4", f"{GROUP}.weights.group_size", 32),
        ("mxfp4", f"{GROUP}.weights.group_size", 16),
    ],
)
def test_another_quantisation_is_refused_by_name(tmp_path: Path, name: str, path: str, value: Any) -> None:
    model = Compressed(SMALL3, name)
    changed(model, path, value)
    model.write(tmp_path)
    for read in (read_model_config, describe):
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path)
        assert caught.value.field == f"quantization_config.{path}"
        assert caught.value.limit is not None
        if not isinstance(value, dict | list):
            assert str(value) in caught.value.message or json.dumps(value) in caught.value.message


JUNK: list[Any] = [None, 0, -1, 1.5, True, "x", "128x128", [], [1], ["re:["], {}, {"a": [1]}, [[]], [{}]]


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON object."""
    yield path
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(one, (*path, key))


@pytest.mark.parametrize("name", ["fp8-block", "w4a16-asymmetric", "nvfp4", "mxfp4"])
def test_junk_anywhere_in_the_config_is_read_or_refused(name: str) -> None:
    sound = Compressed(replace(SMALL3, num_layers=1), name).quantisation
    sound["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    refused = []
    for *outer, last in (path for path in _leaves(sound) if path):
        for junk in JUNK:
            config = json.loads(json.dumps(sound))
            section = config
            for key in outer:
                section = section[key]
            section[last] = junk
            try:
                found = read_compressed(Fields(config))
            except CheckpointError as error:
                refused.append(error.field)
            else:
                assert found.groups
                assert all(found.notes())
    assert len(refused) > 100
    assert all(refused)


def test_a_matrix_that_no_target_names(tmp_path: Path) -> None:
    model = Compressed(SMALL3, "w8a8")
    changed(model, f"{GROUP}.targets", ["re:.*mlp.*", "re:.*[qkv]_proj$"])
    with pytest.raises(CheckpointError, match=r"o_proj\.weight: dtype I8, expected one of F64") as caught:
        load(model.write(tmp_path))
    assert caught.value.value == "I8"
