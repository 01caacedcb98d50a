"""Spellings of one dense config.json: each runs as transformers runs it, or is refused by a field's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loading import logits
from tiny_folders import DENSE, changed, transformers_logits, write_config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # mistral's is the same

from cierzo.engine.errors import CheckpointError
from cierzo.engine.model.config import GqaConfig
from cierzo.engine.model.positions import Positions
from cierzo.engine.model.read_config import read_model_config

BOTH, MISTRAL, LLAMA = ("mistral", "llama"), ("mistral",), ("llama",)
OTHER = {"rope_type": "default", "rope_theta": 500.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MEANT = {**LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 500.0}
SPELLINGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "as saved": (BOTH, {}),
    "theta outside": (BOTH, {"rope_parameters": ..., "rope_theta": 500.0, "rope_scaling": None}),
    "theta missing": (BOTH, {"rope_parameters": ..., "rope_scaling": None}),
    "theta an integer": (BOTH, {"rope_parameters": {"rope_type": "default", "rope_theta": 500}}),
    "theta in both places": (BOTH, {"rope_parameters": OTHER, "rope_theta": 77.0}),
    "parameters without theta": (BOTH, {"rope_parameters": {"rope_type": "default"}, "rope_theta": 77.0}),
    "parameters empty": (BOTH, {"rope_parameters": {}, "rope_theta": 77.0}),
    "scaling of type default": (BOTH, {"rope_parameters": ..., "rope_scaling": {"type": "default"}}),
    "scaling empty": (BOTH, {"rope_parameters": OTHER, "rope_scaling": {}}),
    "scaling replaces parameters": (BOTH, {"rope_parameters": OTHER, "rope_scaling": YARN}),
    "scaling, parameters and theta": (BOTH, {"rope_parameters": OTHER, "rope_scaling": YARN, "rope_theta": 77.0}),
    "linear by 1": (BOTH, {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 1.0}}),
    "yarn": (BOTH, {"rope_parameters": {**YARN, "rope_theta": 500.0}}),
    "yarn, both names of its type": (BOTH, {"rope_parameters": {**YARN, "type": "default", "rope_type": "yarn"}}),
    "yarn, no original length": (
        BOTH,
        {"rope_parameters": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 16},
    ),
    "yarn, original length outside": (BOTH, {"rope_parameters": YARN, "original_max_position_embeddings": 256}),
    "yarn, factor null": (BOTH, {"rope_parameters": {**YARN, "factor": None}, "max_position_embeddings": 64}),
    "yarn, factor null and the model shorter": (
        BOTH,
        {
            "rope_parameters": {**YARN, "factor": None, "original_max_position_embeddings": 64},
            "max_position_embeddings": 32,
        },
    ),
    "yarn, betas null and 0": (BOTH, {"rope_parameters": {**YARN, "beta_fast": None, "beta_slow": 0}}),
    "yarn, betas given": (BOTH, {"rope_parameters": {**YARN, "beta_fast": 8, "beta_slow": 0.5}}),
    "yarn, mscale": (BOTH, {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "yarn, attention_factor": (BOTH, {"rope_parameters": {**YARN, "attention_factor": 0.7}}),
    "linear": (BOTH, {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.5}}),
    "llama3": (BOTH, {"rope_parameters": MEANT}),
    "llama3, old places": (BOTH, {"rope_parameters": ..., "rope_scaling": LLAMA3, "rope_theta": 500.0}),
    "llama3, no original length": (BOTH, {"rope_parameters": LLAMA3, "max_position_embeddings": 128}),
    "llama3, original length outside": (BOTH, {"rope_parameters": MEANT, "original_max_position_embeddings": 32}),
    "llama3, other ends": (BOTH, {"rope_parameters": {**MEANT, "low_freq_factor": 0.25, "high_freq_factor": 9}}),
    "epsilon missing": (BOTH, {"rms_norm_eps": ...}),
    "activation missing": (BOTH, {"hidden_act": ...}),
    "activation's other name": (BOTH, {"hidden_act": "swish"}),
    "head_dim null": (BOTH, {"head_dim": None}),
    "head_dim missing": (BOTH, {"head_dim": ...}),
    "key-value heads missing": (LLAMA, {"num_key_value_heads": ...}),
    "key-value heads missing: 8": (MISTRAL, {"num_key_value_heads": ..., "num_attention_heads": 8}),
    "key-value heads null": (LLAMA, {"num_key_value_heads": None}),
    "length missing": (BOTH, {"max_position_embeddings": ...}),
    "tie flag missing": (BOTH, {"tie_word_embeddings": ...}),
    "biases false": (LLAMA, {"attention_bias": False, "mlp_bias": False}),
    "biases null": (MISTRAL, {"attention_bias": None}),  # transformers' llama refuses it
    "old name of dtype": (BOTH, {"torch_dtype": "float32"}),
    "layers listed": (BOTH, {"layer_types": ["full_attention"] * 2}),
    "layers listed by their older name": (BOTH, {"layer_types": ["attention"] * 2}),
    "layers null": (BOTH, {"layer_types": None}),
    "layers listed beside a window": (BOTH, {"layer_types": ["full_attention"] * 2, "sliding_window": 4}),
    "window missing": (BOTH, {"sliding_window": ...}),
    "window that never cuts": (BOTH, {"sliding_window": 512}),
    "window not used": (LLAMA, {"sliding_window": 4, "use_sliding_window": False}),
    "ids missing": (BOTH, {"bos_token_id": ..., "eos_token_id": ...}),
    "ids null": (BOTH, {"bos_token_id": None, "eos_token_id": None}),
    "ids listed": (BOTH, {"eos_token_id": [2, 5]}),
}


@pytest.mark.parametrize(
    ("architecture", "spelling"), [(kind, name) for name, (kinds, _) in SPELLINGS.items() for kind in kinds]
)
def test_is_read_as_transformers_reads_it(tmp_path: Path, architecture: str, spelling: str) -> None:
    folder = write_config(tmp_path, changed({"model_type": architecture, **DENSE}, SPELLINGS[spelling][1]))
    ours, theirs = read_model_config(folder), transformers.AutoConfig.from_pretrained(folder)
    rotary, tables = LlamaRotaryEmbedding(theirs), Positions(ours, torch.device("cpu"))
    torch.testing.assert_close(tables.inv_freq, rotary.inv_freq, rtol=1e-6, atol=0.0)
    assert tables.magnitude == pytest.approx(rotary.attention_scaling, rel=1e-12)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.attention == GqaConfig(num_kv_heads=theirs.num_key_value_heads, head_dim=head_dim)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert (ours.rms_norm_eps, ours.bos_token_id) == (theirs.rms_norm_eps, theirs.bos_token_id)
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))


@pytest.mark.parametrize(
    ("architecture", "spelling"),
    [
        ("mistral", "scaling, parameters and theta"),
        ("llama", "yarn, mscale"),
        ("llama", "activation's other name"),
        ("llama", "llama3"),
        ("mistral", "linear"),
        ("mistral", "window missing"),
        ("llama", "window not used"),
        ("mistral", "layers listed beside a window"),
        ("llama", "layers listed beside a window"),
    ],
)
def test_runs_as_transformers_runs_it(tmp_path: Path, architecture: str, spelling: str) -> None:
    folder = write_config(tmp_path, changed({"model_type": architecture, **DENSE}, SPELLINGS[spelling][1]))
    expected = transformers_logits(folder)
    torch.testing.assert_close(logits(folder, dtype="float32"), expected, rtol=1e-4, atol=1e-4)


REFUSED: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (BOTH, {"sliding_window": 511}, "sliding_window"),
    (MISTRAL, {"sliding_window": ..., "max_position_embeddings": 4097}, "sliding_window"),
    (MISTRAL, {"sliding_window": 64, "use_sliding_window": False}, "sliding_window"),
    (LLAMA, {"sliding_window": 64, "use_sliding_window": True}, "sliding_window"),
    (BOTH, {"sliding_window": 0}, "sliding_window"),
    (BOTH, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    (BOTH, {"layer_types": ["full_attention"]}, "layer_types"),
    (BOTH, {"layer_types": "full_attention"}, "layer_types"),
    (BOTH, {"per_layer_config": {"0": {"hidden_size": 32}}}, "per_layer_config"),
    (BOTH, {"hidden_act": "gelu"}, "hidden_act"),
    (BOTH, {"attention_bias": True}, "attention_bias"),
    (BOTH, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (BOTH, {"rope_parameters": ..., "rope_theta": None}, "rope_theta"),
    (BOTH, {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.low_freq_factor"),
    (BOTH, {"rope_scaling": {**LLAMA3, "low_freq_factor": 0}}, "rope_scaling.low_freq_factor"),
    (BOTH, {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "rope_scaling.high_freq_factor"),
    (BOTH, {"rope_scaling": {**LLAMA3, "factor": 0.5}}, "rope_scaling.factor"),
    (BOTH, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
    (BOTH, {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor"),
    (BOTH, {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling.type"),
    (BOTH, {"rope_parameters": {"rope_type": "proportional"}}, "rope_parameters.rope_type"),
    (BOTH, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type"),
    (BOTH, {"rope_scaling": {"type": None, "factor": 2.0}}, "rope_scaling.type"),
    (BOTH, {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor"),
    (BOTH, {"rope_scaling": {**YARN, "truncate": False}}, "rope_scaling.truncate"),
    (BOTH, {"rope_scaling": {**YARN, "truncate": None}}, "rope_scaling.truncate"),  # counts as false there
    (BOTH, {"rope_parameters": {"full_attention": OTHER}}, "rope_parameters.full_attention"),
    (BOTH, {"transformers_weights": "other.safetensors"}, "transformers_weights"),
    (BOTH, {"tie_word_embeddings": None}, "tie_word_embeddings"),
]


@pytest.mark.parametrize(
    ("architecture", "changes", "field"),
    [(kind, changes, field) for kinds, changes, field in REFUSED for kind in kinds],
)
def test_refused_by_name(tmp_path: Path, architecture: str, changes: dict[str, Any], field: str) -> None:
    values = changed({"model_type": architecture, **DENSE}, changes)
    with pytest.raises(CheckpointError, match=field) as caught:
        read_model_config(write_config(tmp_path, values))
    assert caught.value.field == field
