"""Matrices as a GPU has them, put together on the CPU: the checkpoint's scales of activations, where asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loading import load
from meta_memory import peak_bytes
from published import SMALL4, Published
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.parameters import MatrixRequest, above_each_other
from cierzo.engine.weights.matrices import DeviceMatrices
from cierzo.engine.weights.quantised import StoredParameter
from cierzo.kernels.formats.device import DeviceMatrix, dequantise
from cierzo.kernels.formats.packed import Matrix

CPU = torch.device("cpu")
LAYER = "model.layers.1."
ENDINGS = ("activation_scale", "qscale_act")


def published(name: str, changed: Mapping[str, Tensor | None] | None = None) -> Published:
    """A checkpoint whose scales of activations all differ."""
    model = Published(SMALL4, name)
    for number, key in enumerate(sorted(key for key in model.stored if key.endswith(ENDINGS))):
        scales = model.stored[key]
        model.stored[key] = (torch.arange(scales.numel()) / 64 + (number + 1) / 32).reshape(scales.shape).bfloat16()
    for key, tensor in (changed or {}).items():
        if tensor is None:
            del model.stored[key]
        else:
            model.stored[key] = tensor
    return model


def matrix(folder: Path, model: Published, *names: str, activations: str = "fp8") -> DeviceMatrix:
    parameters = load(model.write(folder))
    joined = above_each_other([parameters[LAYER + name] for name in names])
    source = DeviceMatrices("fp8", torch.bfloat16, CPU, activations)
    found = source.matrix(MatrixRequest("joined", joined.shape, lambda: joined))
    assert isinstance(found, DeviceMatrix)
    return found


def scales_of(found: DeviceMatrix) -> list[float]:
    assert found.activations == "fp8"
    assert found.activation_scales is not None
    assert found.activation_scales.dtype == torch.float32
    return found.activation_scales.tolist()


def test_each_expert_keeps_its_own(tmp_path: Path) -> None:
    hf = published("hf-fp8")
    for name in ("gate_up_proj", "down_proj"):
        wanted = hf.stored[f"language_model.{LAYER}mlp.experts.{name}_activation_scale"]
        found = matrix(tmp_path, hf, f"mlp.experts.{name}")
        assert scales_of(found) == wanted.float().tolist()
        assert len(set(wanted.tolist())) == 5
        torch.testing.assert_close(dequantise(found), hf.plain[f"{LAYER}mlp.experts.{name}"], rtol=1e-6, atol=0)


def test_of_matrices_above_each_other_the_largest_holds(tmp_path: Path) -> None:
    hf, native = published("hf-fp8"), published("native-fp8")
    names = "self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"
    stored = [f"language_model.{LAYER}{name.removesuffix('weight')}activation_scale" for name in names]
    both = [float(hf.stored[key]) for key in stored]
    assert both[0] != both[1]
    assert scales_of(matrix(tmp_path / "a", hf, *names)) == [max(both)]
    assert scales_of(matrix(tmp_path / "b", hf, *reversed(names))) == [max(both)]
    found = scales_of(matrix(tmp_path / "c", native, "mlp.experts.gate_up_proj"))
    assert found == [
        max(float(native.stored[f"layers.1.experts.{expert}.{part}.qscale_act"]) for part in ("w1", "w3"))
        for expert in range(5)
    ]
    assert scales_of(matrix(tmp_path / "d", native, "self_attn.o_proj.weight")) == [
        float(native.stored["layers.1.attention.wo.qscale_act"])
    ]


@pytest.mark.parametrize("name", ["hf-fp8", "native-fp8"])
def test_without_them_rows_have_their_own_and_unasked_nothing_is_quantised(tmp_path: Path, name: str) -> None:
    model = published(name)
    plain = matrix(tmp_path, model, "self_attn.o_proj.weight", activations="bf16")
    assert (plain.activations, plain.activation_scales) == ("plain", None)
    model.stored = {key: tensor for key, tensor in model.stored.items() if not key.endswith(ENDINGS)}
    found = matrix(tmp_path, model, "self_attn.o_proj.weight")
    assert (found.activations, found.activation_scales) == ("fp8", None)
    requantised = matrix(tmp_path, Published(SMALL4, "hf"), "mlp.experts.down_proj")
    assert (requantised.activations, requantised.activation_scales) == ("fp8", None)
    assert requantised.shape == (5, 64, 48)


def test_some_of_them_missing_is_refused(tmp_path: Path) -> None:
    missing = {"layers.1.experts.3.w3.qscale_act": None}
    with pytest.raises(CheckpointError, match=r"experts\.3\.w3\.weight has no scale of its activations") as caught:
        matrix(tmp_path, published("native-fp8", missing), "mlp.experts.gate_up_proj")
    assert caught.value.field == "layers.1.experts.3.w3.weight"
    missing = dict.fromkeys(f"layers.1.experts.2.{part}.qscale_act" for part in ("w1", "w3"))
    with pytest.raises(CheckpointError, match=r"experts\.2\.w1\.weight has no scale of its activations"):
        matrix(tmp_path, published("native-fp8", missing), "mlp.experts.gate_up_proj")
    key = f"language_model.{LAYER}self_attn.q_a_proj.activation_scale"
    with pytest.raises(CheckpointError, match=r"q_a_proj\.weight has no scale of its activations"):
        matrix(
            tmp_path,
            published("hf-fp8", {key: None}),
            "self_attn.q_a_proj.weight",
            "self_attn.kv_a_proj_with_mqa.weight",
        )


@pytest.mark.parametrize("wrong", [0.0, -0.5, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused_by_name(tmp_path: Path, wrong: float) -> None:
    key = f"language_model.{LAYER}self_attn.o_proj.activation_scale"
    model = published("hf-fp8", {key: torch.tensor(wrong).bfloat16()})
    matrix(tmp_path, model, "self_attn.o_proj.weight", activations="bf16")  # what is not used is not looked at
    with pytest.raises(CheckpointError, match=r"o_proj\.weight: fp8: an activation scale is not in 2\^-100"):
        matrix(tmp_path, model, "self_attn.o_proj.weight")


@pytest.mark.parametrize("kept", [True, False])
def test_codes_of_all_experts_are_held_once(tmp_path: Path, kept: bool) -> None:
    """Each is put into the order of the kernels before the next one is read: kept codes, and quantised weights."""
    parameter = load(published("hf-fp8").write(tmp_path))[LAYER + "mlp.experts.gate_up_proj"]
    assert isinstance(parameter, StoredParameter)
    many = replace(parameter, experts=parameter.experts * 16, dtype=torch.bfloat16)
    weights = many if kept else torch.zeros(many.shape, dtype=torch.bfloat16)
    source = DeviceMatrices("fp8", torch.bfloat16, torch.device("meta"))
    found: list[Matrix] = []
    request = MatrixRequest("many", many.shape, lambda: weights)
    peak = peak_bytes(lambda: found.append(source.matrix(request)))
    (whole,) = found
    assert isinstance(whole, DeviceMatrix)
    assert (whole.woven, whole.shape[0]) == (True, 80)
    assert whole.num_bytes <= peak < 1.5 * whole.num_bytes
