"""Mistakes that other engines made with the rotary embedding and the scales of these models, each with its report.

They keep the numbers of the list of such mistakes that was gathered before this engine was written.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.ministral3.modeling_ministral3 import (
    Ministral3Attention,
    Ministral3RotaryEmbedding,
    get_llama_4_attn_scale,
)

from cierzo.engine.errors import CheckpointError
from cierzo.engine.model.config import GqaConfig, ModelConfig, QueryScaling
from cierzo.engine.model.positions import Positions, query_scale
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.model.rope_config import YarnConfig

CPU = torch.device("cpu")


def text_config(original: int, factor: float, theta: float, **sizes: int) -> dict[str, Any]:
    """The rope settings of a published `ministral3`."""
    rope = {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": factor,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": original,
        "rope_theta": theta,
        "rope_type": "yarn",
        "type": "yarn",
    }
    return {
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": int(original * factor),
        "model_type": "ministral3",
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_parameters": rope,
        "sliding_window": None,
        "vocab_size": 131072,
        **sizes,
    }


def params(text: dict[str, Any]) -> dict[str, Any]:
    """The params.json of the same model."""
    rope = text["rope_parameters"]
    original = rope["original_max_position_embeddings"]
    return {
        "dim": text["hidden_size"],
        "n_layers": text["num_hidden_layers"],
        "head_dim": text["head_dim"],
        "hidden_dim": text["intermediate_size"],
        "n_heads": text["num_attention_heads"],
        "n_kv_heads": text["num_key_value_heads"],
        "rope_theta": rope["rope_theta"],
        "norm_eps": text["rms_norm_eps"],
        "vocab_size": text["vocab_size"],
        "tied_embeddings": False,
        "max_position_embeddings": text["max_position_embeddings"],
        "llama_4_scaling": {"original_max_position_embeddings": original, "beta": 0.1},
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")),
        "moe": None,
        "yarn": {
            "original_max_position_embeddings": original,
            "factor": rope["factor"],
            "apply_scale": False,
            "beta": 32,
            "alpha": 1,
        },
        "vision_encoder": {"hidden_size": 1024, "image_token_id": 10, "adapter_bias": False},
    }


MODELS = {
    "Ministral 3 8B": text_config(
        16384, 16.0, 1e6, hidden_size=4096, intermediate_size=14336, num_hidden_layers=34
    ),
    "Devstral Small 2": text_config(
        8192, 48.0, 1e8, hidden_size=5120, intermediate_size=32768, num_hidden_layers=40
    ),
}
LLAMA31 = {
    "model_type": "llama",
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
}


def read_hf(folder: Path, text: dict[str, Any]) -> ModelConfig:
    """As published: inside a `mistral3`, whose own flag does not say that it is tied."""
    values = {"model_type": "mistral3", "text_config": text, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(values))
    return read_model_config(folder)


def read_native(folder: Path, text: dict[str, Any], **yarn: Any) -> ModelConfig:
    """In Mistral's own spelling, with changes to its `yarn`."""
    values = params(text)
    values["yarn"] |= yarn
    (folder / "params.json").write_text(json.dumps(values))
    return read_model_config(folder)


def with_rope(text: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**text, "rope_parameters": {**text["rope_parameters"], **changes}}


def rotary(config: dict[str, Any]) -> Any:
    """transformers' table of frequencies for a config.json, of which it would change the rope settings."""
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(config))
    return (LlamaRotaryEmbedding if config["model_type"] == "llama" else Ministral3RotaryEmbedding)(theirs)


@pytest.mark.parametrize("name", MODELS)
def test_ministral3_is_the_same_in_both_spellings(tmp_path: Path, name: str) -> None:
    config = read_hf(tmp_path, MODELS[name])
    (tmp_path / "native").mkdir()
    assert read_native(tmp_path / "native", MODELS[name]) == config
    assert config.architecture == "ministral3"
    assert config.attention == GqaConfig(num_kv_heads=8, head_dim=128)
    assert config.moe is None
    assert not config.rope.interleaved


@pytest.mark.parametrize("name", MODELS)
def test_pitfall_1_no_magnitude_in_the_softmax_scale(tmp_path: Path, name: str) -> None:
    """apply_scale false: 128^-0.5, and not 2.2 times that (sglang#26203, vllm#57563, transformers#47435)."""
    for config in (read_hf(tmp_path, MODELS[name]), read_native(_new(tmp_path), MODELS[name])):
        assert config.softmax_scale == 128**-0.5
    with torch.device("meta"):
        assert Ministral3Attention(transformers.Ministral3Config(), 0).scaling == config.softmax_scale


@pytest.mark.parametrize("name", MODELS)
def test_pitfall_2_cos_and_sin_are_not_stretched(tmp_path: Path, name: str) -> None:
    """Code that ignores mscale and mscale_all_dim multiplies them by 1.277 (factor 16): endless repetition
    (vllm#48623, sglang#22711)."""
    assert 0.1 * math.log(16) + 1 == pytest.approx(1.277, abs=1e-3)
    for config in (read_hf(tmp_path, MODELS[name]), read_native(_new(tmp_path), MODELS[name])):
        assert Positions(config, CPU).magnitude == 1.0 == rotary(MODELS[name]).attention_scaling
    without = {key: value for key, value in MODELS[name]["rope_parameters"].items() if "mscale" not in key}
    text = {**MODELS[name], "rope_parameters": without}
    magnitude = Positions(read_hf(tmp_path, text), CPU).magnitude
    assert magnitude == pytest.approx(rotary(text).attention_scaling, rel=1e-12)
    assert magnitude > 1.2


@pytest.mark.parametrize("name", MODELS)
def test_pitfall_3_apply_scale_is_the_opposite_of_mscale_all_dim(tmp_path: Path, name: str) -> None:
    """True is mscale_all_dim 0, false is mscale_all_dim 1; the softmax scale is the same in both (llama.cpp#22612,
    ollama#15975)."""
    native = _new(tmp_path)
    for applied, all_dim in ((True, 0.0), (False, 1.0)):
        text = with_rope(MODELS[name], mscale_all_dim=all_dim)
        ours = read_native(native, MODELS[name], apply_scale=applied)
        assert ours == read_hf(tmp_path, text)
        assert Positions(ours, CPU).magnitude == pytest.approx(rotary(text).attention_scaling, rel=1e-12)
    assert read_native(native, MODELS[name], apply_scale=True).softmax_scale == 128**-0.5


@pytest.mark.parametrize("name", MODELS)
def test_pitfall_13_yarn_is_no_wavelength_rule(tmp_path: Path, name: str) -> None:
    """Each has its own frequencies; the query scaling's beta is no end of a ramp. Atlas read it so: gibberish from
    600 tokens on."""
    text = MODELS[name]
    ours = Positions(read_hf(tmp_path, text), CPU).inv_freq
    torch.testing.assert_close(ours, rotary(text).inv_freq, rtol=2e-6, atol=0.0)
    other = Positions(read_hf(tmp_path, with_rope(text, llama_4_scaling_beta=0.7)), CPU).inv_freq
    assert torch.equal(ours, other)
    rope = text["rope_parameters"]
    wavelengths = {
        **LLAMA31,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {
            **LLAMA31["rope_scaling"],  # type: ignore[dict-item]
            "factor": rope["factor"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(wavelengths))
    blended = Positions(read_model_config(tmp_path), CPU).inv_freq
    assert (blended / ours - 1).abs().max() > 0.1


def test_pitfall_13_llama_has_the_wavelength_rule(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA31))
    positions = Positions(read_model_config(tmp_path), CPU)
    theirs = rotary(LLAMA31)
    torch.testing.assert_close(positions.inv_freq, theirs.inv_freq, rtol=1e-6, atol=0.0)
    assert positions.magnitude == theirs.attention_scaling == 1.0


@pytest.mark.parametrize("name", MODELS)
def test_pitfall_15_both_spellings_scale_the_query(tmp_path: Path, name: str) -> None:
    """llama.cpp's converter reads one of them alone, and leaves it out beyond the original length, in silence."""
    original = MODELS[name]["rope_parameters"]["original_max_position_embeddings"]
    for config in (read_hf(tmp_path, MODELS[name]), read_native(_new(tmp_path), MODELS[name])):
        assert config.query_scaling == QueryScaling(beta=0.1, original_positions=original)
    positions = torch.tensor([0, original - 1, original, 2 * original, 16 * original - 1])
    ours = query_scale(positions, 0.1, original)
    torch.testing.assert_close(ours, get_llama_4_attn_scale(positions[None], 0.1, original).flatten())
    assert ours[:2].tolist() == [1.0, 1.0]
    assert float(ours[2]) == pytest.approx(1 + 0.1 * math.log(2))
    # transformers' class cannot run without it either
    text = with_rope(MODELS[name])
    del text["rope_parameters"]["llama_4_scaling_beta"]
    with pytest.raises(CheckpointError, match=r"rope_parameters\.llama_4_scaling_beta is missing"):
        read_hf(tmp_path, text)


def test_yarn_without_rounding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"text_config\.rope_parameters\.truncate is False"):
        read_hf(tmp_path, with_rope(MODELS["Ministral 3 8B"], truncate=False))


@pytest.mark.parametrize("window", [None, 262144])
def test_a_window_that_never_cuts_passes(tmp_path: Path, window: int | None) -> None:
    config = read_hf(tmp_path, {**MODELS["Ministral 3 8B"], "sliding_window": window})
    assert isinstance(config.rope.scaling, YarnConfig)


@pytest.mark.parametrize("more", [{}, {"use_sliding_window": False}])
def test_a_window_of_ministral3_is_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    """transformers' class has no `use_sliding_window`, and cuts."""
    with pytest.raises(CheckpointError, match=r"text_config\.sliding_window is 4096, must be null, or at least"):
        read_hf(tmp_path, {**MODELS["Ministral 3 8B"], "sliding_window": 4096, **more})


def _new(folder: Path) -> Path:
    """A folder inside it."""
    inner = folder / "native"
    inner.mkdir(exist_ok=True)
    return inner
