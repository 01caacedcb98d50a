"""Checkpoints of compressed-tensors are the models that compressed-tensors makes of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import compressed as support
import pytest
import torch
from compressed import SMALL3, SMALL4, Compressed, assert_same
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization.lifecycle.forward import dequantize
from loading import load, logits
from native_only import needs_native
from published import FP8_CONFIG
from safetensors.torch import save_file
from torch import Tensor

from cierzo.engine.llm import LLM
from cierzo.engine.model.build import parameter_specs
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.parameters import Parameter, above_each_other, as_tensor
from cierzo.engine.quantisation import WeightGroup
from cierzo.engine.weights import quantised
from cierzo.engine.weights.grids import GridMatrix
from cierzo.engine.weights.info import describe
from cierzo.engine.weights.quantised import StoredParameter
from cierzo.scheduler.params import SamplingParams

SHAPES = {"small3": SMALL3, "small4": SMALL4}
CASES = [
    (like, name) for like in SHAPES for name in support.SCHEMES if not (like == "small4" and name.endswith("-128"))
]
CPU = torch.device("cpu")
Q_A, KV_A, O_PROJ = (
    f"model.layers.1.self_attn.{name}.weight" for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
)
GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


# ---- values


@pytest.mark.parametrize(("like", "name"), CASES)
def test_every_parameter_is_decompressed_to_the_same_bits(tmp_path: Path, like: str, name: str) -> None:
    model = Compressed(SHAPES[like], name)
    assert model.plain[O_PROJ].dtype == (torch.bfloat16 if name in ("nvfp4", "mxfp4") else torch.float32)
    assert_same(load(model.write(tmp_path)), model)


@pytest.mark.parametrize(
    "name", ["fp8-static", "fp8-block", "w8a8-asymmetric", "w8a16", "w4a16", "w4a16-asymmetric"]
)
def test_with_scales_in_bfloat16_too(tmp_path: Path, name: str) -> None:
    model = Compressed(SMALL4, name, scale_dtype=torch.bfloat16, seed=1)
    assert model.plain[O_PROJ].dtype == torch.bfloat16
    assert_same(load(model.write(tmp_path)), model)


@pytest.mark.parametrize("name", ["w4a16", "w8a16"])
def test_with_scales_in_half_precision_a_product_is_rounded_once(tmp_path: Path, name: str) -> None:
    """compressed-tensors rounds it to a half first: to a half ours is the same."""
    model = Compressed(SMALL3, name, scale_dtype=torch.float16, seed=2)
    assert_same(load(model.write(tmp_path)), model)


@pytest.mark.parametrize("name", ["fp8-static", "fp8-dynamic", "fp8-block", "w8a8", "w4a16", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("like", SHAPES)
def test_logits_are_those_of_the_decompressed_model(tmp_path: Path, like: str, name: str) -> None:
    model = Compressed(SHAPES[like], name, scale_dtype=torch.bfloat16, seed=3)
    found = logits(model.write(tmp_path / "stored"))
    assert torch.equal(found, logits(model.write_plain(tmp_path / "plain", torch.bfloat16)))


@pytest.mark.parametrize("name", ["fp8-small-block", "w4a16-asymmetric", "w8a16", "nvfp4", "mxfp4"])
def test_the_ranks_slices_are_the_whole(tmp_path: Path, name: str) -> None:
    """Where cuts go through a block, a word of packed integers, or between groups."""
    model = Compressed(SMALL4, name, seed=4)
    specs = parameter_specs(read_model_config(model.write(tmp_path)))
    ranks = [load(tmp_path, rank, 2) for rank in range(2)]
    for key, spec in specs.items():
        if spec.shard_axis is None:
            continue
        wanted = model.plain[key]
        pieces = [as_tensor(rank[key]).to(wanted.dtype) for rank in ranks]
        assert pieces[0].shape == pieces[1].shape == ranks[0][key].shape
        sections = zip(*(piece.chunk(spec.sections, spec.shard_axis) for piece in pieces), strict=True)
        joined = [torch.cat(section, spec.shard_axis) for section in sections]
        assert torch.equal(torch.cat(joined, spec.shard_axis), wanted), key


def test_sizes_that_fill_no_whole_words(tmp_path: Path) -> None:
    """20 columns of 4 bits are two words and a half, and 6 rows of zero points three quarters of one."""
    matrix, values = support.compress(torch.randn(6, 20), support.make_scheme("w4a16-channel"))
    assert matrix["weight_packed"].shape == (6, 3)
    model = Compressed(SMALL3, "w4a16-channel")
    stem = "model.layers.0.self_attn.v_proj"
    parameter = load(model.write(tmp_path))[f"{stem}.weight"]
    assert torch.equal(as_tensor(parameter), model.plain[f"{stem}.weight"])
    scheme = support.make_scheme("w4a16-asymmetric").model_copy(deep=True)
    scheme.weights.group_size = 20
    matrix, values = support.compress(torch.randn(6, 20), scheme)
    assert matrix["weight_zero_point"].shape == (1, 1)
    assert torch.equal(_grid(matrix, "w4a16-asymmetric", 20), values)


def _grid(matrix: dict[str, Tensor], name: str, columns: int) -> Tensor:
    """Values of a lone matrix."""
    n, k = matrix["weight_shape"].tolist()
    group = WeightGroup("packed", bits=4, strategy="group", rows=1, columns=columns, zero_points=True)
    return GridMatrix(
        name,
        group,
        (n, k),
        matrix["weight_packed"],
        matrix["weight_scale"],
        f"{name}.weight_scale",
        torch.arange(n),
        (0, k),
        matrix["weight_zero_point"],
        matrix["weight_shape"],
    ).values(torch.float32)


def test_groups_of_one_model_may_differ(tmp_path: Path) -> None:
    """q, k and v are one matrix for the kernels, and stored in three ways; what is ignored is plain."""
    schemes = {"re:.*q_proj$": "fp8-dynamic", "re:.*k_proj$": "w4a16", "re:.*o_proj$": "nvfp4"}
    model = Compressed(SMALL3, schemes, ignore=("lm_head", "re:.*v_proj$", "re:.*mlp.*"))
    assert model.quantisation["format"] == "mixed-precision"
    found = load(model.write(tmp_path))
    assert_same(found, model)
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    joined = above_each_other([found[name] for name in names])
    assert torch.equal(as_tensor(joined), torch.cat([model.plain[name].float() for name in names]))
    with LLM(tmp_path, kv_cache_gib=0.01) as llm:
        (output,) = llm.generate([[1, 5, 9]], SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))
    assert len(output.token_ids) == 5


def test_a_name_has_precedence_over_a_pattern_and_this_over_a_class(tmp_path: Path) -> None:
    model = Compressed(SMALL3, "w4a16")
    exact = {**model.quantisation["config_groups"]["group_0"], "targets": ["model.layers.1.mlp.down_proj"]}
    linear = json.loads(json.dumps(exact))
    linear["targets"], linear["weights"]["group_size"] = ["Linear"], 64
    pattern = json.loads(json.dumps(exact))
    pattern["targets"] = ["re:.*(layers.0|self_attn|gate_proj|up_proj)"]
    model.quantisation["config_groups"] = {"a": linear, "b": exact, "c": pattern}
    assert_same(load(model.write(tmp_path)), model)


def test_a_quantised_vision_tower_is_left_aside_whole(tmp_path: Path) -> None:
    model = Compressed(SMALL3, "w4a16")
    endings = ("weight_packed", "weight_scale", "weight_shape", "weight_g_idx", "weight_scale_2")
    model.stored |= {f"vision_tower.layers.0.wq.{ending}": torch.zeros(4) for ending in endings}
    assert_same(load(model.write(tmp_path)), model)


def test_frozen_is_as_good_as_compressed(tmp_path: Path) -> None:
    model = Compressed(SMALL3, "fp8-static")
    model.quantisation["quantization_status"] = "frozen"
    model.quantisation["sparsity_config"] = {"format": "dense", "ignore": []}
    assert_same(load(model.write(tmp_path)), model)


def test_columns_of_columns(tmp_path: Path) -> None:
    model = Compressed(SMALL4, "w4a16-asymmetric")
    (parts,) = _stored(load(model.write(tmp_path))[O_PROJ]).experts
    cut = parts[0].rows(8, 40).columns(16, 48).rows(3, 7).columns(9, 17)
    assert cut.shape == (4, 8)
    assert torch.equal(cut.values(torch.float32), model.plain[O_PROJ][11:15, 25:33])


def test_nvfp4_is_rounded_as_compressed_tensors_rounds_it(tmp_path: Path) -> None:
    """In float32 too, where scale / divisor and scale * (1 / divisor) differ."""
    model, key = Compressed(SMALL4, "nvfp4"), "model.layers.1.self_attn.q_b_proj.weight"
    found = as_tensor(load(model.write(tmp_path))[key])
    stored = {name.removeprefix(key.removesuffix("weight")): one for name, one in model.stored.items()}
    wanted = dequantize(
        unpack_fp4_from_uint8(stored["weight_packed"], *found.shape, dtype=torch.float32),
        stored["weight_scale"].float(),
        args=support.make_scheme("nvfp4").weights,
        global_scale=stored["weight_global_scale"],
        dtype=torch.float32,
    )
    assert torch.equal(found, wanted)


def _stored(parameter: Parameter) -> StoredParameter:
    assert isinstance(parameter, StoredParameter)
    return parameter


# ---- blocks and pairs in transformers' own spellings


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_fp8_in_blocks_as_deepseek_spells_them(tmp_path: Path, activations: str) -> None:
    model = Compressed(SMALL3, "fp8-block")
    model.stored = {name.replace("weight_scale", "weight_scale_inv"): one for name, one in model.stored.items()}
    model.config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": activations,
        "weight_block_size": [128, 128],
    }
    assert_same(load(model.write(tmp_path)), model)
    assert describe(tmp_path).format == "Hugging Face, FP8, one scale a block of 128 x 128"


def test_stacks_of_experts_in_blocks(tmp_path: Path) -> None:
    model = Compressed(SMALL4, "fp8-block")
    for layer in range(2):
        for fused, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            stem = f"model.layers.{layer}.mlp.experts"
            for ending, into in ((".weight", ""), (".weight_scale", "_scale_inv")):
                experts = [
                    [model.stored.pop(f"{stem}.{expert}.{part}{ending}") for part in parts] for expert in range(5)
                ]
                stacked = torch.stack([torch.cat([one.float() for one in each]) for each in experts])
                model.stored[f"{stem}.{fused}{into}"] = stacked
            if len(parts) == 2:  # 64 rows of each lie in one block of 128
                scales = model.stored[f"{stem}.{fused}_scale_inv"][:, :1].contiguous()
                model.stored[f"{stem}.{fused}_scale_inv"] = scales
            codes = model.stored[f"{stem}.{fused}"]
            model.plain[f"{stem}.{fused}"] = codes * model.stored[f"{stem}.{fused}_scale_inv"]
            model.stored[f"{stem}.{fused}"] = codes.to(torch.float8_e4m3fn)
    model.stored = {
        name.replace("weight_scale", "weight_scale_inv") if "scale_inv" not in name else name: one
        for name, one in model.stored.items()
    }
    model.config["quantization_config"] = {**FP8_CONFIG, "weight_block_size": [128, 128]}
    assert_same(load(model.write(tmp_path)), model)


@pytest.mark.parametrize("name", ["nvfp4", "w4a16-asymmetric", "fp8-dynamic", "mxfp4"])
def test_stacks_of_experts_under_one_name(tmp_path: Path, name: str) -> None:
    """Y.weight_packed [E,n,k/2] and what lies beside it, instead of a matrix for each expert."""
    model = Compressed(SMALL4, name, ignore=("lm_head", "re:.*"))
    model.stored = {key: one for key, one in model.stored.items() if ".mlp.experts." not in key}
    for key in [key for key in model.plain if ".mlp.experts." in key]:
        count, n, k = model.plain[key].shape
        experts = [
            support.compress(torch.randn(n, k, generator=model.random), support.make_scheme(name))
            for _ in range(count)
        ]
        for ending in experts[0][0]:
            tensors = [compressed[ending] for compressed, _ in experts]
            stacked = torch.stack([one.view(torch.uint8) for one in tensors]).view(tensors[0].dtype)
            shape = torch.tensor([count, n, k])
            model.stored[f"{key}.{ending}"] = shape if ending == "weight_shape" else stacked
        model.plain[key] = torch.stack([values for _, values in experts])
    assert_same(load(model.write(tmp_path)), model)
    assert describe(tmp_path).parameters == sum(tensor.numel() for tensor in model.plain.values())


def test_stacks_of_experts_in_mxfp4_as_gpt_oss_spells_them(tmp_path: Path) -> None:
    """Blocks of 16 bytes and their scales; transformers' own conversion gives the transposed experts."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = Compressed(SMALL4, "mxfp4")
    for key, values in list(model.plain.items()):
        stem = key.removesuffix(".weight")
        if f"{stem}.weight_packed" in model.stored:  # all but the experts is plain
            del model.stored[f"{stem}.weight_packed"], model.stored[f"{stem}.weight_scale"]
            model.stored[key] = values
    for key in [key for key in model.plain if "mlp.experts." in key]:
        count, n, k = model.plain[key].shape
        blocks = torch.randint(0, 256, (count, n, k // 32, 16), generator=model.random, dtype=torch.uint8)
        scales = torch.randint(110, 124, (count, n, k // 32), generator=model.random, dtype=torch.uint8)
        model.plain[key] = convert_moe_packed_tensors(blocks, scales).transpose(1, 2)
        model.stored |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    model.stored = {
        name: one for name, one in model.stored.items() if not any(f".experts.{e}." in name for e in range(5))
    }
    model.config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*"]}
    assert_same(load(model.write(tmp_path)), model)
    info = describe(tmp_path)
    assert info.format == "Hugging Face, MXFP4, experts only"
    assert info.parameters == sum(tensor.numel() for tensor in model.plain.values())


@needs_native
@pytest.mark.parametrize("name", ["fp8-block", "w4a16", "w8a16", "mxfp4"])
def test_no_more_than_an_experts_matrices_are_computed_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, sizes, whole = Compressed(SMALL4, name).write(tmp_path), [], quantised._values

    def counted(parts: tuple[quantised.StoredMatrix, ...], dtype: torch.dtype) -> Tensor:
        values = whole(parts, dtype)
        sizes.append(values.numel())
        return values

    monkeypatch.setattr(quantised, "_values", counted)
    logits(folder, weights="int8")
    assert len(sizes) >= 2 * SMALL4.num_layers * SMALL4.num_experts
    assert max(sizes) <= 2 * SMALL4.expert_width * SMALL4.hidden_size


# ---- what is said


def test_what_is_done_with_activations_and_the_cache_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Compressed(SMALL3, "fp8-static")
    model.quantisation["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    for layer in range(2):
        model.stored |= {f"model.layers.{layer}.self_attn.{one}_scale": torch.ones(1) for one in "kv"}
    with caplog.at_level(logging.INFO):
        assert_same(load(model.write(tmp_path)), model)
    assert (
        "made for activations in FP8 (static), which is NOT done: activations have 16 bits on a GPU" in caplog.text
    )
    assert (
        "made for keys and values in FP8 (static), which is NOT done: --kv-dtype says what they are" in caplog.text
    )
    assert (
        "FP8, one scale a matrix: served as it is stored with --weights fp8 on a GPU; otherwise each matrix"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("fp8-dynamic", "FP8, one scale a row"),
        ("fp8-block", "FP8, one scale a block of 128 x 128"),
        ("w8a8", "INT8, one scale a row"),
        ("w4a16", "INT4, one scale for 32 columns"),
        ("w4a16-asymmetric", "INT4, one scale for 32 columns and zero points"),
        ("nvfp4", "NVFP4"),
        ("mxfp4", "MXFP4"),
    ],
)
def test_info_names_the_format_and_counts_weights(tmp_path: Path, name: str, format: str) -> None:
    model = Compressed(SMALL3, name)
    info = describe(model.write(tmp_path))
    assert info.format == f"Hugging Face, {format} (compressed-tensors)"
    assert info.parameters == sum(tensor.numel() for tensor in model.plain.values())
    assert info.num_bytes == sum(tensor.nbytes for tensor in model.stored.values())


def test_a_head_that_is_quantised_too(tmp_path: Path) -> None:
    """Embedding and head are named by targets of their own."""
    model = Compressed(SMALL3, "w8a16")
    for name, target in (("lm_head", "lm_head"), ("model.embed_tokens", "Embedding")):
        compressed, values = support.compress(model.plain[f"{name}.weight"], support.make_scheme("w8a16"))
        del model.stored[f"{name}.weight"]
        model.stored |= {f"{name}.{ending}": tensor for ending, tensor in compressed.items()}
        model.plain[f"{name}.weight"] = values
        model.quantisation["config_groups"]["group_0"]["targets"].append(target)
    model.quantisation["ignore"] = []
    assert_same(load(model.write(tmp_path)), model)
    save_file(model.stored, tmp_path / "model.safetensors")
    logits(tmp_path)
