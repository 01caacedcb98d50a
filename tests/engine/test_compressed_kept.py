"""Codes of compressed-tensors that a number format keeps as they are; and pitfalls that others fell into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed import SMALL3, SMALL4, Compressed, assert_same
from loading import load, logits
from published import FP8_CONFIG, Published
from published import SMALL4 as PUBLISHED4
from torch import Tensor

from cierzo.engine.parameters import MatrixRequest, Parameter, above_each_other, as_tensor
from cierzo.engine.weights.matrices import DeviceMatrices
from cierzo.engine.weights.quantised import StoredParameter, kept_codes, pack_parameter
from cierzo.kernels.formats.definition import unpack
from cierzo.kernels.formats.device import DeviceMatrix, dequantise
from cierzo.kernels.formats.four_bit import to_octets
from cierzo.kernels.formats.packed import empty_packed, packed_bytes, view_packed

CPU = torch.device("cpu")
Q_A, KV_A, O_PROJ = (
    f"model.layers.1.self_attn.{name}.weight" for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
)
GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))

# ---- codes that are kept


def on_device(parameters: list[Parameter], format: str, activations: str = "bf16") -> DeviceMatrix:
    """The matrix that a GPU would get, on the CPU."""
    joined = above_each_other(parameters)
    source = DeviceMatrices(format, torch.bfloat16, CPU, activations)
    role = "experts" if len(joined.shape) == 3 else "linear"
    found = source.matrix(MatrixRequest("joined", tuple(joined.shape), lambda: joined, role=role))
    assert isinstance(found, DeviceMatrix)
    return found


@pytest.mark.parametrize("name", ["fp8-static", "fp8-dynamic", "fp8-block"])
def test_a_gpu_keeps_fp8_codes_and_every_scale(tmp_path: Path, name: str) -> None:
    model = Compressed(SMALL4, name)
    found = load(model.write(tmp_path))
    for keys in ([Q_A, KV_A], [O_PROJ], [GATE_UP], [DOWN]):
        matrix = on_device([found[key] for key in keys], "fp8")
        assert torch.equal(dequantise(matrix), torch.cat([model.plain[key] for key in keys], -2))
        stem = keys[0].removesuffix(".weight")
        if stem != keys[0]:
            codes = model.stored[f"{stem}.weight"].view(torch.uint8)
            assert torch.equal(matrix.codes[0, : len(codes)].view(torch.uint8), codes)


def test_a_gpu_keeps_fp8_codes_in_blocks_of_a_ranks_columns(tmp_path: Path) -> None:
    model = Compressed(SMALL3, "fp8-block")
    model.write(tmp_path)
    key = "model.layers.0.mlp.down_proj.weight"
    for rank in range(2):
        matrix = on_device([load(tmp_path, rank, 2)[key]], "fp8")
        assert matrix.block == (128, 128)
        assert matrix.scales.shape == (1, 1, 1)
        assert torch.equal(dequantise(matrix), model.plain[key][:, rank * 128 : (rank + 1) * 128])


def test_one_scale_a_matrix_above_scales_of_blocks(tmp_path: Path) -> None:
    """FP8 all of them, q in blocks, k with one scale a row, v with one."""
    schemes = {"re:.*q_proj$": "fp8-block", "re:.*k_proj$": "fp8-weights", "re:.*v_proj$": "fp8-static"}
    model = Compressed(SMALL3, schemes)
    found = load(model.write(tmp_path))
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    matrix = on_device([found[name] for name in names], "fp8")
    assert torch.equal(dequantise(matrix), torch.cat([model.plain[name] for name in names]))


def test_parts_with_blocks_of_two_sizes(tmp_path: Path) -> None:
    model = Compressed(SMALL3, {"re:.*q_proj$": "fp8-block", "re:.*k_proj$": "fp8-group"})
    found = load(model.write(tmp_path))
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk"]
    wanted = torch.cat([model.plain[name] for name in names])
    torch.testing.assert_close(
        dequantise(on_device([found[name] for name in names], "fp8")), wanted, rtol=0.07, atol=1e-3
    )


def test_scales_of_activations_in_int8_are_not_fp8s(tmp_path: Path) -> None:
    model = Compressed(SMALL3, "w8a8-static")
    assert f"{O_PROJ.removesuffix('weight')}input_scale" in model.stored
    matrix = on_device([load(model.write(tmp_path))[O_PROJ]], "fp8", "fp8")
    assert (matrix.activations, matrix.activation_scales) == ("fp8", None)


def test_fp8_blocks_that_no_kernel_reads_are_quantised_anew(tmp_path: Path) -> None:
    model = Compressed(SMALL4, "fp8-small-block")
    matrix = on_device([load(model.write(tmp_path))[O_PROJ]], "fp8")
    assert matrix.block == (1, 64)
    torch.testing.assert_close(dequantise(matrix), model.plain[O_PROJ], rtol=0.07, atol=1e-3)


@pytest.mark.parametrize("name", ["w4a16", "w4a16-channel"])
def test_int4_on_a_cpu_holds_symmetric_groups_exactly(tmp_path: Path, name: str) -> None:
    """Scales of 8 significant bits, and eight times them, are half-precision numbers: the grid is found."""
    model = Compressed(SMALL4, name, scale_dtype=torch.bfloat16)
    found = load(model.write(tmp_path))
    for key in (O_PROJ, DOWN):
        assert torch.equal(packed(found[key], "int4").bfloat16(), model.plain[key])


def test_mxfp4_is_nvfp4_with_powers_of_two(tmp_path: Path) -> None:
    """Code for code, on a CPU and a GPU."""
    model = Compressed(SMALL4, "mxfp4")
    found = load(model.write(tmp_path))
    for key in (O_PROJ, DOWN, GATE_UP):
        assert torch.equal(packed(found[key], "nvfp4", paired=key == GATE_UP).bfloat16(), model.plain[key])
    matrix = on_device([found[DOWN]], "nvfp4")
    codes = torch.stack(
        [model.stored[f"model.layers.1.mlp.experts.{expert}.down_proj.weight_packed"] for expert in range(5)]
    )
    assert torch.equal(to_octets(matrix.codes, 2 * codes.shape[-1]), codes)
    assert torch.equal(dequantise(matrix).bfloat16(), model.plain[DOWN])


def test_mxfp4_rows_of_more_than_seventeen_powers_are_quantised_anew(tmp_path: Path) -> None:
    model = Compressed(SMALL4, "mxfp4")
    stem = O_PROJ.removesuffix(".weight")
    scales, codes = model.stored[f"{stem}.weight_scale"], model.stored[f"{stem}.weight_packed"]
    scales[3] = torch.tensor([120, 103], dtype=torch.uint8)
    codes[4, 16:], scales[4] = 0x80, torch.tensor([120, 0], dtype=torch.uint8)  # zeros need no power
    codes[5], scales[5] = 0, torch.tensor([9, 0], dtype=torch.uint8)
    kept = load(model.write(tmp_path))[O_PROJ]
    assert isinstance(kept, StoredParameter)
    assert kept_codes(kept.experts[0], "nvfp4") is not None
    assert torch.equal(packed(kept, "nvfp4"), as_tensor(kept))
    scales[3] = torch.tensor([120, 102], dtype=torch.uint8)
    model.write(tmp_path)
    requantised = load(tmp_path)[O_PROJ]
    assert isinstance(requantised, StoredParameter)
    assert kept_codes(requantised.experts[0], "nvfp4") is None
    found = packed(requantised, "nvfp4")
    assert not torch.equal(found, as_tensor(requantised))
    assert (found - as_tensor(requantised)).norm() < 0.2 * as_tensor(requantised).norm()


def packed(parameter: Parameter, format: str, paired: bool = False) -> Tensor:
    """Unpacked again, in float32."""
    *experts, n, k = parameter.shape
    data = empty_packed((experts[0] if experts else 1) * packed_bytes(format, n, k, paired))
    pack_parameter(parameter, format, paired, data)
    return unpack(view_packed(format, tuple(parameter.shape), torch.float32, paired, data), torch.float32)


# ---- pitfalls that others fell into (model.md, section 6)


def test_pitfall_4_fp8_scales_have_several_names(tmp_path: Path) -> None:
    """FP8 with one scale a matrix: weight_scale_inv, or weight_scale; or the same scale in every block."""
    model = Compressed(SMALL3, "fp8-static")
    assert_same(load(model.write(tmp_path / "compressed")), model)
    renamed = {"weight_scale": "weight_scale_inv", "input_scale": "activation_scale"}
    stored = dict(model.stored)
    for name in model.stored:
        stem, _, last = name.rpartition(".")
        if last in renamed:
            stored[f"{stem}.{renamed[last]}"] = stored.pop(name)
    model.stored, model.config["quantization_config"] = stored, dict(FP8_CONFIG)
    assert_same(load(model.write(tmp_path / "transformers")), model)
    for name in [name for name in stored if name.endswith("weight_scale_inv")]:
        n, k = stored[name.removesuffix("_scale_inv")].shape
        stored[name] = stored[name].expand(-(-n // 128), -(-k // 128)).contiguous()
    model.config["quantization_config"]["weight_block_size"] = [128, 128]
    assert_same(load(model.write(tmp_path / "blocks")), model)


def test_pitfall_5_a_stack_of_experts_has_no_weight_ending_and_one_scale_for_gate_and_up(tmp_path: Path) -> None:
    model = Published(PUBLISHED4, "hf-fp8")
    found = as_tensor(load(model.write(tmp_path))[GATE_UP])
    codes = model.stored[f"language_model.{GATE_UP}"].float()
    scales = model.stored[f"language_model.{GATE_UP}_scale_inv"].float()
    assert scales.shape == (5, 1, 1)
    assert len(set(scales.flatten().tolist())) > 1
    assert torch.equal(found, codes * scales)


def test_pitfall_6_static_scales_of_activations_touch_nothing_unasked(tmp_path: Path) -> None:
    model = Compressed(SMALL3, "fp8-static")
    expected = logits(model.write(tmp_path / "as published"))
    for name in model.stored:
        if name.endswith("input_scale"):
            model.stored[name] = torch.tensor([1e-6])
    assert torch.equal(logits(model.write(tmp_path / "absurd")), expected)
    found = load(tmp_path / "absurd")[O_PROJ]
    matrix = on_device([found], "fp8", "fp8")
    assert matrix.activation_scales is not None
    assert matrix.activation_scales.tolist() == pytest.approx([1e-6])


def test_pitfall_7_matrices_that_are_merged_keep_their_own_scales(tmp_path: Path) -> None:
    """Both of one scale a matrix, and of one a row."""
    for name in ("fp8-static", "fp8-dynamic"):
        model = Compressed(SMALL4, name)
        found = load(model.write(tmp_path / name))
        matrix = on_device([found[Q_A], found[KV_A]], "fp8")
        assert torch.equal(dequantise(matrix), torch.cat([model.plain[Q_A], model.plain[KV_A]]))
        assert len(set(matrix.scales.flatten().tolist())) > 1


def test_pitfall_10_global_scales_are_divisors_and_those_of_activations_have_any_dtype(tmp_path: Path) -> None:
    model = Compressed(SMALL4, "nvfp4")
    stem = "model.layers.1.mlp.experts.3.down_proj"
    dtypes = {one.dtype for name, one in model.stored.items() if name.endswith("input_global_scale")}
    assert dtypes == {torch.bfloat16, torch.float32}
    model.stored[f"{stem}.weight_packed"].fill_(0)[7, 10] = 0x21
    model.stored[f"{stem}.weight_scale"].view(torch.uint8).fill_(0x38)  # 1.0
    for dtype in (torch.float32, torch.bfloat16):
        model.stored[f"{stem}.weight_global_scale"] = torch.tensor([4.0], dtype=dtype)
        values = as_tensor(load(model.write(tmp_path))[DOWN])[3]
        assert values[7, 20:22].tolist() == [0.125, 0.25]
        assert int(values.count_nonzero()) == 2
        assert packed(load(tmp_path)[DOWN], "nvfp4")[3, 7, 20:22].tolist() == [0.125, 0.25]
