"""params.json says the same as the config.json of the same model, and what it may not say is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from published import SMALL3, SMALL4, Published

from cierzo.engine.config import EngineOptions, resolve
from cierzo.engine.errors import CheckpointError, ConfigError
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.model.rope_config import YarnConfig
from cierzo.engine.weights.info import describe
from cierzo.engine.weights.published import native_params
from cierzo.engine.weights.shapes import shape_of

PUBLISHED: dict[str, Any] = {  # of Mistral Small 4, without what concerns vision
    "dim": 4096,
    "n_layers": 36,
    "head_dim": 128,
    "hidden_dim": 12288,
    "n_heads": 32,
    "n_kv_heads": 32,
    "rope_theta": 10000.0,
    "norm_eps": 1e-06,
    "vocab_size": 131072,
    "tied_embeddings": False,
    "max_position_embeddings": 1048576,
    "llama_4_scaling": {"original_max_position_embeddings": 8192, "beta": 0.1},
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "kv_lora_rank": 256,
    "v_head_dim": 128,
    "yarn": {
        "original_max_position_embeddings": 8192,
        "factor": 128,
        "apply_scale": False,
        "beta": 32,
        "alpha": 1,
    },
    "moe": {
        "expert_parallel": 1,
        "expert_model_parallel": 1,
        "route_every_n": 1,
        "first_k_dense_replace": 0,
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
        "routed_scale": 1.0,
        "expert_hidden_dim": 2048,
        "num_shared_experts": 1,
    },
}
DENSE = {**Published(SMALL3, "native").config, "head_dim": 32}


def read(folder: Path, values: dict[str, Any]) -> ModelConfig:
    (folder / "params.json").write_text(json.dumps(values))
    return read_model_config(folder)


def changed(values: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy with one field, "moe.num_experts", replaced; `...` takes it out."""
    outer, _, inner = path.partition(".")
    if inner:
        return {**values, outer: changed(values[outer], inner, value)}
    return {name: one for name, one in {**values, outer: value}.items() if one is not ...}


def as_config(folder: Path, values: dict[str, object]) -> ModelConfig:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return read_model_config(folder)


def test_small4_as_published_is_the_config_json_of_its_true_size(tmp_path: Path) -> None:
    expected = as_config(tmp_path / "hf", shape_of("small4", "full").config("bfloat16"))
    assert read(tmp_path, PUBLISHED) == expected
    assert expected.softmax_scale == pytest.approx(0.0883883476, rel=1e-9)


@pytest.mark.parametrize(("like", "scale"), [("small4", "mini"), ("small3", "mini"), ("small3", "full")])
def test_the_same_model_in_both_spellings(tmp_path: Path, like: str, scale: str) -> None:
    shape = shape_of(like, scale)
    native = Published(SMALL4 if like == "small4" else SMALL3, "native")
    native.shape, native.base = shape, shape.config("bfloat16")
    expected = as_config(tmp_path / "hf", shape.config("bfloat16"))
    assert read(tmp_path, native._params()) == expected
    if like == "small4":
        assert read(tmp_path, native_params(shape.config("bfloat16"))) == expected


def test_yarn_has_its_magnitude_unless_apply_scale_is_false(tmp_path: Path) -> None:
    """True, or unsaid, is transformers' mscale_all_dim 0."""
    magnitudes = []
    for value in (False, True, ...):
        scaling = read(tmp_path, changed(PUBLISHED, "yarn.apply_scale", value)).rope.scaling
        assert isinstance(scaling, YarnConfig)
        magnitudes.append(scaling.magnitude)
    assert magnitudes == pytest.approx([1.0, 0.1 * math.log(128) + 1, 0.1 * math.log(128) + 1])


def test_the_lesser_spellings(tmp_path: Path) -> None:
    values = changed(changed(DENSE, "max_position_embeddings", ...), "max_seq_len", 4096)
    config = read(tmp_path, changed(values, "tied_embeddings", ...))
    assert config.max_position_embeddings == 4096
    assert not config.tie_word_embeddings
    assert config.rope.scaling is None
    assert not config.rope.interleaved
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    assert read(tmp_path, DENSE).eos_token_ids == (2, 4)
    assert read(tmp_path, changed(PUBLISHED, "llama_4_scaling", None)).query_scaling is None
    assert msgspec.json.decode(msgspec.json.encode(config), type=ModelConfig) == config


SMALL31: dict[
    str, Any
] = {  # of Mistral Small 3.1 (2503), without what concerns vision; 7B v0.3 has the same fields
    "dim": 5120,
    "n_layers": 40,
    "head_dim": 128,
    "hidden_dim": 32768,
    "n_heads": 32,
    "n_kv_heads": 8,
    "rope_theta": 1000000000.0,
    "norm_eps": 1e-05,
    "vocab_size": 131072,
}


def test_no_length_at_all(tmp_path: Path) -> None:
    """The length is the user's to say: nothing else depends on it."""
    config = read(tmp_path, SMALL31)
    assert config.max_position_embeddings is None
    known = read(tmp_path, SMALL31 | {"max_position_embeddings": 131072})
    assert msgspec.structs.replace(known, max_position_embeddings=None) == config
    assert read(tmp_path, SMALL31 | {"max_seq_len": 131072}) == known
    read(tmp_path, SMALL31)
    options = EngineOptions(model=str(tmp_path), kv_cache_gib=0.25, max_model_len=512)
    assert resolve(options).scheduler.max_model_len == 512
    with pytest.raises(
        ConfigError, match=r"neither max_position_embeddings nor max_seq_len: give max_model_len"
    ) as e:
        resolve(msgspec.structs.replace(options, max_model_len=None))
    assert e.value.field == "max_model_len"
    assert e.value.limit is not None


def test_yarn_tells_the_length(tmp_path: Path) -> None:
    assert read(tmp_path, changed(PUBLISHED, "max_position_embeddings", ...)) == read(tmp_path, PUBLISHED)


def test_a_window_needs_a_length(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"params\.json: sliding_window is 4096, must be null, or at least the"
    ):
        read(tmp_path, SMALL31 | {"sliding_window": 4096})
    assert read(tmp_path, SMALL31 | {"sliding_window": 4096, "max_seq_len": 4096}).max_position_embeddings == 4096


def test_info_says_that_there_is_no_length(tmp_path: Path) -> None:
    model = Published(SMALL3, "native")
    model.config = changed(model.config, "max_position_embeddings", ...)
    assert "not said: max_model_len must be given" in str(describe(model.write(tmp_path)))


def test_fixed_ids_beyond_a_tiny_vocabulary_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = read(tmp_path, DENSE | {"vocab_size": 2})
    assert (config.bos_token_id, config.eos_token_ids) == (1, ())
    assert "params.json: eos_token_id holds 2, which a vocabulary of 2 lacks" in caplog.text


@pytest.mark.parametrize(
    "field", ["dim", "n_heads", "norm_eps", "rope_theta", "yarn.beta", "moe.num_experts", "moe"]
)
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    with pytest.raises(CheckpointError, match=rf"params\.json: {field} is missing") as caught:
        read(tmp_path, changed(PUBLISHED, field, ...))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("values", "field", "value"),
    [
        (PUBLISHED, "n_kv_heads", 8),
        (PUBLISHED, "head_dim", 64),
        (PUBLISHED, "qk_rope_head_dim", 63),
        (PUBLISHED, "activation", "gelu"),
        (PUBLISHED, "model_type", "mamba"),
        (PUBLISHED, "use_biases", True),
        (PUBLISHED, "sliding_window", 4096),
        (PUBLISHED, "sliding_window", [4096]),
        (PUBLISHED, "tied_embeddings", 1),
        (PUBLISHED, "vocab_size", "131072"),
        (PUBLISHED, "norm_eps", True),
        (PUBLISHED, "moe.route_every_n", 2),
        (PUBLISHED, "moe.num_expert_groups", 3),
        (PUBLISHED, "moe.num_expert_groups_per_tok", 2),
        (PUBLISHED, "moe.num_experts_per_tok", 129),
        (PUBLISHED, "moe.num_shared_experts", 0),
        (PUBLISHED, "yarn.apply_scale", "no"),
        (PUBLISHED, "llama_4_scaling.beta", -0.1),
        (DENSE, "n_kv_heads", 3),
        (DENSE, "head_dim", 31),
        (DENSE, "moe", {"num_experts": 8}),
    ],
)
def test_unsupported_values_are_named(tmp_path: Path, values: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"params\.json") as caught:
        read(tmp_path, changed(values, field, value))
    assert caught.value.field == field
    assert caught.value.limit is not None
    assert caught.value.value == str(value)


def test_no_config_at_all_is_told_as_ever(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no checkpoint: it has neither config\.json nor params\.json: it is empty"
    ):
        read_model_config(tmp_path)
