"""Mistral 3 of transformers, small and random, with its tower: whole folders in three spellings, and its answers.

published        language_model.model..., vision_tower..., multi_modal_projector...
transformers 5   model.language_model..., lm_head, model.vision_tower..., model.multi_modal_projector...
native           layers..., vision_encoder..., patch_merger..., and params.json
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from oracle import MOE, ORACLES
from published import NATIVE
from safetensors.torch import save_file
from torch import Tensor

IMAGE, BREAK, END = 10, 12, 13
UNIT = 28
VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_channels": 3,
    "image_size": 1540,
    "patch_size": 14,
    "hidden_act": "silu",
    "head_dim": 16,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},  # so small that few patches turn far
    "initializer_range": 0.15,
}
ENCODER: dict[str, Any] = {  # params.json's, of the same tower
    **{name: VISION[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_channels")},
    **{name: VISION[name] for name in ("num_attention_heads", "image_size", "patch_size")},
    "max_image_size": 1540,
    "rope_theta": 100.0,
    "adapter_bias": False,
    "mm_projector_id": "patch_merge",
    "spatial_merge_size": 2,
    "add_pre_mm_projector_layer_norm": True,
    "image_token_id": IMAGE,
    "image_break_token_id": BREAK,
    "image_end_token_id": END,
}
TEXTS = {"mistral4": "moe", "mistral": "mistral"}  # cases of oracle.py
SPELLINGS = ("published", "transformers 5", "native")
_PUBLISHED = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
_NATIVE_VISION = {
    "model.vision_tower.patch_conv": "vision_encoder.patch_conv",
    "model.vision_tower.ln_pre": "vision_encoder.ln_pre",
    "model.multi_modal_projector.norm": "pre_mm_projector_norm",
    "model.multi_modal_projector.patch_merger.merging_layer": "patch_merger.merging_layer",
    "model.multi_modal_projector.linear_1": "vision_language_adapter.w_in",
    "model.multi_modal_projector.linear_2": "vision_language_adapter.w_out",
    "model.language_model.embed_tokens": "tok_embeddings",
    "model.language_model.norm": "norm",
    "lm_head": "output",
}
_NATIVE_TOWER = {
    "attention_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
    "attention.q_proj": "attention.wq",
    "attention.k_proj": "attention.wk",
    "attention.v_proj": "attention.wv",
    "attention.o_proj": "attention.wo",
    "feed_forward.gate_proj": "feed_forward.w1",
    "feed_forward.down_proj": "feed_forward.w2",
    "feed_forward.up_proj": "feed_forward.w3",
}


@cache
def make_oracle(text: str) -> transformers.Mistral3ForConditionalGeneration:
    """The transformers model around the text model of a case of oracle.py, always the same one, in float32."""
    family, settings = ORACLES[TEXTS[text]]
    torch.manual_seed(sorted(TEXTS).index(text))
    inner = getattr(transformers, f"{family}Config")(**copy.deepcopy(settings))
    config = transformers.Mistral3Config(
        text_config=inner,
        vision_config=transformers.PixtralVisionConfig(**copy.deepcopy(VISION)),
        tie_word_embeddings=False,
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    config._attn_implementation = "eager"
    model = transformers.Mistral3ForConditionalGeneration(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_pre" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif "patch_conv" in name or "multi_modal" in name:
            torch.nn.init.normal_(parameter, std=0.5 / parameter[0].numel() ** 0.5 * 2)
    return model.requires_grad_(False)


def image(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Pixels of an image of so many merged tokens, normalised: fp32 [rows * 28, columns * 28, 3]."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows * UNIT, columns * UNIT, 3, generator=random)


def image_tokens(rows: int, columns: int) -> list[int]:
    """Ids that stand for an image in a prompt."""
    ids = ([IMAGE] * columns + [BREAK]) * rows
    return [*ids[:-1], END]


def _batch(images: list[Tensor]) -> dict[str, Tensor]:
    """Images side by side as transformers takes them: padded to the largest."""
    height, width = (max(one.shape[axis] for one in images) for axis in (0, 1))
    padded = torch.zeros(len(images), 3, height, width)
    for number, one in enumerate(images):
        padded[number, :, : one.shape[0], : one.shape[1]] = one.permute(2, 0, 1)
    return {"pixel_values": padded, "image_sizes": torch.tensor([one.shape[:2] for one in images])}


@torch.inference_mode()
def oracle_features(text: str, images: list[Tensor]) -> list[Tensor]:
    """Embeddings of each image's merged tokens, fp32 [H * W, hidden], the images together in one call."""
    found = make_oracle(text).model.get_image_features(**_batch(images))
    return [one.float() for one in found.pooler_output]


@torch.inference_mode()
def oracle_logits(text: str, tokens: list[int], images: list[Tensor]) -> Tensor:
    """fp32 [len(tokens), vocab], in one forward pass."""
    found = make_oracle(text)(input_ids=torch.tensor([tokens]), **_batch(images))
    return found.logits[0].float()


def write_folder(folder: Path, text: str, spelling: str = "published", dtype: torch.dtype = torch.float32) -> Path:
    """The model as a checkpoint in one of SPELLINGS; plain weights."""
    folder.mkdir(parents=True, exist_ok=True)
    model = make_oracle(text)
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    if spelling == "native":
        weights = {key: one for name, tensor in weights.items() for key, one in _native(name, tensor, text)}
        (folder / "params.json").write_text(json.dumps(_params(text)))
        save_file(weights, folder / "consolidated.safetensors")
        return folder
    if spelling == "published":
        weights = {_published(name): tensor for name, tensor in weights.items()}
    model.config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _published(name: str) -> str:
    return next((old + name.removeprefix(new) for new, old in _PUBLISHED if name.startswith(new)), name)


def _native(name: str, tensor: Tensor, text: str) -> list[tuple[str, Tensor]]:
    """A parameter under its native name or names: each expert's matrices apart, rotary pairs side by side."""
    stem = name.removesuffix(".weight")
    if stem in _NATIVE_VISION:
        return [(f"{_NATIVE_VISION[stem]}.weight", tensor)]
    if stem.startswith("model.vision_tower."):
        layer, inner = stem.removeprefix("model.vision_tower.transformer.layers.").split(".", 1)
        if inner in ("attention.q_proj", "attention.k_proj"):
            tensor = pairs_of_halves(tensor, VISION["num_attention_heads"])
        return [(f"vision_encoder.transformer.layers.{layer}.{_NATIVE_TOWER[inner]}.weight", tensor)]
    layer, inner = stem.removeprefix("model.language_model.layers.").split(".", 1)
    if inner.startswith("mlp.experts."):
        parts = ("w1", "w3") if inner.endswith("gate_up_proj") else ("w2",)
        return [
            (f"layers.{layer}.experts.{expert}.{part}.weight", matrix.contiguous())
            for expert, both in enumerate(tensor)
            for part, matrix in zip(parts, both.chunk(len(parts)), strict=True)
        ]
    if text == "mistral" and inner in ("self_attn.q_proj", "self_attn.k_proj"):
        tensor = pairs_of_halves(tensor, 4 if inner == "self_attn.q_proj" else 2)
    return [(f"layers.{layer}.{NATIVE[inner]}.weight", tensor)]


def pairs_of_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows in the order of rotary pairs (i, i + d/2) -> (2i, 2i+1), head by head."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _params(text: str) -> dict[str, Any]:
    config: Any = make_oracle(text).config.text_config
    rope = config.rope_parameters
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "rope_theta": rope["rope_theta"],
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "tied_embeddings": False,
        "max_position_embeddings": config.max_position_embeddings,
        "vision_encoder": dict(ENCODER),
    }
    if text == "mistral":
        return params
    original = {"original_max_position_embeddings": rope["original_max_position_embeddings"]}
    params |= {name: MOE[name] for name in MOE if name.startswith(("q_lora", "kv_lora", "qk_", "v_head"))}
    params["head_dim"] = config.qk_nope_head_dim + config.qk_rope_head_dim
    params["llama_4_scaling"] = {**original, "beta": rope["llama_4_scaling_beta"]}
    params["yarn"] = {**original, "factor": rope["factor"], "apply_scale": False, "beta": 32, "alpha": 1}
    params["moe"] = {
        "route_every_n": 1,
        "first_k_dense_replace": 0,
        "num_experts": MOE["n_routed_experts"],
        "num_experts_per_tok": MOE["num_experts_per_tok"],
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
        "routed_scale": 1.0,
        "expert_hidden_dim": MOE["moe_intermediate_size"],
        "num_shared_experts": 1,
    }
    return params
