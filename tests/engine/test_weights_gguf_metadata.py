"""GGUF metadata that bear on the arithmetic or on the tokens are kept, or refused by their key."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from loading import TOKENS, logits
from tiny_folders import changed

from cierzo.engine.errors import CheckpointError
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.text.tokenizer import _byte_alphabet
from cierzo.engine.weights.gguf import convert_gguf

# key -> (type as gguf's writer calls it, value)
Metadata = dict[str, Any]
BYTES = sorted(_byte_alphabet(), key=lambda character: _byte_alphabet()[character])
WORDS = ["<s>", "</s>", "<stop>", *BYTES, "th"]
LLAMA: Metadata = {
    "llama.block_count": ("uint32", 2),
    "llama.context_length": ("uint32", 256),
    "llama.embedding_length": ("uint32", 64),
    "llama.feed_forward_length": ("uint32", 96),
    "llama.attention.head_count": ("uint32", 4),
    "llama.attention.head_count_kv": ("uint32", 2),
    "llama.attention.layer_norm_rms_epsilon": ("float32", 2.0**-17),
    "llama.rope.freq_base": ("float32", 500.0),
}
TOKENIZER: Metadata = {
    "tokenizer.ggml.model": ("string", "gpt2"),
    "tokenizer.ggml.pre": ("string", "smollm"),
    "tokenizer.ggml.tokens": ("array", WORDS),
    "tokenizer.ggml.token_type": ("array", [3, 3, 3] + [1] * (len(WORDS) - 3)),
    "tokenizer.ggml.merges": ("array", ["t h"]),
    "tokenizer.ggml.bos_token_id": ("uint32", 0),
    "tokenizer.ggml.eos_token_id": ("uint32", 1),
    "tokenizer.ggml.add_bos_token": ("bool", True),
}
HEAD_32: Metadata = {f"llama.{key}": ("uint32", 32) for key in ("attention.key_length", "attention.value_length")}
YARN: Metadata = {
    "llama.rope.scaling.type": ("string", "yarn"),
    "llama.rope.scaling.factor": ("float32", 4.0),
    "llama.rope.scaling.original_context_length": ("uint32", 16),
}
MAGNITUDE = 1 + 0.1 * math.log(4.0)


def make_model(**changes: Any) -> Any:
    """transformers' model of LLAMA, with `changes` to its config."""
    values = {
        "vocab_size": len(WORDS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 2.0**-17,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "initializer_range": 0.15,
        "pad_token_id": None,
    }
    torch.manual_seed(5)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**values, **changes})).eval()


def write(path: Path, changes: Metadata, model: Any = None, extra: dict[str, np.ndarray] | None = None) -> Path:
    """A GGUF file as llama.cpp's converter writes it: q's and k's rows with their pairs side by side. extra: more
    tensors than the model's."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, (kind, value) in changed(LLAMA | TOKENIZER, changes).items():
        if key == "general.architecture":
            writer.kv_data[0].pop(key)
        getattr(writer, f"add_{kind}")(key, value)
    model = model or make_model()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, parameter in model.state_dict().items():
        data = parameter.numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads is not None:
            data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(data))
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(folder: Path, changes: Metadata, model: Any = None) -> dict[str, Any]:
    """The config.json that the file becomes; the checkpoint is in `folder`/out."""
    convert_gguf(write(folder / "model.gguf", changes, model), folder / "out")
    read_model_config(folder / "out")
    return json.loads((folder / "out/config.json").read_text())


def rope(**yarn: float) -> dict[str, Any]:
    """The rope_parameters that YARN's metadata becomes, with changes."""
    plain = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
    return {**plain, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": pytest.approx(MAGNITUDE), **yarn}


PLAIN = {"rope_type": "default", "rope_theta": 500.0}
KEPT: dict[str, tuple[Metadata, dict[str, Any]]] = {
    "nothing more": ({}, {"rope_parameters": PLAIN, "head_dim": 16, "rms_norm_eps": 2.0**-17}),
    "yarn": (YARN, {"rope_parameters": rope()}),
    "yarn without its length": (
        YARN | {"llama.rope.scaling.original_context_length": ...},
        {"rope_parameters": rope(original_max_position_embeddings=256)},
    ),
    "yarn with all its fields": (
        YARN
        | {
            "llama.rope.scaling.attn_factor": ("float32", 0.5),
            "llama.rope.scaling.yarn_beta_fast": ("float32", 16.0),
            "llama.rope.scaling.yarn_beta_slow": ("float32", 2.0),
            "llama.rope.scaling.yarn_ext_factor": ("float32", 1.0),
            "llama.rope.scaling.yarn_attn_factor": ("float32", 1.0),
            "llama.rope.scaling.yarn_log_multiplier": ("float32", 0.0),
            "llama.rope.scaling.finetuned": ("bool", True),
        },
        {"rope_parameters": rope(beta_fast=16.0, beta_slow=2.0, attention_factor=pytest.approx(0.5 * MAGNITUDE))},
    ),
    "linear by 1": (
        {"llama.rope.scaling.type": ("string", "linear"), "llama.rope.scaling.factor": ("float32", 1.0)},
        {"rope_parameters": PLAIN},
    ),
    "a factor of 0 is none": ({"llama.rope.scaling.factor": ("float32", 0.0)}, {"rope_parameters": PLAIN}),
    "type none": (
        {"llama.rope.scaling.type": ("string", "none"), "llama.rope.scaling.factor": ("float32", 4.0)},
        {"rope_parameters": PLAIN},
    ),
    "no base": ({"llama.rope.freq_base": ...}, {"rope_parameters": {**PLAIN, "rope_theta": 10000.0}}),
    "alignment": ({"general.alignment": ("uint32", 64)}, {"rope_parameters": PLAIN}),
    "a window that never cuts": ({"llama.attention.sliding_window": ("uint32", 256)}, {"rope_parameters": PLAIN}),
    "features that are off": (
        {
            "llama.expert_count": ("uint32", 0),
            "llama.attention.causal": ("bool", True),
            "llama.attention.clamp_kqv": ("float32", 0.0),
            "llama.vocab_size": ("uint32", len(WORDS)),
            "llama.rope.dimension_count": ("uint32", 16),
            "llama.tensor_data_layout": ("string", "Meta AI original pth"),
        },
        {"rope_parameters": PLAIN},
    ),
    "ends of turn and message": (
        {"tokenizer.ggml.eot_token_id": ("uint32", 2), "tokenizer.ggml.eom_token_id": ("uint32", 1)},
        {"eos_token_id": [1, 2]},
    ),
    "an end of turn alone": (
        {"tokenizer.ggml.eos_token_id": ..., "tokenizer.ggml.eot_token_id": ("uint32", 0)},
        {"eos_token_id": 0},
    ),
    "no end": ({"tokenizer.ggml.eos_token_id": ...}, {"eos_token_id": None}),
}


@pytest.mark.parametrize("case", KEPT)
def test_is_kept(tmp_path: Path, case: str) -> None:
    changes, expected = KEPT[case]
    config = converted(tmp_path, changes)
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        (HEAD_32 | {"llama.rope.dimension_count": ("uint32", 32)}, {"head_dim": 32}),
        (
            YARN
            | {
                "llama.rope.scaling.attn_factor": ("float32", 0.5),
                "llama.rope.scaling.yarn_beta_fast": ("float32", 16.0),
            },
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 500.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                    "beta_fast": 16.0,
                    "attention_factor": 0.5 * MAGNITUDE,
                }
            },
        ),
    ],
)
def test_runs_as_transformers_runs_the_config(tmp_path: Path, changes: Metadata, settings: dict[str, Any]) -> None:
    model, plain = make_model(**settings), make_model()
    converted(tmp_path, changes, model)
    with torch.inference_mode():
        expected = model(TOKENS[None]).logits[0]
        assert (plain(TOKENS[None]).logits[0] - expected).abs().max() > 0.01
    torch.testing.assert_close(logits(tmp_path / "out", dtype="float32"), expected, rtol=1e-4, atol=1e-4)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(TOKENS[None]).logits[0], expected, rtol=1e-5, atol=1e-5)


REFUSED: list[tuple[Metadata, str]] = [
    ({"llama.rope.scaling.type": ("string", "linear"), "llama.rope.scaling.factor": ("float32", 4.0)}, "factor"),
    ({"llama.rope.scaling.factor": ("float32", 4.0)}, "llama.rope.scaling.factor"),  # linear where it is not said
    ({"llama.rope.scale_linear": ("float32", 2.0)}, "llama.rope.scaling.factor"),
    ({"llama.rope.scaling.type": ("string", "longrope")}, "llama.rope.scaling.type"),
    ({"llama.rope.scaling.attn_factor": ("float32", 1.25)}, "llama.rope.scaling.attn_factor"),
    (YARN | {"llama.rope.scaling.factor": ("float32", 0.5)}, "llama.rope.scaling.factor"),
    (YARN | {"llama.rope.scaling.yarn_ext_factor": ("float32", 0.5)}, "llama.rope.scaling.yarn_ext_factor"),
    (YARN | {"llama.rope.scaling.yarn_attn_factor": ("float32", 2.0)}, "llama.rope.scaling.yarn_attn_factor"),
    (YARN | {"llama.rope.scaling.yarn_log_multiplier": ("float32", 0.1)}, "llama.rope.scaling.yarn_log_multiplier"),
    ({"llama.rope.dimension_count": ("uint32", 8)}, "llama.rope.dimension_count"),
    ({"llama.attention.key_length": ("uint32", 32)}, "llama.attention.value_length"),
    (HEAD_32 | {"llama.attention.value_length": ("uint32", 16)}, "llama.attention.value_length"),
    ({f"llama.attention.{key}_length": ("uint32", 15) for key in ("key", "value")}, "llama.attention.key_length"),
    ({"llama.attention.sliding_window": ("uint32", 64)}, "llama.attention.sliding_window"),
    ({"llama.attention.causal": ("bool", False)}, "llama.attention.causal"),
    ({"llama.attention.clamp_kqv": ("float32", 8.0)}, "llama.attention.clamp_kqv"),
    ({"llama.attention.scale": ("float32", 0.5)}, "llama.attention.scale"),
    ({"llama.attention.head_count_kv": ("array", [2, 1])}, "llama.attention.head_count_kv"),
    ({"llama.expert_count": ("uint32", 8)}, "llama.expert_count"),
    ({"llama.logit_scale": ("float32", 0.5)}, "llama.logit_scale"),
    ({"llama.some.new_feature": ("uint32", 1)}, "llama.some.new_feature"),
    ({"llama.block_count": ...}, "llama.block_count"),
    ({"llama.vocab_size": ("uint32", 999)}, "llama.vocab_size"),
    ({"general.architecture": ("string", "qwen3")}, "general.architecture"),
    ({"general.type": ("string", "adapter")}, "general.type"),
    ({"split.count": ("uint16", 2)}, "split.count"),
    ({"tokenizer.ggml.add_eos_token": ("bool", True)}, "tokenizer.ggml.add_eos_token"),
    ({"tokenizer.ggml.add_space_prefix": ("bool", True)}, "tokenizer.ggml.add_space_prefix"),
    ({"tokenizer.ggml.remove_extra_whitespaces": ("bool", True)}, "tokenizer.ggml.remove_extra_whitespaces"),
    ({"tokenizer.ggml.precompiled_charsmap": ("array", [1, 2])}, "tokenizer.ggml.precompiled_charsmap"),
    ({"tokenizer.ggml.pre": ("string", "llama-bpe")}, "tokenizer.ggml.pre"),
    ({"tokenizer.ggml.merges": ...}, "tokenizer.ggml.merges"),
    ({"tokenizer.ggml.token_type": ("array", [1, 2])}, "tokenizer.ggml.token_type"),
    ({"tokenizer.ggml.eos_token_id": ("uint32", len(WORDS))}, "tokenizer.ggml.eos_token_id"),
]


@pytest.mark.parametrize(("changes", "key"), REFUSED)
def test_is_refused_by_its_key(tmp_path: Path, changes: Metadata, key: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        converted(tmp_path, changes)
    assert (caught.value.field or "").endswith(key)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_inp.weight"])
def test_a_tensor_without_a_place_is_named(tmp_path: Path, name: str) -> None:
    """The first holds Llama 3's scaling of the frequencies."""
    path = write(tmp_path / "model.gguf", {}, extra={name: np.full(8, 2.0, np.float32)})
    with pytest.raises(CheckpointError, match=f"GGUF tensor {name} has no place"):
        convert_gguf(path, tmp_path / "out")


def test_rows_that_are_not_of_the_heads_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", HEAD_32)
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.attn_q\.weight has 64 rows, expected 4 x 32"):
        convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_cut_anywhere_is_named(tmp_path: Path) -> None:
    """The library gguf raises whatever comes of it."""
    whole = write(tmp_path / "whole.gguf", {}).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 7, 20, 24, 40, 200, 3000, 12000, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf cannot be read as GGUF"):
            convert_gguf(cut, tmp_path / "out")
    for target in ("folder.gguf", "missing.gguf"):
        (tmp_path / "folder.gguf").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match=f"{target} cannot be read as GGUF"):
            convert_gguf(tmp_path / target, tmp_path / "out")
