"""config.json in all its spellings, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cierzo.engine.errors import CheckpointError
from cierzo.engine.model.config import GqaConfig, MlaConfig, ModelConfig, QueryScaling, read_model_config

YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 8192,
    "llama_4_scaling_beta": 0.1,
    "partial_rotary_factor": 0.5,
}
SMALL4: dict[str, Any] = {  # the published text_config
    "model_type": "mistral4",
    "vocab_size": 131072,
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "q_lora_rank": 1024,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 128,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "max_position_embeddings": 1048576,
    "rope_interleave": True,
    "rope_parameters": YARN,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL3: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 131072,
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 32768,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "max_position_embeddings": 131072,
    "rope_theta": 1e9,
    "bos_token_id": 1,
    "eos_token_id": [2, 11],
}


def read(folder: Path, values: dict[str, Any], **changes: Any) -> ModelConfig:
    """`values` with `changes`; a change to `...` takes the field out."""
    merged = {name: value for name, value in (values | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(merged))
    return read_model_config(folder)


def test_small4(tmp_path: Path) -> None:
    config = read(tmp_path, SMALL4)
    assert config.attention == MlaConfig(
        q_lora_rank=1024, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=128
    )
    assert config.moe is not None
    assert (config.moe.num_experts, config.moe.experts_per_token, config.moe.expert_width) == (128, 4, 2048)
    assert config.query_scaling == QueryScaling(beta=0.1, original_positions=8192)
    assert config.cache_layout(32, "bfloat16").bytes_per_token == 23040
    assert config.cache_layout(32, "bfloat16", world=4).bytes_per_token == 23040
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=ModelConfig) == config


def test_small3(tmp_path: Path) -> None:
    config = read(tmp_path, SMALL3)
    assert config.attention == GqaConfig(num_kv_heads=8, head_dim=128)
    assert config.moe is None
    assert config.rope.theta == 1e9
    assert config.rope.yarn is None
    assert config.eos_token_ids == (2, 11)
    assert config.cache_layout(32, "bfloat16").bytes_per_token == 163840
    assert config.cache_layout(32, "bfloat16", world=2).bytes_per_token == 81920
    assert config.softmax_scale == 128**-0.5


def test_softmax_scale_has_no_yarn_term_in_either_form(tmp_path: Path) -> None:
    """The published form, and the one that makes transformers agree."""
    published = read(tmp_path, SMALL4)
    oracle = read(tmp_path, SMALL4, rope_parameters=YARN | {"attention_factor": 1.0, "mscale_all_dim": 0.0})
    for config in (published, oracle):
        assert config.softmax_scale == pytest.approx(0.0883883476, abs=1e-10)
        assert config.rope.yarn is not None
        assert config.rope.yarn.magnitude == 1.0
    other = msgspec.structs.replace(published, softmax_scale_override=0.1949694947)
    assert other.softmax_scale == 0.1949694947


def test_yarn_without_ratio_scales_cos_and_sin(tmp_path: Path) -> None:
    config = read(tmp_path, SMALL4, rope_parameters=YARN | {"mscale_all_dim": 0.0})
    assert config.rope.yarn is not None
    assert config.rope.yarn.magnitude == pytest.approx(1.4852030264)


def test_wrapped(tmp_path: Path) -> None:
    inner = {name: value for name, value in SMALL4.items() if name != "eos_token_id"}
    outer = {"model_type": "mistral3", "text_config": inner, "eos_token_id": 2, "vision_config": {}}
    assert read(tmp_path, outer) == read(tmp_path, SMALL4)
    assert read(tmp_path, outer, tie_word_embeddings=True).tie_word_embeddings


def test_old_rope_spelling(tmp_path: Path) -> None:
    old = {name: value for name, value in YARN.items() if name not in ("rope_theta", "rope_type")}
    changes = {"rope_parameters": ..., "rope_theta": 10000.0, "rope_scaling": old}
    assert read(tmp_path, SMALL4, **changes) == read(tmp_path, SMALL4)
    new = {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 1e9}}
    assert read(tmp_path, SMALL3, **new) == read(tmp_path, SMALL3)
    assert read(tmp_path, SMALL3, rope_scaling=None) == read(tmp_path, SMALL3)


def test_generation_config_adds_end_ids(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert read(tmp_path, SMALL4).eos_token_ids == (2, 7)


def test_llama_defaults(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        SMALL3,
        model_type="llama",
        num_key_value_heads=...,
        head_dim=...,
        sliding_window=...,
        eos_token_id=...,
    )
    assert config.attention == GqaConfig(num_kv_heads=32, head_dim=160)
    assert config.eos_token_ids == ()


REQUIRED4 = [
    name
    for name in SMALL4
    if name
    not in {
        "model_type",
        "num_key_value_heads",
        "head_dim",
        "attention_bias",
        "tie_word_embeddings",
        "sliding_window",
        "bos_token_id",
        "eos_token_id",
        "rope_parameters",
    }
]


@pytest.mark.parametrize("field", REQUIRED4)
def test_missing_fields_are_named(tmp_path: Path, field: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: {field} is missing"):
        read(tmp_path, SMALL4, **{field: ...})


@pytest.mark.parametrize(
    ("base", "field", "value"),
    [
        (SMALL4, "model_type", "deepseek_v3"),
        (SMALL4, "attention_bias", True),
        (SMALL4, "hidden_act", "gelu"),
        (SMALL4, "sliding_window", 4096),
        (SMALL4, "num_key_value_heads", 8),
        (SMALL4, "n_shared_experts", 0),
        (SMALL4, "n_group", 3),
        (SMALL4, "n_group", 128),
        (SMALL4, "topk_group", 2),
        (SMALL4, "num_experts_per_tok", 129),
        (SMALL4, "hidden_size", 4096.5),
        (SMALL4, "hidden_size", True),
        (SMALL4, "norm_topk_prob", 1),
        (SMALL4, "rms_norm_eps", None),
        (SMALL4, "qk_rope_head_dim", 63),
        (SMALL4, "quantization_config", ["fp8"]),
        (SMALL4, "eos_token_id", "</s>"),
        (SMALL3, "sliding_window", 4096),
        (SMALL3, "num_key_value_heads", 7),
        (SMALL3 | {"model_type": "llama"}, "mlp_bias", True),
        (SMALL3, "head_dim", 127),
    ],
)
def test_unsupported_values_are_named(tmp_path: Path, base: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=field) as caught:
        read(tmp_path, base, **{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_type", "llama3"),
        ("partial_rotary_factor", 1.0),
        ("truncate", False),
        ("factor", 0.5),
        ("rope_theta", "x"),
    ],
)
def test_unsupported_rope_is_named(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"rope_parameters\.{field} is {value!r}"):
        read(tmp_path, SMALL4, rope_parameters=YARN | {field: value})


@pytest.mark.parametrize(
    "field", ["llama_4_scaling_beta", "factor", "original_max_position_embeddings", "rope_theta"]
)
def test_missing_rope_fields_are_named(tmp_path: Path, field: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{field} is missing"):
        read(tmp_path, SMALL4, rope_parameters={k: v for k, v in YARN.items() if k != field})


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_model_config(tmp_path)
    for content, message in (
        (b"{", "cannot be read"),
        (b'{"a": "\xff"}', "cannot be read"),
        (b"[" * 10**5, "cannot be read"),
        (b"[]", "holds no JSON object"),
    ):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_model_config(tmp_path)
