"""config.json: what is read, what a missing field means, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
import transformers
from tiny_folders import changed

from cierzo.engine.errors import CheckpointError
from cierzo.engine.model.config import GqaConfig, MlaConfig, ModelConfig, QueryScaling
from cierzo.engine.model.config_defaults import DEFAULTS, EOS_TOKEN_ID, ROPE_THETA, WRAPPED, WRAPPERS
from cierzo.engine.model.read_config import read_model_config
from cierzo.engine.model.rope_config import YarnConfig

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
    assert config.rope.scaling is None
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
        assert isinstance(config.rope.scaling, YarnConfig)
        assert config.rope.scaling.magnitude == 1.0
    other = msgspec.structs.replace(published, softmax_scale_override=0.1949694947)
    assert other.softmax_scale == 0.1949694947


def test_yarn_without_ratio_scales_cos_and_sin(tmp_path: Path) -> None:
    config = read(tmp_path, SMALL4, rope_parameters=YARN | {"mscale_all_dim": 0.0})
    assert isinstance(config.rope.scaling, YarnConfig)
    assert config.rope.scaling.magnitude == pytest.approx(1.4852030264)


def test_wrapped(tmp_path: Path) -> None:
    inner = {name: value for name, value in SMALL4.items() if name != "eos_token_id"}
    outer = {
        "model_type": "mistral3",
        "text_config": inner,
        "eos_token_id": [2, 7],
        "tie_word_embeddings": False,
        "vision_config": {},
    }
    assert read(tmp_path, outer) == read(tmp_path, SMALL4, eos_token_id=[2, 7])


def test_the_inner_model_is_mistral_unless_it_is_said(tmp_path: Path) -> None:
    inner = {name: value for name, value in SMALL3.items() if name != "model_type"}
    outer = {"model_type": "mistral3", "text_config": inner, "tie_word_embeddings": False}
    assert read(tmp_path, outer) == read(tmp_path, SMALL3)


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    theirs = transformers.AutoConfig.for_model(architecture)
    for name, value in DEFAULTS[architecture].items():
        if name == "num_key_value_heads" and value is None:
            assert theirs.num_key_value_heads == theirs.num_attention_heads
        elif name == "rope_parameters":
            assert value.items() <= theirs.rope_parameters.items()
        else:
            assert getattr(theirs, name) == value, name
    assert (theirs.eos_token_id, theirs.default_theta) == (EOS_TOKEN_ID, ROPE_THETA)
    own = DEFAULTS[architecture].get("rope_parameters", {}).get("rope_theta", ROPE_THETA)
    assert theirs.rope_parameters["rope_theta"] == own


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_have_the_defaults_of_transformers(wrapper: str) -> None:
    theirs = transformers.AutoConfig.for_model(wrapper)
    assert theirs.tie_word_embeddings is WRAPPERS[wrapper]["tie_word_embeddings"]
    assert theirs.text_config.model_type == WRAPPED[wrapper]["model_type"]


@pytest.mark.parametrize("wrapper", ["llava", "llava_next"])
@pytest.mark.parametrize("outer", [..., False, True])
@pytest.mark.parametrize("inner", [..., False, True])
def test_the_tie_flags_of_llava(tmp_path: Path, wrapper: str, outer: object, inner: object) -> None:
    """Either flag ties llava, the outer one alone llava_next."""
    text = changed(SMALL3, {"tie_word_embeddings": inner})
    config = read(tmp_path, {"model_type": wrapper, "text_config": text}, tie_word_embeddings=outer)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.tie_word_embeddings is theirs.tie_word_embeddings


def test_the_wrapper_ties_by_default(tmp_path: Path) -> None:
    inner = SMALL4 | {"tie_word_embeddings": False}
    for flag, tied in ((..., True), (True, True), (False, False)):
        config = read(tmp_path, {"model_type": "mistral3", "text_config": inner}, tie_word_embeddings=flag)
        assert config.tie_word_embeddings is tied


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_a_config_of_nothing_but_its_type(tmp_path: Path, architecture: str) -> None:
    """Every field that is read has a default: it is read like the file in which transformers writes all of them."""
    bare: dict[str, Any] = {"model_type": architecture}
    if architecture == "mistral":  # 4096 of 131,072 by default: refused
        bare["sliding_window"] = None
    transformers.AutoConfig.for_model(**bare).save_pretrained(tmp_path / "whole")
    whole = read_model_config(tmp_path / "whole")
    assert read(tmp_path, bare) == whole
    assert whole.eos_token_ids == (2,)


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


@pytest.mark.parametrize(
    ("inside", "generation", "ends"),
    [
        (..., None, (2,)),  # the class's default
        (..., "{}", (2,)),
        (..., '{"eos_token_id": null}', (2,)),
        (..., '{"eos_token_id": [7, 9]}', (7, 9)),  # 2 may be any word there
        (None, None, ()),
        (None, '{"eos_token_id": 7}', (7,)),
        ([], None, ()),
        (5, '{"eos_token_id": 7}', (5, 7)),
    ],
)
def test_the_default_end_id_is_for_folders_that_name_none(
    tmp_path: Path, inside: object, generation: str | None, ends: tuple[int, ...]
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(generation)
    assert read(tmp_path, SMALL3, eos_token_id=inside).eos_token_ids == ends


@pytest.mark.parametrize(
    ("changes", "generation", "names"),
    [
        ({"eos_token_id": [2, 131072]}, "{}", ["config.json: eos_token_id holds 131072"]),
        ({"eos_token_id": [2, 2**40, 131071]}, "{}", [f"config.json: eos_token_id holds {2**40}"]),
        ({"bos_token_id": 131073}, "{}", ["config.json: bos_token_id holds 131073"]),
        ({}, '{"eos_token_id": [7, 200000]}', ["generation_config.json: eos_token_id holds 200000"]),
        ({}, '{"eos_token_id": 131072}', ["generation_config.json: eos_token_id holds 131072"]),
    ],
)
def test_ids_beyond_the_vocabulary_are_left_out(
    tmp_path: Path,
    changes: dict[str, Any],
    generation: str,
    names: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "generation_config.json").write_text(generation)
    config = read(tmp_path, SMALL4, **changes)
    assert all(token_id < 131072 for token_id in config.eos_token_ids)
    assert 2 in config.eos_token_ids
    assert config.bos_token_id == (None if "bos_token_id" in changes else 1)
    assert len(caplog.messages) == len(names)
    for name, message in zip(names, caplog.messages, strict=True):
        assert f"{name}, which a vocabulary of 131072 lacks" in message


def test_an_id_outside_a_text_config_is_named_as_it_stands(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    outer = {"model_type": "mistral3", "text_config": SMALL4, "eos_token_id": 131072}
    assert read(tmp_path, outer).eos_token_ids == ()
    read(tmp_path, {"model_type": "mistral3", "text_config": SMALL4 | {"eos_token_id": 131073}})
    assert "config.json: eos_token_id holds 131072" in caplog.text
    assert "config.json: text_config.eos_token_id holds 131073" in caplog.text


@pytest.mark.parametrize("value", [-1, 2.0, "2", True, [2, None], [2, -1], [2, "3"], {"a": 1}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_malformed_end_ids_are_refused(tmp_path: Path, file: str, value: object) -> None:
    changes: dict[str, Any] = {"eos_token_id": value} if file == "config.json" else {}
    if not changes:
        (tmp_path / file).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=rf"^{file}: eos_token_id is"):
        read(tmp_path, SMALL4, **changes)


@pytest.mark.parametrize("value", [-1, 1.0, "1", True, [1]])
def test_a_malformed_first_id_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match="bos_token_id is"):
        read(tmp_path, SMALL4, bos_token_id=value)


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


@pytest.mark.parametrize("field", [name for name in SMALL4 if name != "model_type"])
def test_small4_as_published_is_the_default(tmp_path: Path, field: str) -> None:
    assert read(tmp_path, SMALL4, **{field: ...}) == read(tmp_path, SMALL4)


@pytest.mark.parametrize("value", [..., None])
def test_rope_parameters_missing_or_null_are_small4s(tmp_path: Path, value: object) -> None:
    assert read(tmp_path, SMALL4, rope_parameters=value) == read(tmp_path, SMALL4)
    assert transformers.AutoConfig.for_model("mistral4", rope_parameters=None).rope_parameters["factor"] == 128.0


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
        ("rope_type", "dynamic"),
        ("partial_rotary_factor", 1.0),
        ("truncate", False),
        ("factor", 0.5),
        ("rope_theta", "x"),
    ],
)
def test_unsupported_rope_is_named(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"rope_parameters\.{field} is {value!r}"):
        read(tmp_path, SMALL4, rope_parameters=YARN | {field: value})


@pytest.mark.parametrize("field", ["llama_4_scaling_beta", "factor"])
def test_missing_rope_fields_are_named(tmp_path: Path, field: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{field} is missing"):
        read(tmp_path, SMALL4, rope_parameters={k: v for k, v in YARN.items() if k != field})


def test_yarn_starts_at_the_whole_length_unless_it_is_said(tmp_path: Path) -> None:
    yarn = {name: value for name, value in YARN.items() if name != "original_max_position_embeddings"}
    config = read(tmp_path, SMALL4, rope_parameters=yarn)
    assert isinstance(config.rope.scaling, YarnConfig)
    assert config.rope.scaling.original_positions == 1048576
    assert config.query_scaling == QueryScaling(beta=0.1, original_positions=1048576)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither config\.json nor params\.json"):
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
