"""The formats that Mistral publishes give the model of the weights that they stand for."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import load, logits
from native_only import needs_native
from published import MINISTRAL3, SMALL3, SMALL4, Published, halves_of_pairs
from safetensors.torch import save_file
from torch import Tensor

from cierzo.engine.errors import CheckpointError
from cierzo.engine.llm import LLM
from cierzo.engine.model.build import parameter_specs
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.parameters import Parameter, as_tensor
from cierzo.engine.weights import quantised
from cierzo.engine.weights.info import describe
from cierzo.engine.weights.quantised import StoredParameter, pack_parameter
from cierzo.kernels import registry
from cierzo.kernels.formats import nvfp4
from cierzo.kernels.formats.definition import unpack
from cierzo.kernels.formats.int4 import split
from cierzo.kernels.formats.packed import empty_packed, from_panels, packed_bytes, view_packed
from cierzo.scheduler.params import SamplingParams

SHAPES = {"small4": SMALL4, "small3": SMALL3, "ministral3": MINISTRAL3}
CASES = [
    ("small4", "native"),
    ("small4", "hf-fp8"),
    ("small4", "native-fp8"),
    ("small4", "native-nvfp4"),
    ("small3", "native"),
    ("small3", "hf-fp8"),
    ("small3", "native-fp8"),
    ("ministral3", "hf-fp8"),
    ("ministral3", "native-fp8"),
]
TOKENS = torch.arange(12) * 13 % 192
QUANTISED_WEIGHTS = ["int8", "int4", "nvfp4"]

# ---- values


@pytest.mark.parametrize(("like", "name"), CASES)
def test_float32_logits_are_those_of_the_plain_weights(tmp_path: Path, like: str, name: str) -> None:
    """Bit for bit: a code times its scale is one float32. NVFP4's has two roundings, of 2^-24 each."""
    model = Published(SHAPES[like], name)
    found = logits(model.write(tmp_path / "stored"), dtype="float32")
    expected = logits(model.write_plain(tmp_path / "plain", torch.float32), dtype="float32")
    if name == "native-nvfp4":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(found, expected)


@needs_native
@pytest.mark.parametrize("weights", ["bf16", *QUANTISED_WEIGHTS])
@pytest.mark.parametrize(("like", "name"), CASES)
def test_logits_are_those_of_a_checkpoint_that_holds_the_values(
    tmp_path: Path, like: str, name: str, weights: str
) -> None:
    """Powers of two as scales: bfloat16 holds the values, and every format is then made of the same numbers."""
    model = Published(SHAPES[like], name, power_of_two=True)
    found = logits(model.write(tmp_path / "stored"), weights=weights)
    expected = logits(model.write_plain(tmp_path / "plain", torch.bfloat16), weights=weights)
    if name == "native-nvfp4" and weights == "nvfp4":  # kept, against quantised anew: see the next test
        assert not torch.equal(found, expected)
        assert (found - expected).norm() / expected.norm() < 0.25
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("like", "name"), CASES)
def test_every_parameter_has_its_values(tmp_path: Path, like: str, name: str) -> None:
    model = Published(SHAPES[like], name, power_of_two=True, seed=1)
    found = load(model.write(tmp_path))
    assert found.keys() == model.plain.keys()
    for key, parameter in found.items():
        assert torch.equal(as_tensor(parameter), model.plain[key]), key


@pytest.mark.parametrize(("like", "name"), CASES)
def test_the_ranks_slices_are_the_whole(tmp_path: Path, like: str, name: str) -> None:
    shape = SHAPES[like]
    if name == "native-nvfp4":
        shape = replace(SMALL4, expert_width=96)  # halves of whole groups
    model = Published(shape, name, power_of_two=True, seed=2)
    specs = parameter_specs(read_model_config(model.write(tmp_path)))
    ranks = [load(tmp_path, rank, 2) for rank in range(2)]
    for key, spec in specs.items():
        pieces = [as_tensor(rank[key]) for rank in ranks]
        if spec.shard_axis is None:
            assert all(torch.equal(piece, model.plain[key]) for piece in pieces)
            continue
        assert pieces[0].shape == pieces[1].shape == ranks[0][key].shape
        sections = zip(*(piece.chunk(spec.sections, spec.shard_axis) for piece in pieces), strict=True)
        joined = [torch.cat(section, spec.shard_axis) for section in sections]
        assert torch.equal(torch.cat(joined, spec.shard_axis), model.plain[key]), key
        if name == "native-nvfp4" and "experts" in key:  # kept codes are cut as values are
            assert torch.equal(_unpacked(ranks[1][key], paired=False), pieces[1]), key


@pytest.mark.parametrize(("like", "name"), CASES)
def test_the_engine_generates(tmp_path: Path, like: str, name: str) -> None:
    folder = Published(SHAPES[like], name).write(tmp_path / "model")
    packs = registry.has_native() and registry.default_instruction_set != "reference"
    weights = "nvfp4" if name == "native-nvfp4" and packs else "auto"
    with LLM(folder, kv_cache_gib=0.01, weights=weights) as llm:
        (output,) = llm.generate([[1, 5, 9]], SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))
    assert len(output.token_ids) == 5


# ---- NVFP4 as it is


def test_low_half_of_a_byte_first(tmp_path: Path) -> None:
    """Byte 0x21, scale 1, global scale 1: 0.5 in column 0, 1.0 in column 1."""
    model = Published(SMALL4, "native-nvfp4")
    name = "layers.1.experts.3.w2"
    model.stored[f"{name}.weight_packed"].fill_(0)
    model.stored[f"{name}.weight_packed"][7, 10] = 0x21
    model.stored[f"{name}.weight_scale"].view(torch.uint8).fill_(0x38)  # 1.0
    model.stored[f"{name}.weight_global_scale"].fill_(1.0)
    down = load(model.write(tmp_path))["model.layers.1.mlp.experts.down_proj"]
    values = as_tensor(down)[3]
    assert values[7, 20:22].tolist() == [0.5, 1.0]
    assert int(values.count_nonzero()) == 2
    values = _unpacked(down, paired=False)[3]
    assert values[7, 20:22].tolist() == [0.5, 1.0]
    assert int(values.count_nonzero()) == 2


def _packed(parameter: Parameter, paired: bool) -> Tensor:
    *experts, n, k = parameter.shape
    target = empty_packed((experts[0] if experts else 1) * packed_bytes("nvfp4", n, k, paired))
    pack_parameter(parameter, "nvfp4", paired, target)
    return target


def _unpacked(parameter: Parameter, paired: bool) -> Tensor:
    return unpack(
        view_packed("nvfp4", tuple(parameter.shape), torch.float32, paired, _packed(parameter, paired)),
        torch.float32,
    )


def test_nvfp4_codes_and_scales_are_taken_over_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ever computing a weight; w1 and w3 of an expert keep global scales that differ."""
    model = Published(SMALL4, "native-nvfp4")
    gate_up = load(model.write(tmp_path))["model.layers.0.mlp.experts.gate_up_proj"]
    monkeypatch.setattr(nvfp4, "stored_values", None)
    data = _packed(gate_up, paired=True)
    experts, n, k = gate_up.shape
    assert data.numel() / (experts * n * k) < 0.75  # of k = 64; 0.5625 and a scale for each row
    panels = data.view(-1, 128 + k // 32 * 576)
    codes = split(panels[:, 128:].unflatten(1, (-1, 576))[..., :512]).flatten(2)
    rows = from_panels(codes, n, True)
    for expert in range(experts):
        for part, half in (("w1", rows[expert, : n // 2]), ("w3", rows[expert, n // 2 :])):
            packed = model.stored[f"layers.0.experts.{expert}.{part}.weight_packed"]
            assert torch.equal(half[:, 0::2], packed & 15)
            assert torch.equal(half[:, 1::2], packed >> 4)
    scales = [float(model.stored[f"layers.0.experts.0.{part}.weight_global_scale"]) for part in ("w1", "w3")]
    assert scales[0] != scales[1]
    whole = from_panels(panels[:, :128].contiguous().view(torch.float32)[..., None], n, True)[0, :, 0]
    torch.testing.assert_close(whole[[0, -1]], 1 / torch.tensor(scales), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        _unpacked(gate_up, paired=True), model.plain["model.layers.0.mlp.experts.gate_up_proj"], rtol=1e-6, atol=0
    )


@needs_native
def test_an_engine_with_nvfp4_weights_dequantises_no_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Published(SMALL4, "native-nvfp4").write(tmp_path)
    monkeypatch.setattr(nvfp4, "stored_values", None)
    logits(folder, weights="nvfp4")
    with pytest.raises(TypeError, match="not callable"):  # as every other format must
        logits(folder, weights="int8")


@needs_native
@pytest.mark.parametrize("name", ["hf-fp8", "native-fp8", "native-nvfp4"])
def test_no_more_than_an_experts_matrices_are_computed_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, sizes, whole = Published(SMALL4, name).write(tmp_path), [], quantised._values

    def counted(parts: Any, dtype: torch.dtype) -> Tensor:
        values = whole(parts, dtype)
        sizes.append(values.numel())
        return values

    monkeypatch.setattr(quantised, "_values", counted)
    logits(folder, weights="int8")
    experts = 2 * SMALL4.num_layers * SMALL4.num_experts
    assert len(sizes) >= experts
    assert max(sizes) <= 2 * SMALL4.expert_width * SMALL4.hidden_size


# ---- the order of rotary pairs


def test_native_rows_give_the_scores_of_complex_rotations(tmp_path: Path) -> None:
    """Mistral's own code multiplies complex numbers, made of neighbouring values, by e^(i angle)."""
    model = Published(SMALL3, "native")
    found = load(model.write(tmp_path))
    x = torch.randn(2, SMALL3.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(16, dtype=torch.float64) * 0.37 + 0.1
    halves, pairs = [], []
    for name, heads, row, position in (("q", 4, 0, 5), ("k", 2, 1, 3)):
        turn = torch.polar(torch.ones(16, dtype=torch.float64), position * angles)
        native = model.stored[f"layers.0.attention.w{name}.weight"].double() @ x[row]
        numbers = torch.view_as_complex(native.view(heads, 16, 2)) * turn
        pairs.append(torch.view_as_real(numbers).flatten(1))
        first, second = (
            (as_tensor(found[f"model.layers.0.self_attn.{name}_proj.weight"]).double() @ x[row])
            .view(heads, 2, 16)
            .unbind(1)
        )
        cos, sin = (position * angles).cos(), (position * angles).sin()
        halves.append(torch.cat([first * cos - second * sin, second * cos + first * sin], 1))
    for head in range(4):
        expected = pairs[0][head] @ pairs[1][head // 2]
        torch.testing.assert_close(halves[0][head] @ halves[1][head // 2], expected, rtol=1e-12, atol=1e-12)
    wq = model.stored["layers.0.attention.wq.weight"].float()
    assert not torch.equal(halves_of_pairs(wq, 4), wq)
    assert isinstance(found["model.layers.0.self_attn.q_proj.weight"], StoredParameter)
    assert isinstance(found["model.layers.0.self_attn.v_proj.weight"], Tensor)


# ---- everything has a place


@pytest.mark.parametrize(("like", "name"), CASES)
def test_what_is_skipped_is_counted(tmp_path: Path, like: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Published(SHAPES[like], name)
    with caplog.at_level(logging.INFO):
        load(model.write(tmp_path))
    assert f"images are not served: {3 if model.native else 2} tensors, " in caplog.text
    endings = ("activation_scale", "qscale_act", "input_global_scale")
    skipped = sum(key.endswith(endings) for key in model.stored)
    assert (f"{skipped} scales of activations not used" in caplog.text) == (skipped > 0)


def test_activation_scales_may_be_missing(tmp_path: Path) -> None:
    model = Published(SMALL4, "hf-fp8")
    model.stored = {key: tensor for key, tensor in model.stored.items() if not key.endswith("activation_scale")}
    assert len(load(model.write(tmp_path))) == len(model.plain)


# ---- which format a folder is in


def test_a_folder_with_both_layouts_is_read_as_hugging_faces(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf, native = Published(SMALL4, "hf-fp8"), Published(SMALL4, "native-fp8", seed=7)
    native.write(hf.write(tmp_path))
    with caplog.at_level(logging.INFO):
        found = load(tmp_path)
    assert "holds config.json and params.json: config.json is read" in caplog.text
    key = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(as_tensor(found[key]), hf.plain[key])
    assert describe(tmp_path).format == "Hugging Face, FP8, one scale a matrix"
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(as_tensor(load(tmp_path)[key]), native.plain[key])
    assert describe(tmp_path).format == "Mistral-native, FP8, one scale a matrix"


def test_several_native_files_need_their_index(tmp_path: Path) -> None:
    model = Published(SMALL4, "native-nvfp4")
    model.write(tmp_path)
    (tmp_path / "consolidated.safetensors").unlink()
    names = sorted(model.stored)
    files = {f"consolidated-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in files.items():
        save_file({name: model.stored[name] for name in held}, tmp_path / file)
    with pytest.raises(
        CheckpointError, match=r"neither consolidated\.safetensors\.index\.json nor consolidated\.safe"
    ):
        load(tmp_path)
    placed = {name: file for file, held in files.items() for name in held}
    (tmp_path / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    for key, parameter in load(tmp_path).items():
        torch.testing.assert_close(as_tensor(parameter), model.plain[key], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("like", "name"), CASES)
def test_info_counts_weights_not_codes(tmp_path: Path, like: str, name: str) -> None:
    model = Published(SHAPES[like], name)
    info = describe(model.write(tmp_path))
    vision = 9 if model.native else 6
    assert info.parameters == sum(tensor.numel() for tensor in model.plain.values()) + vision
    assert info.num_bytes == sum(tensor.nbytes for tensor in model.stored.values())
    assert "other" not in {component.name for component in info.components}
