"""A field of params.json that is unknown is refused by its name, unless it is known to say nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from published import SMALL3, SMALL4, Published

from cierzo.engine.errors import CheckpointError
from cierzo.engine.model.config import ModelConfig
from cierzo.engine.model.read_config import read_model_config

MLA, DENSE = Published(SMALL4, "native").config, Published(SMALL3, "native").config


def read(folder: Path, values: dict[str, Any]) -> ModelConfig:
    (folder / "params.json").write_text(json.dumps(values))
    return read_model_config(folder)


def with_field(values: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    outer, _, inner = path.partition(".")
    return {**values, outer: {**values[outer], inner: value} if inner else value}


@pytest.mark.parametrize(
    ("values", "field", "value"),
    [
        (DENSE, "logit_softcapping", 30.0),
        (DENSE, "attention_sinks", False),
        (MLA, "router_bias", True),
        (MLA, "moe.scoring_func", "sigmoid"),
        (MLA, "yarn.mscale", 1.0),
        (MLA, "llama_4_scaling.gamma", 0),
    ],
)
def test_an_unknown_field_is_named(tmp_path: Path, values: dict[str, Any], field: str, value: object) -> None:
    read(tmp_path, values)
    with pytest.raises(CheckpointError, match=rf"params\.json: {field} is .*, must be left out") as caught:
        read(tmp_path, with_field(values, field, value))
    assert caught.value.field == field
    assert caught.value.value == str(value)


@pytest.mark.parametrize(
    ("values", "field", "value"),
    [
        (DENSE, "logit_softcapping", None),
        (DENSE, "max_seq_len", 4096),
        (DENSE, "vision_encoder", {"hidden_size": 1024, "spatial_patches": 3}),  # as Pixtral's, without a merger
        (DENSE, "quantization", {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}),
        (MLA, "moe.expert_parallel", 4),
        (MLA, "moe.expert_model_parallel", 4),
        (MLA, "yarn.mscale", None),
    ],
)
def test_what_says_nothing_passes(tmp_path: Path, values: dict[str, Any], field: str, value: object) -> None:
    expected = read(tmp_path, values)
    assert read(tmp_path, with_field(values, field, value)) == expected
