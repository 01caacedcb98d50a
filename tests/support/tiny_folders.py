"""Tiny checkpoint folders whose config.json is written by hand, and what transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from loading import TOKENS
from safetensors.torch import save_file
from torch import Tensor

# Heads of hidden / heads values and a vocabulary for `loading.TOKENS`.
DENSE: dict[str, Any] = {
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes`; a change to `...` takes the field out."""
    return {name: value for name, value in (values | changes).items() if value is not ...}


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    """The folder, with this config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@torch.inference_mode()
def transformers_logits(folder: Path) -> Tensor:
    """transformers' logits of `loading.TOKENS` for the config.json of `folder`, with random weights, which are
    written beside it."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder)).float()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        size = 0.5 if "embed" in name else 0.15  # so wide that a frequency or a window shows in the logits
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * size + (parameter.dim() == 1))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return model.eval()(TOKENS[None]).logits[0]
