"""transformers 5.23 loads and dequantises the same checkpoints: the same weights, and the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed import SMALL3, SMALL4, Compressed
from loading import TOKENS, load, logits
from oracle import ORACLES
from published import FP8_CONFIG

from cierzo.engine.parameters import as_tensor


def dequantised(folder: Path, settings: Any) -> Any:
    """transformers' own way from the folder to a dense model."""
    family = transformers.MistralForCausalLM
    return family.from_pretrained(folder, dtype=torch.float32, quantization_config=settings).float().eval()


def assert_same(folder: Path, oracle: Any) -> None:
    """Weights bit for bit, and logits."""
    theirs = oracle.state_dict()
    found = load(folder)
    for key, parameter in found.items():
        assert torch.equal(as_tensor(parameter), theirs[key].float()), key
    with torch.inference_mode():
        expected = oracle(TOKENS[None]).logits[0]
    torch.testing.assert_close(logits(folder, dtype="float32"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fp8-dynamic", "fp8-block", "w4a16", "w4a16-asymmetric"])
def test_a_dense_model_of_compressed_tensors(tmp_path: Path, name: str) -> None:
    model = Compressed(SMALL3, name)
    for group in model.quantisation["config_groups"].values():
        group["input_activations"] = None  # the oracle's steps would round them
    model.write(tmp_path)
    assert_same(tmp_path, dequantised(tmp_path, transformers.CompressedTensorsConfig(dequantize=True)))


def test_a_dense_model_in_fp8_blocks(tmp_path: Path) -> None:
    """transformers dequantises whole blocks alone: v and k have 64 rows, and blocks of 64."""
    model = Compressed(SMALL3, "fp8-block")
    stored = {}
    for name, tensor in model.stored.items():
        narrow = name.endswith("weight_scale") and len(model.stored[name.removesuffix("_scale")]) == 64
        scales = tensor if narrow or not name.endswith("weight_scale") else tensor.repeat_interleave(2, 0)
        stored[name.replace("weight_scale", "weight_scale_inv")] = scales.contiguous()
    model.stored = stored
    block = [64, 128]
    model.config["quantization_config"] = {**FP8_CONFIG, "activation_scheme": "dynamic", "weight_block_size": block}
    model.write(tmp_path)
    settings = transformers.FineGrainedFP8Config(
        weight_block_size=block, dequantize=True, modules_to_not_convert=["lm_head"]
    )
    assert_same(tmp_path, dequantised(tmp_path, settings))


@pytest.mark.parametrize("name", ["fp8-static", "w4a16", "nvfp4", "mxfp4"])
def test_logits_of_small_4_with_what_compressed_tensors_decompressed(tmp_path: Path, name: str) -> None:
    model = Compressed(SMALL4, name)
    # With it transformers has our softmax scale (model.md 1.3), and into it transformers writes.
    rope = dict(ORACLES["moe"][1]["rope_parameters"])
    model.base["rope_parameters"] = model.config["rope_parameters"] = rope
    named = ("architectures", "model_type", "dtype")
    settings = {key: value for key, value in model.base.items() if key not in named}
    oracle = transformers.Mistral4ForCausalLM(transformers.Mistral4Config(**settings)).float().eval()
    missing = oracle.load_state_dict({key: value.float() for key, value in model.plain.items()}, strict=False)
    assert not missing.unexpected_keys
    assert not [key for key in missing.missing_keys if "inv_freq" not in key]
    with torch.inference_mode():
        expected = oracle(TOKENS[None]).logits[0]
    found = logits(model.write(tmp_path), dtype="float32")
    if name == "nvfp4":  # decompressed to bfloat16, where ours are float32
        assert (found - expected).norm() < 0.01 * expected.norm()
    else:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
