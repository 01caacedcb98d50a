"""Folders that people download, cut down to toy size: each runs as transformers runs what it loads from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loading import TOKENS, logits
from published import FP8_CONFIG, NATIVE
from safetensors.torch import save_file
from tiny_folders import write_config
from torch import Tensor

from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.weights.headers import read_checkpoint_headers
from cierzo.engine.weights.names import map_names

# The fields of each published config.json, and no others; sizes and lengths are the toy's.
SIZES: dict[str, Any] = {
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 192,
}
PIXTRAL: dict[str, Any] = {
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 16,
    "image_size": 28,
    "intermediate_size": 16,
    "model_type": "pixtral",
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 1,
    "patch_size": 14,
    "rope_theta": 10000.0,
}
CLIP: dict[str, Any] = {
    "hidden_size": 16,
    "image_size": 28,
    "intermediate_size": 16,
    "model_type": "clip_vision_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 14,
    "projection_dim": 8,
    "vocab_size": 32000,
}
SMALL31_TEXT: dict[str, Any] = {
    **SIZES,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "model_type": "mistral",
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000000.0,
    "sliding_window": None,
    "use_cache": True,
}
MISTRAL3: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "torch_dtype": "bfloat16",
    "vision_config": PIXTRAL,
    "vision_feature_layer": -1,
}
MINISTRAL3_TEXT: dict[str, Any] = {
    **{name: value for name, value in SMALL31_TEXT.items() if name != "rope_theta"},
    "max_position_embeddings": 128,
    "model_type": "ministral3",
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 8,
        "rope_theta": 1000000.0,
        "rope_type": "yarn",
        "type": "yarn",
    },
}
LLAVA: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_seq_length": 1,
    "image_token_index": 191,
    "model_type": "llava",
    "projector_hidden_act": "gelu",
}
VICUNA: dict[str, Any] = {
    **SIZES,
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
}
LLAMA3: dict[str, Any] = {
    **SIZES,
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 8, 9],
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
        "rope_type": "llama3",
    },
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "use_cache": True,
}
FOLDERS: dict[str, dict[str, Any]] = {
    "Small 3.1": {**MISTRAL3, "text_config": SMALL31_TEXT},  # no tie flag: the class ties, the stored head counts
    "Ministral 3 8B": {**MISTRAL3, "text_config": MINISTRAL3_TEXT},
    "Ministral 3 3B": {**MISTRAL3, "text_config": {**MINISTRAL3_TEXT, "tie_word_embeddings": True}},
    "Magistral 2506": {**SMALL31_TEXT, "architectures": ["MistralForCausalLM"], "bos_token_id": 1},
    "Pixtral 12B": {
        **LLAVA,
        "text_config": {
            **SIZES,
            "is_composition": True,
            "max_position_embeddings": 1024000,
            "model_type": "mistral",
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
        },
        "vision_config": PIXTRAL,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "LLaVA 1.5": {**LLAVA, "text_config": VICUNA, "vision_config": CLIP, "vision_feature_layer": -2},
    "LLaVA 1.6": {
        **LLAVA,
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "text_config": {**VICUNA, "model_type": "mistral", "rope_theta": 1000000.0, "sliding_window": None},
        "vision_config": CLIP,
        "image_grid_pinpoints": [[28, 56]],
    },
    "Llama 3.1 8B": LLAMA3,
    "Llama 3.2 1B": {
        **LLAMA3,
        "rope_scaling": {**LLAMA3["rope_scaling"], "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "vicuna 16k": {
        **VICUNA,
        "model_type": "llama",
        "rope_scaling": {"factor": 4.0, "type": "linear"},
        "tie_word_embeddings": False,
    },
}
TIED = ("Ministral 3 3B", "Llama 3.2 1B")  # without a head of their own
# The spelling of transformers 5 and the one that the folders have, outermost first
RENAMED = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """Class names, tied heads and config fields that transformers tells of."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def auto_class(config: dict[str, Any]) -> Any:
    """transformers' class for a folder: with its vision tower, where it has one."""
    task = "ImageTextToText" if "text_config" in config else "CausalLM"
    return getattr(transformers, f"AutoModelFor{task}")


def random_weights(folder: Path, config: dict[str, Any], tied: bool) -> dict[str, Tensor]:
    """Weights under the names of transformers 5; the head is its own, or left out."""
    model = auto_class(config).from_config(transformers.AutoConfig.from_pretrained(folder))
    random, weights = torch.Generator().manual_seed(7), {}
    for name, tensor in model.state_dict().items():
        size = 0.5 if "embed" in name else 0.15
        weights[name] = torch.randn(tensor.shape, generator=random) * size + (tensor.dim() == 1)
    if tied:
        del weights["lm_head.weight"]
    return weights


def published_name(name: str) -> str:
    """A tensor's name in a published folder of a multimodal model."""
    return next((old + name.removeprefix(new) for new, old in RENAMED if name.startswith(new)), name)


@torch.inference_mode()
def loaded_by_transformers(folder: Path, config: dict[str, Any]) -> Tensor:
    """Logits of transformers, from the folder as it lies there."""
    model, told = auto_class(config).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    found: Tensor = model.eval()(input_ids=TOKENS[None]).logits[0]
    return found


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        *((name, "published") for name in FOLDERS),
        *((name, "transformers 5") for name in FOLDERS if "text_config" in FOLDERS[name]),
    ],
)
def test_runs_as_transformers_runs_the_folder(tmp_path: Path, name: str, spelling: str) -> None:
    config = FOLDERS[name]
    folder = write_config(tmp_path / "model", config)
    weights = random_weights(folder, config, name in TIED)
    if spelling == "published" and "text_config" in config:
        weights = {published_name(key): tensor for key, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    expected = loaded_by_transformers(folder, config)
    torch.testing.assert_close(logits(folder, dtype="float32"), expected, rtol=1e-4, atol=1e-4)
    format, tensors = read_checkpoint_headers(folder)
    mapped = map_names(tensors, format)
    aside = {key for key in weights if "language_model" not in key and "lm_head" not in key}
    assert set(mapped.vision) == (aside if "text_config" in config else set())
    assert not mapped.ignored


def test_rope_beyond_the_original_length_matters_here(tmp_path: Path) -> None:
    """Faults that the comparison above might miss: a query not scaled, a frequency not stretched."""
    config = FOLDERS["Ministral 3 8B"]
    folder = write_config(tmp_path, config)
    weights = random_weights(folder, config, tied=False)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    whole = logits(folder, dtype="float32")
    rope = config["text_config"]["rope_parameters"]
    for change in ({"llama_4_scaling_beta": 0.0}, {"factor": 8.0}, {"mscale_all_dim": 0.0}):
        text = {**config["text_config"], "rope_parameters": {**rope, **change}}
        write_config(folder, {**config, "text_config": text})
        other = logits(folder, dtype="float32")
        assert (other - whole).abs().max() > 0.01, change


def test_ministral3_in_fp8_as_published(tmp_path: Path) -> None:
    """A multimodal folder with one scale a matrix, which transformers dequantises."""
    config = {**FOLDERS["Ministral 3 8B"], "quantization_config": {**FP8_CONFIG, "dequantize": False}}
    folder = write_config(tmp_path, FOLDERS["Ministral 3 8B"])
    weights = random_weights(folder, config, tied=False)
    stored: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not name.endswith("proj.weight") or "language_model" not in name:
            stored[published_name(name)] = tensor.bfloat16()
            continue
        scale = (tensor.abs().max() / 448).bfloat16()
        stored[published_name(name)] = (tensor / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored[published_name(name).replace(".weight", ".weight_scale_inv")] = scale
        stored[published_name(name).replace(".weight", ".activation_scale")] = torch.tensor(0.5).bfloat16()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, config)
    settings = transformers.FineGrainedFP8Config(**{**FP8_CONFIG, "dequantize": True})
    model = transformers.Mistral3ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings
    )
    with torch.inference_mode():
        expected = model.float().eval()(input_ids=TOKENS[None]).logits[0]
    torch.testing.assert_close(logits(folder, dtype="float32"), expected, rtol=1e-4, atol=1e-4)


# params.json of Pixtral 12B: no length, no tie flag
PIXTRAL_PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 2,
    "head_dim": 16,
    "hidden_dim": 96,
    "n_heads": 32,
    "n_kv_heads": 2,
    "rope_theta": 1000000000.0,
    "norm_eps": 1e-05,
    "vocab_size": 192,
    "vision_encoder": {
        "hidden_size": 1024,
        "num_channels": 3,
        "image_size": 1024,
        "patch_size": 16,
        "rope_theta": 10000.0,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "adapter_bias": True,
        "image_token_id": 10,
    },
}
PIXTRAL_VISION = (  # a few of each kind
    *("vision_encoder.patch_conv.weight", "vision_encoder.ln_pre.weight"),
    "vision_encoder.transformer.layers.0.attention.wq.weight",
    *(f"vision_language_adapter.{name}" for name in ("w_in.weight", "w_in.bias", "w_out.weight", "w_out.bias")),
)


def test_pixtral_in_its_own_layout(tmp_path: Path) -> None:
    """params.json beside a vision_encoder: the text model is that of the Hugging Face folder."""
    config = FOLDERS["Pixtral 12B"]
    folder = write_config(tmp_path / "hf", config)
    weights = random_weights(folder, config, tied=False)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    stored = {name: torch.ones(3) for name in PIXTRAL_VISION}
    outer = {"model.language_model.embed_tokens": "tok_embeddings", "model.language_model.norm": "norm"}
    for name, tensor in weights.items():
        stem = name.removesuffix(".weight")
        if ".language_model.layers." in name:
            layer, inner = stem.removeprefix("model.language_model.layers.").split(".", 1)
            if inner in ("self_attn.q_proj", "self_attn.k_proj"):  # pairs side by side
                tensor = tensor.unflatten(0, (-1, 2, 8)).transpose(1, 2).reshape(tensor.shape)
            stored[f"layers.{layer}.{NATIVE[inner]}.weight"] = tensor.contiguous()
        elif stem in outer or stem == "lm_head":
            stored[f"{outer.get(stem, 'output')}.weight"] = tensor
    native = tmp_path / "native"
    native.mkdir()
    save_file(stored, native / "consolidated.safetensors")
    (native / "params.json").write_text(json.dumps(PIXTRAL_PARAMS))
    found = logits(native, dtype="float32", max_model_len=64)
    assert torch.equal(found, logits(folder, dtype="float32", max_model_len=64))
    format, tensors = read_checkpoint_headers(native)
    assert set(map_names(tensors, format).vision) == set(PIXTRAL_VISION)


def test_what_is_published_is_read_whole(tmp_path: Path) -> None:
    """The lengths and ids of the true config.json, whatever the toys above have."""
    config = read_model_config(write_config(tmp_path, FOLDERS["Small 3.1"]))
    assert (config.architecture, config.rope.theta, config.rope.scaling) == ("mistral", 1e9, None)
    assert config.max_position_embeddings == 131072
    assert config.query_scaling is None
    config = read_model_config(write_config(tmp_path, FOLDERS["Pixtral 12B"]))
    assert (config.architecture, config.num_heads, config.max_position_embeddings) == ("mistral", 32, 1024000)
    assert not config.tie_word_embeddings
